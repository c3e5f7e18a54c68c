"""How far confidence is from being right."""

import numpy as np

from ft_jax.errors import UserError


def reliability(confidence, correct, bins=15):
    """Reliability table over equal-width bins of confidence (arXiv:1706.04599).

    confidence float ``[N]`` in [0, 1] (the probability of the predicted class), correct bool ``[N]``.
    Returns rows ``{low, high, count, confidence, accuracy}`` of the bins that hold anything.
    """
    confidence, correct = np.asarray(confidence, np.float64), np.asarray(correct, np.float64)
    if confidence.shape != correct.shape or confidence.ndim != 1:
        raise UserError(f"confidence {confidence.shape} and correct {correct.shape} are to be two vectors of one length")
    if confidence.size and not (confidence.min() >= 0 and confidence.max() <= 1 + 1e-6):
        raise UserError("confidence lies outside [0, 1]: probabilities are needed, not logits")
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    rows = []
    for b in np.unique(index):
        here = index == b
        rows.append({"low": b / bins, "high": (b + 1) / bins, "count": int(here.sum()),
                     "confidence": float(confidence[here].mean()), "accuracy": float(correct[here].mean())})  # fmt: skip
    return rows


def expected_calibration_error(confidence, correct, bins=15):
    """ECE = Σ_b n_b / N · |accuracy_b − confidence_b| over equal-width bins (arXiv:1706.04599); arrays as `reliability`."""
    rows = reliability(confidence, correct, bins)
    total = sum(r["count"] for r in rows)
    return sum(r["count"] * abs(r["accuracy"] - r["confidence"]) for r in rows) / total if total else 0.0
