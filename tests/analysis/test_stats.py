"""Spearman's ρ against scipy, and an interval that covers what it should."""

import numpy as np
import pytest
from scipy import stats as scipy_stats

from ft_jax.analysis.stats import spearman
from ft_jax.errors import UserError


def test_equals_scipy_with_ties():
    rng = np.random.default_rng(0)
    x, y = rng.integers(5, size=40), rng.integers(5, size=40)
    found, (rho, p) = spearman(x, y), scipy_stats.spearmanr(x, y)
    assert found["rho"] == pytest.approx(rho) and found["p"] == pytest.approx(p)
    assert found["low"] < rho < found["high"]


def test_a_monotone_relation_is_one_and_its_interval_too():
    x = np.arange(12.0)
    found = spearman(x, x**3)
    assert found["rho"] == pytest.approx(1) and found["low"] == pytest.approx(1) and found["n"] == 12


def test_the_interval_equals_scipys_percentile_bootstrap():
    rng = np.random.default_rng(1)
    x = rng.normal(size=30)
    y = x + rng.normal(size=30)
    found = spearman(x, y, resamples=4000)
    other = scipy_stats.bootstrap((x, y), lambda a, b: scipy_stats.spearmanr(a, b).statistic, paired=True, vectorized=False,
                                  method="percentile", n_resamples=1500, rng=2).confidence_interval  # fmt: skip
    assert found["low"] == pytest.approx(other.low, abs=0.04) and found["high"] == pytest.approx(other.high, abs=0.04)


def test_what_cannot_be_ranked_has_no_number():
    assert spearman([1, 1, 1, 1], [1, 2, 3, 4])["rho"] is None
    assert spearman([1, 2, np.nan, 4], [1, 2, 3, 4])["n"] == 3
    with pytest.raises(UserError, match="one length"):
        spearman([1, 2], [1, 2, 3])
