"""Calibration against an independent statement and closed forms."""

import numpy as np
import pytest

from ft_jax.analysis import calibration
from ft_jax.errors import UserError


def ece_by_loop(probs, labels, bins):
    """Guo et al. (2017) as written: a bin for each interval ((m-1)/M, m/M]."""
    total, n = 0.0, len(labels)
    for m in range(1, bins + 1):
        inside = [i for i in range(n) if (m - 1) / bins < max(probs[i]) <= m / bins]
        if inside:
            acc = sum(int(np.argmax(probs[i]) == labels[i]) for i in inside) / len(inside)
            conf = sum(max(probs[i]) for i in inside) / len(inside)
            total += len(inside) / n * abs(acc - conf)
    return total


@pytest.mark.parametrize("bins", [1, 7, 15])
@pytest.mark.parametrize("classes", [2, 5])
def test_ece(bins, classes):
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.full(classes, 0.5), 300)
    labels = rng.integers(0, classes, 300)
    expected = ece_by_loop(probs, labels, bins)
    assert expected > 0.05
    assert calibration.expected_calibration_error(probs, labels, bins) == pytest.approx(expected, abs=1e-12)
    confidence, correct = probs.max(1), probs.argmax(1) == labels
    assert calibration.expected_calibration_error(confidence, correct, bins) == pytest.approx(expected, abs=1e-12)


def test_closed_forms():
    sure = np.eye(2)[[0, 0, 1, 1]]
    assert calibration.expected_calibration_error(sure, [0, 0, 1, 1]) == 0
    assert calibration.expected_calibration_error(sure, [1, 1, 0, 1]) == 0.75
    assert calibration.accuracy(sure, [1, 1, 0, 1]) == 0.25
    assert calibration.negative_log_likelihood(sure, [0, 1, 1, 1]) == np.inf
    half = np.full((4, 2), 0.5, np.float32)
    assert calibration.negative_log_likelihood(half, [0, 1, 0, 1]) == pytest.approx(np.log(2))
    assert calibration.expected_calibration_error(half, [0, 1, 0, 1]) == 0


def test_reliability_rows_add_up():
    rng = np.random.default_rng(1)
    probs, labels = rng.dirichlet([1, 1, 1], 100), rng.integers(0, 3, 100)
    rows = calibration.reliability(probs, labels, bins=10)
    assert len(rows) == 10 and sum(r["count"] for r in rows) == 100
    assert rows[0]["accuracy"] is None  # no confidence of three classes is under 1/3
    for r in rows:
        if r["count"]:
            assert r["low"] < r["confidence"] <= r["high"]
    share = sum(r["count"] * (r["accuracy"] or 0) for r in rows) / 100
    assert share == pytest.approx(calibration.accuracy(probs, labels))


@pytest.mark.parametrize("probs,labels,message", [
    ([[0.5, 0.5]], [2], "row 0: label 2 is not one of 2"),
    ([[0.5, 0.5], [1.5, -0.5]], [0, 1], "row 1: not a probability"),
    ([[np.nan, 1]], [0], "row 0"),
    ([[0.5, 0.5]], [0, 1], "do not fit"),
    (np.zeros((0, 2)), [], "do not fit"),
])
def test_bad_input(probs, labels, message):
    with pytest.raises(UserError, match=message):
        calibration.expected_calibration_error(np.array(probs), np.array(labels))
