"""Intruder counts of large matrices that need no full factorisation, of the tuned matrix or of the base.

max_i |cos(u0_i, u_j)| is enclosed from both sides. The top base vectors come from Lanczos, with bounds on their
angles (`lanczos.angle_bounds`): they give the lower end. For the base vectors beyond them, u_j less its part along
the known ones holds all there is: first its length is the bound, then the largest mass that its spectral measure
under W0ᵀW0 can have at one point, by the Chebyshev-Markov-Stieltjes inequalities for the quadrature that Lanczos from
that vector yields (Szegő, Orthogonal Polynomials, 3.41). A direction is decided when ε lies outside its interval.
Directions that stay open make the matrix fall back to the full factorisation of both.

The bounds are theorems about the vectors computed, checked in float64, under one assumption: that Lanczos from a
start with random vectors missed no eigenvalue above its last one. The masses come from float32 products.
"""

import numpy as np
import scipy.linalg

from ft_jax.analysis import lanczos, spectral, svd_cache, topk

LADDER = (0.3, 0.03, 1e-3)  # angle asked of the vectors, until every direction is decided
EXTRA = 2  # base vectors beyond k that are as good as the k: fine-tuning swaps neighbours at the border
STEPS = 10  # of Lanczos between restarts: from a random start, longer rounds need a third fewer products
MOMENTS = 24, 96  # Lanczos steps that bound the mass at a point, tried in turn
_SLACK = 1e-3  # on a squared cosine, for float32 in the Lanczos coefficients


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


def point_mass(op, vectors, steps, top):
    """The most that the spectral measure of each column under WᵀW can hold at one point of ``[0, top]``: ``[m]``.

    vectors: ``[d_out, m]`` float32, of length 1. ``steps`` Lanczos steps with full reorthogonalisation, all columns
    together, give the nodes and weights of Gauss quadrature; between two nodes lies at most the sum of their weights.
    """
    basis = np.zeros((steps + 1, *vectors.shape), np.float32)
    basis[0], alphas, betas = vectors, [], []
    for i in range(steps):
        out = lanczos.backward(op, lanczos.forward(op, basis[i]))
        alphas.append(np.einsum("nm,nm->m", out, basis[i], dtype=np.float64))
        for _ in range(2):
            out = out - np.einsum("knm,km->nm", basis[: i + 1], np.einsum("knm,nm->km", basis[: i + 1], out))
        beta = np.linalg.norm(out, axis=0)
        beta[beta <= 1e-5 * alphas[0]] = 0  # the column's Krylov space is used up: what follows has no weight
        betas.append(beta.astype(np.float64))
        basis[i + 1] = np.where(beta > 0, out / np.where(beta > 0, beta, 1), 0)
    return np.array([_heaviest(a, b, top) for a, b in zip(np.transpose(alphas), np.transpose(betas))])


def _heaviest(alpha, beta, top):
    nodes, vectors = np.linalg.eigh(np.diag(alpha) + np.diag(beta[:-1], 1) + np.diag(beta[:-1], -1))
    weights = np.concatenate([[0.0], np.square(vectors[0]), [0.0]])
    between = weights[:-1] + weights[1:]  # under the first node, between neighbours, above the last
    return between[np.concatenate([[0.0], nodes]) <= top].max()


class _RowSpace:
    """Projection on the span of the base's left vectors, where that is not the whole output space (d_out > d_in).

    W0ᵀ y with (W0 W0ᵀ) y = W0 u by Cholesky in float64, made when first needed. What is left over, s, has
    |<u0_i, s>| ≤ ‖W0 s‖ / σ_n, with σ_n from inverse iteration, halved for safety.
    """

    def __init__(self, base):
        self.base, self._factor, self._least = base, None, None

    def _factorise(self):
        self._factor = scipy.linalg.cho_factor(spectral.gram(self.base), overwrite_a=True, check_finite=False)
        probe = np.random.default_rng(0).standard_normal(len(self._factor[0]))
        for _ in range(8):
            probe = scipy.linalg.cho_solve(self._factor, probe / np.linalg.norm(probe), check_finite=False)
        self._least = np.sqrt(1 / np.linalg.norm(probe))

    def part(self, vectors):
        """``(part of each column in the span, the most that one left vector loses of it)``."""
        if self.base.shape[1] <= self.base.shape[0]:
            return vectors, 0.0
        try:
            if self._factor is None:
                self._factorise()
        except np.linalg.LinAlgError:  # rank-deficient: the whole vector is bounded instead, which is valid but looser
            return vectors, 0.0
        solved = scipy.linalg.cho_solve(self._factor, _times(self.base, vectors), check_finite=False)
        part = _times(self.base.T, solved)
        lost = 2 * np.linalg.norm(_times(self.base, vectors - part), axis=0).max() / self._least
        return (part, lost) if lost < _SLACK else (vectors, 0.0)


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


def _decide(space, ritz, base, k, eps):
    """``(cosine, lower, upper)`` of the first k directions; point masses only where they can decide."""
    sines = lanczos.angle_bounds(ritz.values, ritz.residuals, k)
    base_sines = lanczos.angle_bounds(base.values, base.residuals, len(base.values) - 1)
    lower, known, rest, slack, reach = _enclose(ritz, base, sines, base_sines)
    size, share = np.linalg.norm(rest, axis=0), np.ones(k)

    def beyond():
        return _turned(np.minimum(size * np.sqrt(share) + slack, 1), _angle(sines))

    open_ = (lower < eps) & (known < eps) & (beyond() >= eps)
    if open_.any():
        rest, lost = space.part(rest)
        size, slack = np.linalg.norm(rest, axis=0), slack + lost
    for steps in MOMENTS:
        open_ = open_ & (beyond() >= eps)
        if not open_.any():
            break
        start = (rest[:, open_] / size[open_]).astype(np.float32)
        share[open_] = np.minimum(point_mass((space.base, None, None), start, steps, reach) + _SLACK, 1)
    cosine = np.abs(base.vectors[:, : len(base_sines)].T @ ritz.vectors[:, :k]).max(axis=0)
    null = ritz.values[:k] <= spectral.NULL**2 * ritz.values[0]
    return tuple(np.where(null, 1.0, x) for x in (cosine, lower, np.maximum(np.maximum(known, beyond()), lower)))


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
    steps = STEPS if 2 * lanczos.basis_size(m, STEPS) <= n else lanczos.STEPS
    if topk.same(base, op):
        return _row(np.ones(k), np.ones(k), np.ones(k), _sizes(base_op, k, n), eps, 0)
    if n < topk.MIN_SIDE or 2 * lanczos.basis_size(m) > n:
        return _full(base, tuned, k, eps, 0)
    rng = np.random.default_rng(0)
    vectors = topk.start_block(op, np.zeros((base.shape[1], 0), np.float32), k, rng)
    extra = rng.standard_normal((base.shape[1], EXTRA + lanczos.GUARD - 2), np.float32)
    known, space = None, _RowSpace(base)
    for tolerance in LADDER:
        vectors = lanczos.top(op, vectors, k, tolerance=tolerance, steps=steps)
        known = np.concatenate([vectors[:, : k + 2], extra], axis=1) if known is None else known
        known = lanczos.top(base_op, known, m, tolerance=tolerance, steps=steps)
        ritz = lanczos.polish(op, vectors)
        cosine, lower, upper = _decide(space, ritz, lanczos.polish(base_op, known), k, eps)
        undecided = (lower < eps) & (upper >= eps)
        if not undecided.any():
            return _row(cosine, lower, upper, np.sqrt(np.clip(ritz.values[:k], 0, None)), eps, 0)
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
