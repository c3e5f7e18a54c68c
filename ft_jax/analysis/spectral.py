"""What fine-tuning did to the singular values and vectors of a matrix.

Arrays are ``[..., d_in, d_out]`` (Flax orientation), leading axes are a batch, n = min(d_in, d_out). "Left" singular
vectors are those of torch's ``[out, in]`` convention: directions of the output space, a Flax kernel's right ones.

Every number comes from eigenvalues of the smaller Gram matrix, summed in float64. The product of two float32 numbers
is exact there, so vectors are at least as accurate as those of a float32 SVD wherever σ_i > 1e-8 σ_1, for a third of
the time and without a second copy of the matrix; smaller values take the SVD itself (`_left_overlap`).
"""

import numpy as np
import scipy.linalg
from scipy.linalg.blas import dsyrk

from ft_jax import tree
from ft_jax.errors import UserError
from ft_jax.registry import register

EPS_SWEEP = tuple(round(0.05 * i, 2) for i in range(1, 20))
_CHUNK = 1 << 20  # float64 numbers of a matrix that exist at one time
NULL = 1e-6  # σ/σ1 under which a float32 matrix holds rounding, not a direction
_ILL = 1e-5  # σ/σ1 under which left vectors computed as W v / σ lose the 1e-4 that is promised


def chunks(array, axis):
    """Slices along one axis of a matrix, ``_CHUNK`` numbers each."""
    step = max(1, _CHUNK // max(1, array.shape[1 - axis]))
    return [slice(i, i + step) for i in range(0, array.shape[axis], step)]


def gram(w, minus=None):
    """float64 Gram matrix ``[n, n]`` (upper triangle) over the smaller side of W, or of W − minus."""
    over = 0 if w.shape[0] >= w.shape[1] else 1
    n = w.shape[1 - over]
    gram = np.zeros((n, n), order="F")
    for part in chunks(w, over):
        cut = (part, slice(None)) if over == 0 else (slice(None), part)
        block = w[cut].astype(np.float64)
        if minus is not None:
            block -= minus[cut]
        block = block if over == 0 else block.T
        rows = block.flags.c_contiguous  # dsyrk copies whatever is not in Fortran order
        gram = dsyrk(1.0, block.T if rows else block, beta=1.0, c=gram, trans=not rows, overwrite_c=True)
    return gram


def norm(w):
    """‖W‖_F summed in float64."""
    return np.sqrt(sum(np.square(w[part], dtype=np.float64).sum() for part in chunks(w, 0)))


def _eigh(gram, **options):
    # One BLAS for the whole chain: numpy's and scipy's own thread pools, taking turns, cost half the speed.
    return scipy.linalg.eigh(gram, lower=False, overwrite_a=True, check_finite=False, **options)


def top_left(w, k):
    """``(σ [k], U [d_out, k])``: the top k singular values and left vectors, float64."""
    n = min(w.shape)
    k = min(k, n)
    values, vectors = _eigh(gram(w), subset_by_index=[n - k, n - 1], driver="evr")
    sigma, vectors = np.sqrt(np.clip(values[::-1], 0, None)), vectors[:, ::-1]
    if w.shape[1] <= w.shape[0]:
        return sigma, vectors
    left = np.concatenate([w[:, c].T.astype(np.float64) @ vectors for c in chunks(w, 1)])
    return sigma, left / np.maximum(np.linalg.norm(left, axis=0), np.finfo(np.float64).tiny)


def _left_overlap(w, directions):
    """``Uᵀ d`` ``[n, k]`` of all n left vectors of W with the directions ``[d_out, k]``, U not formed."""
    values, vectors = _eigh(gram(w), driver="evr")  # evd: 10 % faster in twice the memory
    if w.shape[1] <= w.shape[0]:
        return vectors.T @ directions
    sigma = np.sqrt(np.clip(values, 0, None))
    if sigma[0] <= _ILL * sigma[-1]:
        return np.linalg.svd(w.astype(np.float64), full_matrices=False)[2] @ directions
    image = sum(w[:, c].astype(np.float64) @ directions[c] for c in chunks(w, 1))
    return (vectors.T @ image) / sigma[:, None]


def left_vectors(w):
    """``(Uᵀ [n, d_out], σ [n])`` of a ``[d_in, d_out]`` matrix, float32, largest first."""
    values, vectors = _eigh(gram(w), driver="evr")
    sigma = np.sqrt(np.clip(values, 0, None))
    if w.shape[1] > w.shape[0]:
        if sigma[0] <= _ILL * sigma[-1]:
            _, sigma, left = np.linalg.svd(w.astype(np.float64), full_matrices=False)
            return left.astype(np.float32), sigma.astype(np.float32)
        vectors = np.concatenate([w[:, c].T.astype(np.float64) @ vectors for c in chunks(w, 1)]) / sigma
    return np.ascontiguousarray(vectors.T[::-1], np.float32), sigma[::-1].astype(np.float32)


def _max_cosine(base, tuned, k):
    """``(cosine [k], σ [k])`` of one matrix; null directions and exact copies have cosine 1."""
    sigma, left = top_left(tuned, k)
    if np.array_equal(base, tuned):  # equal singular values leave the vectors free: a copy is no intruder
        return np.ones_like(sigma), sigma
    cosine = np.abs(_left_overlap(base, left)).max(axis=0)
    return np.where(sigma > NULL * sigma[0], np.minimum(cosine, 1.0), 1.0), sigma


def _pair(base, tuned):
    base, tuned = np.asarray(base, np.float32), np.asarray(tuned, np.float32)
    if base.shape != tuned.shape or base.ndim < 2 or 0 in base.shape:
        raise UserError(f"two matrices of one shape are needed, not {base.shape} and {tuned.shape}")
    for name, array in (("base", base), ("tuned", tuned)):
        if not np.isfinite(array).all():
            raise UserError(f"the {name} matrix of shape {array.shape} holds NaN or infinity")
    return base, tuned


def _batched(fn, base, tuned):
    """``fn(base, tuned) -> {name: array}`` on every matrix of a batch, stacked on the leading axes, float32."""
    base, tuned = _pair(base, tuned)
    lead = base.shape[:-2]
    pairs = zip(base.reshape(-1, *base.shape[-2:]), tuned.reshape(-1, *base.shape[-2:]))
    rows = [fn(b, t) for b, t in pairs]
    stacked = {name: np.stack([np.asarray(row[name]) for row in rows]) for name in rows[0]}
    kinds = {name: np.int32 if x.dtype.kind in "iu" else np.float32 for name, x in stacked.items()}
    return {name: x.reshape((*lead, *x.shape[1:])).astype(kinds[name]) for name, x in stacked.items()}


def count_intruders(max_cosine, *, k=10, eps=0.5):
    """Number of the top k directions whose cosine is under ε, int32; ``max_cosine`` is ``[..., ≥k]``."""
    return (np.asarray(max_cosine)[..., :k] < eps).sum(-1, dtype=np.int32)


def _intruders(base, tuned, k, eps):
    cosine, sigma = _max_cosine(base, tuned, k)
    return {"intruders": count_intruders(cosine, k=k, eps=eps), "max_cosine": cosine, "singular_values": sigma}


def delta(base, tuned):
    values = _eigh(gram(tuned, minus=base), eigvals_only=True, driver="evd")
    return measures(np.sqrt(np.clip(values[::-1], 0, None)), norm(base))


def measures(sigma, base_norm):
    """Ranks and norms of a ΔW with singular values σ, largest first; a zero ΔW has rank 0 and norm 0."""
    total = np.linalg.norm(sigma)
    share = sigma[sigma > 0] / max(sigma.sum(), np.finfo(np.float64).tiny)
    return {
        "effective_rank": np.exp(-(share * np.log(share)).sum()) if total > 0 else 0.0,
        "stable_rank": (total / sigma[0]) ** 2 if total > 0 else 0.0,
        "delta_norm": total,
        "delta_norm_relative": total / base_norm if base_norm > 0 else (np.inf if total > 0 else 0.0),
        "delta_spectral_norm": sigma[0],
    }


def _some(names):
    return lambda b, t: {name: value for name, value in delta(b, t).items() if name in names}


@register("analysis", "intruder_dimensions", paper="arXiv:2410.21228")
def intruder_dimensions(base, tuned, *, k=10, eps=0.5):
    """Intruder dimensions: top-k left vectors u_j of the tuned matrix with max_i |cos(u0_i, u_j)| < ε.

    Returns ``intruders [...]`` int32, ``max_cosine [..., k]`` (from it `count_intruders` counts every ε and smaller k)
    and ``singular_values [..., k]`` of the tuned matrix. i runs over all n vectors of the economy SVD of the base.
    Directions with σ = 0 and exact copies count as cosine 1.
    """
    return _batched(lambda b, t: _intruders(b, t, k, eps), base, tuned)


@register("analysis", "effective_rank", paper="Roy & Vetterli, EUSIPCO 2007")
def effective_rank(base, tuned):
    """Effective rank of ΔW: exp of the entropy of its singular values normalised to sum 1; 0 for ΔW = 0."""
    return _batched(_some(("effective_rank",)), base, tuned)


@register("analysis", "stable_rank", paper="Rudelson & Vershynin, arXiv:math/0503442")
def stable_rank(base, tuned):
    """Stable rank of ΔW: ‖ΔW‖_F² / ‖ΔW‖₂²; 0 for ΔW = 0."""
    return _batched(_some(("stable_rank",)), base, tuned)


@register("analysis", "delta_norm", paper="arXiv:2410.21228")
def delta_norm(base, tuned):
    """Size of ΔW: ‖ΔW‖_F, ‖ΔW‖_F / ‖W0‖_F and ‖ΔW‖₂."""
    return _batched(_some(("delta_norm", "delta_norm_relative", "delta_spectral_norm")), base, tuned)


@register("analysis", "spectral", paper="arXiv:2410.21228")
def spectral(base, tuned, *, k=10, eps=0.5):
    """Intruder dimensions, ranks and norms of ΔW together, each matrix factorised once."""
    return _batched(lambda b, t: _intruders(b, t, k, eps) | delta(b, t), base, tuned)


@register("analysis", "singular_similarity", paper="arXiv:2410.21228")
def similarity(base, tuned, *, top=10):
    """|U0ᵀ U| of the top left singular vectors: ``similarity [..., top, top]``, rows base, columns tuned."""

    def cosines(b, t):
        return {"similarity": np.minimum(np.abs(top_left(b, top)[1].T @ top_left(t, top)[1]), 1.0)}

    return _batched(cosines, base, tuned)


@register("analysis", "principal_angles", paper="Björck & Golub, Math. Comp. 1973")
def principal_angles(base, tuned, *, top=10):
    """Principal angles (radians, ascending) between the spans of the top left vectors: ``angles [..., top]``."""

    def angles(b, t):
        return {"angles": np.sort(scipy.linalg.subspace_angles(top_left(b, top)[1], top_left(t, top)[1]))}

    return _batched(angles, base, tuned)


def over_tree(method, base, tuned, *, include=r".*layers/.*/kernel", **hp):
    """``{path: method(base[path], tuned[path], **hp)}`` for every leaf whose path fully matches ``include``."""
    first, second = tree.flatten(base), tree.flatten(tuned)
    chosen = tree.match([(include, True)], first, what="include", default=False)
    missing = [path for path, wanted in chosen.items() if wanted and path not in second]
    if missing:
        raise UserError(f"the tuned tree has no leaf {missing[0]!r}")
    return {path: method(first[path], second[path], **hp) for path, wanted in chosen.items() if wanted}
