"""How sure a number is: rank correlation with a bootstrap interval."""

import numpy as np
from scipy import stats

from ft_jax.errors import UserError


def spearman(x, y, *, resamples=2000, seed=0, level=0.95):
    """Spearman's ρ of paired values with its p-value and a percentile bootstrap interval over the pairs.

    Returns ``{rho, low, high, p, n}``; ρ and the interval are None where a side is constant or there are under 4 pairs.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    if x.shape != y.shape or x.ndim != 1:
        raise UserError(f"two lists of one length are needed, not {x.shape} and {y.shape}")
    keep = np.isfinite(x) & np.isfinite(y)
    x, y = x[keep], y[keep]
    empty = {"rho": None, "low": None, "high": None, "p": None, "n": int(x.size)}
    if x.size < 4 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return empty
    rho, p = stats.spearmanr(x, y)
    picks = np.random.default_rng(seed).integers(x.size, size=(resamples, x.size))
    a, b = (stats.rankdata(v[picks], axis=1) for v in (x, y))  # ranks anew in every resample: ties are what they are there
    a, b = (v - v.mean(1, keepdims=True) for v in (a, b))
    size = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    found = (a * b).sum(1)[size > 0] / size[size > 0]
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return {"rho": float(rho), "low": float(low), "high": float(high), "p": float(p), "n": int(x.size)}
