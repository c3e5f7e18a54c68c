"""Norms and ranks of ΔW at the price that its form allows."""

import numpy as np

from ft_jax.analysis import lanczos, spectral, topk
from ft_jax.kernels import dense

EXACT_SIDE = 2048  # up to here all singular values of a dense ΔW are computed; the time grows with the cube
PRECISION = 4e-3  # residual over σ² at which Lanczos stops: ‖ΔW‖₂ is within half of it


def change(base, tuned, *, exact=None):
    """Ranks and norms of ΔW = tuned − base, one matrix; tuned may be a `LowRank` kernel around that base.

    Returns the numbers of `spectral.measures` as floats. The factors of a low-rank change give all of them. So do the
    singular values of a dense one, which ``exact`` asks for or forbids (None: up to a side of 2048); without them
    ``effective_rank`` is None, ``stable_rank`` and ``delta_spectral_norm`` rest on ‖ΔW‖₂ by Lanczos.
    """
    base = np.asarray(base, np.float32)
    topk.check(base, tuned)
    op = tuple(None if x is None else np.asarray(x) for x in topk.parts(tuned))
    if op[1] is not None and np.array_equal(op[0], base):
        sigma = np.linalg.svd(np.linalg.qr(op[1].astype(np.float64))[1] @ op[2], compute_uv=False)
        found = spectral.measures(sigma, spectral.norm(base))
    elif exact or (exact is None and min(base.shape) <= EXACT_SIDE):
        found = spectral.delta(base, np.asarray(dense(tuned), np.float32))
    else:
        found = _by_lanczos(base, np.asarray(dense(tuned), np.float32))
    return {name: None if value is None else float(value) for name, value in found.items()}


def _by_lanczos(base, tuned):
    delta = tuned - base
    total, base_norm = spectral.norm(delta), spectral.norm(base)
    if total == 0 or min(base.shape) < 2 * lanczos.basis_size(1):
        return spectral.delta(base, tuned)
    start = np.random.default_rng(0).standard_normal((base.shape[1], 1 + lanczos.GUARD), np.float32)
    op = (delta, None, None)
    ritz = lanczos.polish(op, lanczos.top(op, start, 1, tolerance=PRECISION, error=lanczos.value))
    if lanczos.value(ritz.values, ritz.residuals, 1) > 2 * PRECISION:
        return spectral.delta(base, tuned)
    first = np.sqrt(ritz.values[0])
    return {"effective_rank": None, "stable_rank": (total / first) ** 2, "delta_norm": total,
            "delta_norm_relative": total / base_norm if base_norm > 0 else np.inf, "delta_spectral_norm": first}  # fmt: skip
