"""Intruder counts of large matrices that need no full factorisation, of the tuned matrix or of the base.

max_i |cos(u0_i, u_j)| is enclosed from both sides. The top base vectors come from Lanczos, with bounds on their
angles (`lanczos.angle_bounds`): they give the lower end. For the base vectors beyond them, u_j less its part along
the known ones holds all there is: first its length is the bound, then the Christoffel function of the spectral
measure it has under W0ᵀW0: no point λ carries more mass than 1 / Σ_k p_k(λ)², with p_k the orthonormal polynomials that
Lanczos from that vector yields (Nevai, J. Approx. Theory 1986). A direction is decided when ε lies outside its
interval. Directions that stay open make the matrix fall back to the full factorisation of both.

The bounds are theorems about the vectors computed, checked in float64, under one assumption: that Lanczos from a
start with random vectors missed no eigenvalue above its last one. The Christoffel bound uses float32 products.
"""

import numpy as np
import scipy.linalg

from ft_jax.analysis import lanczos, spectral, svd_cache, topk

LADDER = (0.1, 0.01, 1e-3)  # angle asked of the vectors, until every direction is decided
EXTRA = 4  # base vectors beyond k: fine-tuning swaps neighbours at the border
MOMENTS = 24, 96  # Lanczos steps of the Christoffel bound, tried in turn
_SLACK = 1e-3  # on a squared cosine, for float32 in the Lanczos coefficients and the search for the maximum


def _angle(sine):
    return np.arcsin(np.clip(sine, 0, 1))


def _turned(cosine, angle):
    """Largest |cos| after a turn by ``angle``."""
    return np.cos(np.maximum(np.arccos(np.clip(cosine, 0, 1)) - angle, 0))


def _subspace(ritz, sines):
    """``(count, sin)``: leading base vectors whose span is known well, and its angle to the true span."""
    squares = np.sqrt(np.cumsum(np.square(ritz.residuals)))[: len(sines)]
    reach = np.maximum.accumulate((ritz.values + ritz.residuals)[:0:-1])[::-1]
    with np.errstate(divide="ignore"):
        sine = np.where(ritz.values[:-1] > reach, squares / np.maximum(ritz.values[:-1] - reach, 1e-300), 1.0)
    good = np.flatnonzero(sine < 0.05)
    return (good[-1] + 1, sine[good[-1]]) if len(good) else (0, 0.0)


def christoffel(op, vectors, steps, top):
    """Largest mass that the spectral measure of each column under WᵀW can have at one point of ``[0, top]``: ``[m]``.

    vectors: ``[d_out, m]`` float32, of length 1. ``steps`` Lanczos steps with full reorthogonalisation, all columns
    together; maximum over a Chebyshev grid and the Ritz values, refined around the best points.
    """
    basis = np.zeros((steps + 1, *vectors.shape), np.float32)
    basis[0], alphas, betas = vectors, [], []
    for i in range(steps):
        out = lanczos.backward(op, lanczos.forward(op, basis[i]))
        alphas.append(np.einsum("nm,nm->m", out, basis[i], dtype=np.float64))
        for _ in range(2):
            out = out - np.einsum("knm,km->nm", basis[: i + 1], np.einsum("knm,nm->km", basis[: i + 1], out))
        betas.append(np.linalg.norm(out, axis=0).astype(np.float64))
        if (betas[-1] < 1e-5 * alphas[0]).any():  # a column's Krylov space is used up
            break
        basis[i + 1] = out / betas[-1].astype(np.float32)
    return np.array([_largest_mass(a, b, top) for a, b in zip(np.transpose(alphas), np.transpose(betas))])


def _largest_mass(alpha, beta, top):
    ritz = np.linalg.eigvalsh(np.diag(alpha) + np.diag(beta[:-1], 1) + np.diag(beta[:-1], -1))
    grid = top * (1 - np.cos(np.linspace(0, np.pi, 16 * len(alpha)))) / 2
    grid = np.sort(np.concatenate([grid, ritz[(ritz > 0) & (ritz < top)]]))
    for _ in range(3):
        mass = _mass(alpha, beta, grid)
        best = np.argsort(mass)[-4:]
        ends = grid[np.maximum(best - 1, 0)], grid[np.minimum(best + 1, len(grid) - 1)]
        grid = np.sort(np.linspace(*ends, 33).ravel())
    return _mass(alpha, beta, grid).max()


def _mass(alpha, beta, at):
    """1 / Σ_k p_k(λ)² for λ in ``at``, p_k from the three-term recurrence."""
    before, now = np.zeros_like(at), np.ones_like(at)
    total = now.copy()
    for k in range(len(alpha) - 1):
        last = beta[k - 1] if k else 0.0
        before, now = now, np.clip(((at - alpha[k]) * now - last * before) / beta[k], -1e100, 1e100)
        total += now * now
    return 1 / total


def _row_part(base, vectors):
    """The part of each column in the span of the base's left vectors, and the most that one of them loses of it.

    Where d_out ≤ d_in that is everything. Else W0ᵀ y with (W0 W0ᵀ) y = W0 u by Cholesky in float64; what is left, s,
    has |<u0_i, s>| ≤ ‖W0 s‖ / σ_n, with σ_n from inverse iteration and half of it for safety.
    """
    if base.shape[1] <= base.shape[0]:
        return vectors, 0.0
    gram = spectral.gram(base)
    try:
        factor = scipy.linalg.cho_factor(gram, lower=False, overwrite_a=True, check_finite=False)
    except np.linalg.LinAlgError:
        return vectors, 1.0
    least, probe = np.inf, np.random.default_rng(0).standard_normal(len(gram))
    for _ in range(8):
        probe = scipy.linalg.cho_solve(factor, probe / np.linalg.norm(probe), check_finite=False)
        least = 1 / np.linalg.norm(probe)
    solved = scipy.linalg.cho_solve(factor, _times(base, vectors), check_finite=False)
    part = _times(base.T, solved)
    lost = np.linalg.norm(_times(base, vectors - part), axis=0).max()
    return part, min(1.0, 2 * lost / np.sqrt(least))


def _times(w, x):
    """``W x`` in float64, in chunks of rows."""
    return np.concatenate([w[rows].astype(np.float64) @ x for rows in spectral.chunks(w, 0)])


def _enclose(ritz, base, sines, base_sines):
    """``(lower, upper_known, rest [d_out, k], slack, top)`` of every direction, from the vectors alone.

    upper_known bounds the cosines with the known base vectors; those with the others are at most the mass that
    ``rest`` has at one point of ``[0, top]``, plus slack.
    """
    k = len(sines)
    u, x = ritz.vectors[:, :k], base.vectors[:, : len(base_sines)]
    cosine = np.abs(x.T @ u)
    off = _angle(base_sines)[:, None] + _angle(sines)[None]
    lower = np.where(np.arccos(np.clip(cosine, 0, 1)) + off < np.pi / 2,
                     np.cos(np.minimum(np.arccos(np.clip(cosine, 0, 1)) + off, np.pi / 2)), 0.0).max(axis=0)
    count, sine = _subspace(base, base_sines)
    known = x[:, :count]
    inside = known.T @ u
    length, rest = np.linalg.norm(inside, axis=0), u - known @ inside
    one_by_one = _turned(cosine[:count], off[:count]).max(axis=0, initial=0)
    upper = np.minimum(one_by_one, _turned(np.minimum(length + sine, 1), _angle(sines)))
    reach = np.maximum(base.values + base.residuals, 0)[count:].max(initial=0)
    return lower, upper, rest, sine * length, reach


def _decide(op, ritz, base, k, eps):
    """``(cosine, lower, upper)`` of the first k directions; Christoffel bounds only where they can decide."""
    sines = lanczos.angle_bounds(ritz.values, ritz.residuals, k)
    base_sines = lanczos.angle_bounds(base.values, base.residuals, len(base.values) - 1)
    lower, known, rest, slack, reach = _enclose(ritz, base, sines, base_sines)
    size, share = np.linalg.norm(rest, axis=0), np.ones(k)

    def beyond():
        return _turned(np.minimum(size * np.sqrt(share) + slack, 1), _angle(sines))

    open_ = (lower < eps) & (known < eps) & (beyond() >= eps)
    if open_.any():
        rest, lost = _row_part(op[0], rest)
        size, slack = np.linalg.norm(rest, axis=0), slack + lost
    for steps in MOMENTS:
        open_ = open_ & (beyond() >= eps)
        if not open_.any():
            break
        start = (rest[:, open_] / size[open_]).astype(np.float32)
        share[open_] = np.minimum(christoffel(op, start, steps, reach) + _SLACK, 1)
    cosine = np.abs(base.vectors[:, : len(base_sines)].T @ ritz.vectors[:, :k]).max(axis=0)
    return cosine, lower, np.maximum(np.maximum(known, beyond()), lower)


def intruders(base, tuned, *, k=10, eps=0.5):
    """Certified intruder count (arXiv:2410.21228) of one large matrix; base array, tuned array or `LowRank` kernel.

    Returns ``intruders`` (int32, equal to that of `spectral.intruder_dimensions`), ``lower`` and ``upper [k]`` (the
    ends between which each direction's max_i |cos(u0_i, u_j)| lies), ``max_cosine [k]`` (the best value known, within
    them), ``singular_values [k]`` and ``fell_back``: directions that only the full factorisation decided.
    """
    base = np.asarray(base, np.float32)
    topk.check(base, tuned)
    op, base_op = tuple(None if x is None else np.asarray(x) for x in topk.parts(tuned)), (base, None, None)
    n, m = min(base.shape), k + EXTRA
    if topk.same(base, op):
        return _row(np.ones(k), np.ones(k), np.ones(k), _sizes(base_op, k, n), eps, 0)
    if n < topk.MIN_SIDE or 2 * lanczos.basis_size(m) > n:
        return _full(base, tuned, k, eps, 0)
    rng = np.random.default_rng(0)
    vectors = topk.start_block(op, np.zeros((base.shape[1], 0), np.float32), k, rng)
    extra = rng.standard_normal((base.shape[1], EXTRA + lanczos.GUARD - 2), np.float32)
    known = None
    for tolerance in LADDER:
        vectors = lanczos.top(op, vectors, k, tolerance=tolerance)
        known = np.concatenate([vectors[:, : k + 2], extra], axis=1) if known is None else known
        known = lanczos.top(base_op, known, m, tolerance=tolerance)
        ritz = lanczos.polish(op, vectors)
        cosine, lower, upper = _decide(base_op, ritz, lanczos.polish(base_op, known), k, eps)
        undecided = (lower < eps) & (upper >= eps)
        if not undecided.any():
            return _row(cosine, lower, upper, np.sqrt(ritz.values[:k]), eps, 0)
    return _full(base, tuned, k, eps, int(undecided.sum()))


def _row(cosine, lower, upper, sigma, eps, fell):
    return {"intruders": spectral.count_intruders(upper, k=len(upper), eps=eps),
            "max_cosine": np.clip(cosine, lower, upper), "lower": lower, "upper": upper,
            "singular_values": sigma, "fell_back": fell}  # fmt: skip


def _full(base, tuned, k, eps, fell):
    cosine, sigma, _, _ = topk.exact(base, tuned, k, svd_cache.left(base)[0])
    return _row(cosine, cosine, cosine, sigma, eps, fell)


def _sizes(op, k, n):
    """Top k singular values alone."""
    if 2 * lanczos.basis_size(k) > n:
        return spectral.top_left(op[0], k)[0]
    start = np.random.default_rng(0).standard_normal((op[0].shape[1], k + lanczos.GUARD), np.float32)
    return np.sqrt(lanczos.polish(op, lanczos.top(op, start, k, tolerance=0.1)).values[:k])
