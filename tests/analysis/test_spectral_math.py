"""Spectral measures against closed forms."""

import numpy as np
import pytest

from ft_jax import registry
from ft_jax.analysis import spectral
from ft_jax.errors import UserError


def gaussian(shape, seed=0, scale=0.05):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def orthogonal(n, seed):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))[0]


@pytest.mark.parametrize("share,expected", [(0.1, 0), (0.25, 0), (1.2, 1), (3.0, 1)])
def test_toy_case(share, expected):
    """W Gaussian 768×768 + λ v vᵀ: no intruder for λ well under σ1, exactly one above."""
    w = gaussian((768, 768), scale=1.0)
    v = np.random.default_rng(1).standard_normal(768)
    v /= np.linalg.norm(v)
    tuned = w + share * np.linalg.norm(w, 2) * np.outer(v, v)
    assert spectral.intruder_dimensions(w.T, tuned.T)["intruders"] == expected


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
def test_intruder_is_a_new_output_direction(shape):
    """A strong rank-1 update along (in: a, out: b) intrudes where b is new to the outputs, whatever a is."""
    d_in, d_out = shape
    u, v = orthogonal(d_in, 0), orthogonal(d_out, 1)
    n = min(shape) - 1
    base = (u[:, :n] * np.linspace(2, 1, n)) @ v[:, :n].T
    mixed = v[:, :n].sum(1) / np.sqrt(n)
    new_output = base + 50 * np.outer(u[:, 0], mixed)
    old_output = base + 50 * np.outer(u[:, :n].sum(1) / np.sqrt(n), v[:, 0])
    assert spectral.intruder_dimensions(base, new_output, k=1)["max_cosine"][0] < 0.5
    assert spectral.intruder_dimensions(base, old_output, k=1)["max_cosine"][0] > 0.99


def test_copies_have_no_intruders_even_with_equal_singular_values():
    for w in (gaussian((40, 30)), gaussian((30, 40)), np.eye(20, dtype=np.float32), np.zeros((5, 9), np.float32)):
        out = spectral.spectral(w, w.copy(), eps=0.99)
        assert out["intruders"] == 0 and (out["max_cosine"] == 1).all()
        for name in ("effective_rank", "stable_rank", "delta_norm", "delta_norm_relative", "delta_spectral_norm"):
            assert out[name] == 0, name


def test_counts_for_every_eps_and_k_come_from_one_call():
    base = gaussian((48, 32))
    tuned = base + gaussian((48, 32), seed=3, scale=0.2)
    cosine = spectral.intruder_dimensions(base, tuned, k=10)["max_cosine"]
    for k in (1, 4, 10):
        for eps in (0.2, 0.5, 0.8):
            direct = spectral.intruder_dimensions(base, tuned, k=k, eps=eps)["intruders"]
            assert spectral.count_intruders(cosine, k=k, eps=eps) == direct


@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_ranks_and_norms_of_a_known_delta(shape):
    sigma = np.array([4.0, 2.0, 1.0])
    u, v = orthogonal(shape[0], 2)[:, :3], orthogonal(shape[1], 3)[:, :3]
    base, share = gaussian(shape, 4), sigma / sigma.sum()
    out = spectral.spectral(np.zeros(shape, np.float32), ((u * sigma) @ v.T).astype(np.float32))
    assert out["effective_rank"] == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-4)
    assert out["stable_rank"] == pytest.approx(21 / 16, rel=1e-5)
    assert out["delta_norm"] == pytest.approx(np.sqrt(21), rel=1e-6)
    assert out["delta_spectral_norm"] == pytest.approx(4, rel=1e-6)
    assert np.isinf(out["delta_norm_relative"])
    relative = spectral.delta_norm(base, base * 1.5)["delta_norm_relative"]
    assert relative == pytest.approx(0.5, rel=1e-5)


def test_rank_deficient_base_falls_back_and_keeps_cosines_in_bounds():
    base = gaussian((10, 64))
    base[7:] = 0  # fewer directions than rows: W v / σ would divide by zero
    tuned = base.copy()
    tuned[8, 5] = 3.0
    out = spectral.intruder_dimensions(base, tuned)
    assert np.isfinite(out["max_cosine"]).all() and (out["max_cosine"] <= 1).all()
    exact = np.abs(np.linalg.svd(base.astype(np.float64), full_matrices=False)[2][:7] @ np.eye(64)[:, 5]).max()
    assert exact < 0.5 and out["singular_values"][0] == pytest.approx(np.linalg.norm(tuned, 2), rel=1e-6)


def test_batches_equal_single_matrices():
    base, tuned = gaussian((2, 3, 18, 12)), gaussian((2, 3, 18, 12), 1)
    out = spectral.spectral(base, tuned, k=4)
    assert out["intruders"].shape == (2, 3) and out["max_cosine"].shape == (2, 3, 4)
    single = spectral.spectral(base[1, 2], tuned[1, 2], k=4)
    for name, value in single.items():
        np.testing.assert_array_equal(out[name][1, 2], value)


def test_similarity_and_angles():
    v = orthogonal(20, 5)
    base = (orthogonal(30, 6)[:, :20] * np.linspace(3, 1, 20)) @ v.T
    order = [1, 0, *range(2, 20)]
    swapped = (orthogonal(30, 7)[:, :20] * np.linspace(3, 1, 20)) @ v[:, order].T
    cosine = spectral.similarity(base, swapped, top=3)["similarity"]
    np.testing.assert_allclose(cosine, [[0, 1, 0], [1, 0, 0], [0, 0, 1]], atol=1e-5)
    np.testing.assert_allclose(spectral.principal_angles(base, swapped, top=3)["angles"], 0, atol=1e-4)
    angles = spectral.principal_angles(base, swapped, top=1)["angles"]
    np.testing.assert_allclose(angles, [np.pi / 2], atol=1e-5)


def test_registered_and_separate_methods_agree_with_the_joint_one():
    base, tuned = gaussian((14, 9)), gaussian((14, 9), 1)
    joint = registry.call("analysis", "spectral", base, tuned, k=3, eps=0.7)
    for name in ("intruder_dimensions", "effective_rank", "stable_rank", "delta_norm"):
        hp = {"k": 3, "eps": 0.7} if name == "intruder_dimensions" else {}
        for key, value in registry.call("analysis", name, base, tuned, **hp).items():
            np.testing.assert_array_equal(joint[key], value)


def test_over_tree_and_bad_input():
    base = {"layers": {"attn": {"q": {"kernel": gaussian((2, 8, 8)), "bias": np.zeros((2, 8))}}}}
    tuned = {"layers": {"attn": {"q": {"kernel": gaussian((2, 8, 8), 1), "bias": np.zeros((2, 8))}}}}
    out = spectral.over_tree(spectral.spectral, base, tuned)
    assert list(out) == ["layers/attn/q/kernel"] and out["layers/attn/q/kernel"]["intruders"].shape == (2,)
    with pytest.raises(UserError, match="matches no leaf"):
        spectral.over_tree(spectral.spectral, base, tuned, include="nothing")
    with pytest.raises(UserError, match="one shape"):
        spectral.spectral(gaussian((3, 4)), gaussian((4, 3)))
    broken = gaussian((3, 4))
    broken[0, 0] = np.nan
    with pytest.raises(UserError, match="tuned matrix .* NaN"):
        spectral.spectral(gaussian((3, 4)), broken)
