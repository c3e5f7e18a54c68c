"""Whether a classifier is as often right as it says: expected calibration error, reliability table, NLL."""

import numpy as np

from ft_jax.errors import UserError


def _confidence(probs, labels):
    """``(confidence [N], correct [N] bool)`` from ``probs [N, C]`` and labels, or from these two themselves."""
    probs, labels = np.asarray(probs, np.float64), np.asarray(labels)
    if probs.ndim not in (1, 2) or labels.shape != probs.shape[:1] or not labels.size:
        raise UserError(f"probabilities of shape {probs.shape} do not fit labels of shape {labels.shape}")
    valid = (probs >= 0) & (probs <= 1 + 1e-5)
    if not valid.all():
        raise UserError(f"row {np.argwhere(~valid)[0][0]}: not a probability")
    if probs.ndim == 1:
        return np.minimum(probs, 1.0), labels.astype(bool)
    wrong = np.flatnonzero((labels < 0) | (labels >= probs.shape[1]))
    if wrong.size:
        raise UserError(f"row {wrong[0]}: label {labels[wrong[0]]} is not one of {probs.shape[1]} classes")
    return np.minimum(probs.max(1), 1.0), probs.argmax(1) == labels


def reliability(probs, labels, *, bins=15):
    """Rows ``{low, high, count, confidence, accuracy}`` of equal-width bins (low, high]; means are None where empty.

    ``probs [N, C]`` with integer ``labels [N]``, or confidences ``[N]`` with ``labels`` saying which were correct.
    """
    confidence, correct = _confidence(probs, labels)
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(index, minlength=bins)
    sums = (np.bincount(index, weights=w, minlength=bins) for w in (confidence, correct.astype(np.float64)))
    mean_confidence, accuracy = (s / np.maximum(count, 1) for s in sums)
    return [
        {"low": b / bins, "high": (b + 1) / bins, "count": int(n),
         "confidence": float(c) if n else None, "accuracy": float(a) if n else None}
        for b, (n, c, a) in enumerate(zip(count, mean_confidence, accuracy))
    ]  # fmt: skip


def expected_calibration_error(probs, labels, bins=15):
    """ECE: Σ_b (n_b / N) · |accuracy_b − confidence_b| over equal-width bins of the confidence (arXiv:1706.04599).

    ``probs [N, C]`` with integer ``labels [N]``, or confidences ``[N]`` with ``labels`` saying which were correct.
    """
    rows = [r for r in reliability(probs, labels, bins=bins) if r["count"]]
    total = sum(r["count"] for r in rows)
    return sum(r["count"] / total * abs(r["accuracy"] - r["confidence"]) for r in rows)


def accuracy(probs, labels):
    """Share of the examples whose likeliest class is the label."""
    return float(_confidence(probs, labels)[1].mean())


def negative_log_likelihood(probs, labels):
    """Mean −log p(label) in nats; ``probs [N, C]``; infinite where a label has probability 0."""
    _confidence(probs, labels)
    with np.errstate(divide="ignore"):
        return float(-np.log(np.take_along_axis(np.asarray(probs, np.float64), np.asarray(labels)[:, None], 1)).mean())
