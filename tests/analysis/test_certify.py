"""Certified counts against the full factorisation, and that the bounds enclose what they claim to enclose."""

import jax.numpy as jnp
import numpy as np
import pytest

from ft_jax.analysis import certify, change, lanczos, spectral
from ft_jax.errors import UserError
from ft_jax.kernels import LowRank

K = 5
SHAPES = [(260, 260), (240, 400), (400, 240)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FT_JAX_CACHE", str(tmp_path / "cache"))


def gaussian(shape, size=1.0, seed=0):
    return (size * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def factors(shape, sizes, seed=2):
    """A, B of a change with these singular values in units of the edge of a Gaussian matrix's spectrum."""
    rng, r = np.random.default_rng(seed), len(sizes)
    edge = np.sqrt(shape[0]) + np.sqrt(shape[1])
    a = np.linalg.qr(rng.standard_normal((shape[0], r)))[0] * (edge * np.asarray(sizes))
    return a.astype(np.float32), np.linalg.qr(rng.standard_normal((shape[1], r)))[0].T.astype(np.float32)


def same_as_reference(base, tuned, eps=(0.3, 0.5, 0.7), dense=None):
    want = spectral.intruder_dimensions(base, tuned if dense is None else dense, k=K)
    for e in eps:
        got = certify.intruders(base, tuned, k=K, eps=e)
        assert got["intruders"] == spectral.count_intruders(want["max_cosine"], k=K, eps=e)
        assert (got["lower"] <= want["max_cosine"] + 1e-5).all() and (want["max_cosine"] <= got["upper"] + 1e-5).all()
        assert (got["lower"] <= got["max_cosine"]).all() and (got["max_cosine"] <= got["upper"]).all()
        assert spectral.count_intruders(got["max_cosine"], k=K, eps=e) == got["intruders"]
        np.testing.assert_allclose(got["singular_values"], want["singular_values"], rtol=0.02)
    return certify.intruders(base, tuned, k=K)


@pytest.fixture
def no_full(monkeypatch):
    """Makes a full factorisation fail the test."""
    monkeypatch.setattr(certify, "_full", None)


@pytest.mark.parametrize("shape", SHAPES)
def test_gaussian_bases_need_no_full_factorisation(shape, no_full):
    base = gaussian(shape)
    a, b = factors(shape, [2.0, 1.4, 0.1])
    assert same_as_reference(base, base + a @ b, eps=(0.5,))["intruders"] == 2
    assert same_as_reference(base, base + gaussian(shape, 0.02, 1), eps=(0.5, 0.7))["intruders"] == 0
    assert same_as_reference(base, base.copy())["max_cosine"].tolist() == [1.0] * K
    kernel = LowRank(jnp.asarray(base), jnp.asarray(a), jnp.asarray(b), jnp.float32(0.9))
    assert same_as_reference(base, kernel, eps=(0.5,), dense=np.asarray(kernel.dense()))["intruders"] == 2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [0.3, 3.0])
def test_strong_changes_agree_at_every_threshold(shape, size):
    """Cosines of all sizes, some within the reach of a threshold."""
    base = gaussian(shape)
    same_as_reference(base, base + gaussian(shape, size, 1))
    a, b = factors(shape, np.linspace(0.3, 1, 12) * size)
    same_as_reference(base, base + a @ b)


def test_direction_of_the_base_s_own_interior_falls_back_and_is_no_intruder():
    """Neither end of the spectrum tells that u_1 is the 100th base vector: what bounds the rest must not say otherwise."""
    base = gaussian((260, 260))
    left, _ = spectral.left_vectors(base)
    tuned = base + 60 * np.outer(gaussian(260, 0.06, 4), left[100])
    out = same_as_reference(base, tuned.astype(np.float32))
    assert out["intruders"] == 0 and out["max_cosine"][0] > 0.9 and out["fell_back"] > 0


def test_degenerate_and_rank_deficient_bases():
    eye = np.eye(260, dtype=np.float32)
    same_as_reference(eye, eye + gaussian((260, 260), 0.01))
    low = gaussian((240, 30), 0.2) @ gaussian((30, 400), 0.2, 1)
    a, b = factors((240, 400), [1.5])
    same_as_reference(low, low + a @ b)
    same_as_reference(np.zeros((240, 400), np.float32), a @ b)
    same_as_reference(low, np.zeros_like(low))


def test_tiny_matrices_are_computed_in_full():
    base, tuned = gaussian((30, 20)), gaussian((30, 20), seed=1)
    assert same_as_reference(base, tuned)["fell_back"] == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_point_mass_is_never_under_the_true_mass(shape):
    base = gaussian(shape)
    left, sigma = spectral.left_vectors(base)
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((shape[1], 6))
    vectors[:, 1] += 0.6 * np.linalg.norm(vectors[:, 1]) * left[0]
    vectors[:, 2] += 2 * np.linalg.norm(vectors[:, 2]) * left[50]
    vectors[:, 3] = left[7] + left[90]
    vectors /= np.linalg.norm(vectors, axis=0)
    true = np.square(left @ vectors).max(axis=0)
    for steps in (4, 24):
        bound = certify.point_mass((base, None, None), vectors.astype(np.float32), steps, float(sigma[0]) ** 2 * 1.01)
        assert (bound >= true - 1e-4).all()
    if shape[1] <= shape[0]:  # else the null space carries mass at 0
        assert (bound[[0, 4, 5]] < 0.25).all()


def test_row_space_is_split_off_exactly():
    base = gaussian((240, 400))
    left, _ = spectral.left_vectors(base)
    vectors = gaussian((400, 3), seed=1)
    part, lost = certify._RowSpace(base).part(vectors)
    np.testing.assert_allclose(part, left.T @ (left @ vectors), atol=1e-4)
    assert lost < 1e-8


def test_bad_input_is_named():
    with pytest.raises(UserError, match="base matrix .* NaN"):
        certify.intruders(np.full((300, 300), np.nan, np.float32), np.ones((300, 300), np.float32))


@pytest.mark.parametrize("shape", SHAPES)
def test_change_without_all_singular_values(shape):
    base = gaussian(shape)
    for delta in (gaussian(shape, 0.1, 1), factors(shape, [1.0, 0.3])[0] @ factors(shape, [1.0, 0.3])[1]):
        tuned = base + delta
        exact, fast = change.change(base, tuned), change.change(base, tuned, exact=False)
        assert fast["effective_rank"] is None and exact["effective_rank"] > 1
        for name in ("stable_rank", "delta_norm", "delta_norm_relative", "delta_spectral_norm"):
            assert fast[name] == pytest.approx(exact[name], rel=0.01), name
            assert exact[name] == pytest.approx(float(spectral.spectral(base, tuned)[name]), rel=1e-5)
    same = change.change(base, base.copy(), exact=False)
    assert same["delta_norm"] == 0 and same["effective_rank"] == 0


def test_change_of_a_low_rank_kernel_comes_from_its_factors(monkeypatch):
    base = gaussian((300, 260))
    a, b = factors((300, 260), [1.0, 0.5, 0.2])
    kernel = LowRank(jnp.asarray(base), jnp.asarray(a), jnp.asarray(b), jnp.float32(2.0))
    want = change.change(base, np.asarray(kernel.dense()))
    monkeypatch.setattr(LowRank, "dense", None)
    got = change.change(base, kernel)
    for name, value in want.items():
        assert got[name] == pytest.approx(value, rel=1e-3), name


def test_rank_deficient_blocks_keep_the_basis_orthogonal():
    """A change of rank 3 uses up its Krylov space at once; what fills the basis then must stay outside of it."""
    a, b = factors((300, 260), [1.0, 0.5, 0.2])
    start = gaussian((260, 7))
    vectors = lanczos.top((a @ b, None, None), start, 1, tolerance=0.0, rounds=6)
    ritz = lanczos.polish((a @ b, None, None), vectors)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(7), atol=1e-5)
    assert ritz.values[0] == pytest.approx(np.linalg.norm(a @ b, 2) ** 2, rel=1e-5)
