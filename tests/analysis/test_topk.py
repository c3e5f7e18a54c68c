"""The fast count against the full factorisation: spikes, clusters, copies, low-rank kernels, the cache, fall-backs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ft_jax.analysis import lanczos, spectral, svd_cache, topk
from ft_jax.errors import UserError
from ft_jax.kernels import LowRank

K = 5
SHAPES = [(200, 200), (200, 280), (280, 200)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FT_JAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def no_fall_back(monkeypatch):
    """Makes a fall-back fail the test: what is returned came from the fast path."""
    monkeypatch.setattr(topk, "exact", None)


def decaying(shape, seed=0, power=0.5):
    rng, n = np.random.default_rng(seed), min(shape)
    u, v = (np.linalg.qr(rng.standard_normal((d, n)))[0] for d in shape)
    return ((u * np.arange(1.0, n + 1) ** -power) @ v.T).astype(np.float32)


def noise(shape, size, seed=1):
    return (size / np.sqrt(shape[0] * shape[1]) * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def factors(shape, sizes, seed=2):
    rng, r = np.random.default_rng(seed), len(sizes)
    a = np.linalg.qr(rng.standard_normal((shape[0], r)))[0] * sizes
    b = np.linalg.qr(rng.standard_normal((shape[1], r)))[0].T
    return a.astype(np.float32), b.astype(np.float32)


def same_as_reference(base, tuned, eps=(0.2, 0.5, 0.8), k=K, dense=None, **options):
    """Counts at every ε, cosines and singular values of `spectral`; returns the fast result at ε = 0.5."""
    want = spectral.intruder_dimensions(base, tuned if dense is None else dense, k=k)
    for e in eps:
        got = topk.intruders(base, tuned, k=k, eps=e, **options)
        np.testing.assert_array_equal(got["intruders"], spectral.count_intruders(want["max_cosine"], k=k, eps=e))
        assert (np.abs(got["max_cosine"] - want["max_cosine"]) <= got["cosine_error"] + 1e-5).all()
        np.testing.assert_allclose(got["singular_values"], want["singular_values"], rtol=1e-5, atol=1e-6 * want["singular_values"].max())
    assert got["cosine_error"].max() <= 1e-3
    return topk.intruders(base, tuned, k=k, **options)


@pytest.mark.parametrize("shape", SHAPES)
def test_dense_and_low_rank_changes(shape, no_fall_back):
    base = decaying(shape)
    a, b = factors(shape, np.linspace(0.3, 1.5, 3))
    assert same_as_reference(base, base + noise(shape, 0.3))["intruders"] == 0
    assert same_as_reference(base, base + a @ b)["intruders"] > 0
    gaussian = noise(shape, 100, seed=5)
    same_as_reference(gaussian, gaussian + noise(shape, 30, seed=6))


@pytest.mark.parametrize("rank", [1, 8])
def test_low_rank_kernel_is_never_made_dense(rank, no_fall_back, monkeypatch):
    shape = (2, 200, 280)
    base = np.stack([decaying(shape[1:], seed) for seed in (0, 1)])
    a, b = (np.stack(x) for x in zip(*(factors(shape[1:], np.linspace(0.5, 2, rank), seed) for seed in (3, 4))))
    kernel = LowRank(jnp.asarray(base), jnp.asarray(a), jnp.asarray(b), jnp.array([1.0, 0.25]))
    dense = np.asarray(kernel.dense())
    monkeypatch.setattr(LowRank, "dense", None)
    out = same_as_reference(base, kernel, dense=dense)
    assert out["intruders"].shape == (2,) and out["intruders"][0] > 0
    zero = kernel.replace(b=jnp.zeros_like(kernel.b))
    assert (topk.intruders(base, zero, k=K)["max_cosine"] == 1).all()


def test_spike_hidden_from_every_warm_direction_is_found(no_fall_back):
    """base and spike live in orthogonal blocks, so Krylov vectors of the base's directions never see the spike."""
    base = np.zeros((200, 300), np.float32)
    base[:199, :250] = decaying((199, 250))
    base[199, 260] = 0.01
    tuned = base.copy()
    tuned[199, 290] = 0.9  # σ2 of the base is 0.71
    out = same_as_reference(base, tuned, left=True)
    assert out["intruders"] == 1 and abs(out["left"][290, 1]) == pytest.approx(1, abs=1e-3)


def test_near_degenerate_top_values(no_fall_back):
    """Values 1e-5 apart: float32 residuals leave these vectors open, the float64 check settles them."""
    rng, shape = np.random.default_rng(0), (240, 220)
    u, v = (np.linalg.qr(rng.standard_normal((d, 220)))[0] for d in shape)
    sigma = np.linspace(0.5, 0.1, 220)
    sigma[:4] = 2, 2 - 2e-5, 1.5, 1.5 - 1e-4
    base = ((u * sigma) @ v.T).astype(np.float32)
    turned = v.copy()
    turned[:, :2] = v[:, :2] @ np.array([[0.8, -0.6], [0.6, 0.8]])
    tuned = ((u * sigma) @ turned.T).astype(np.float32)
    cosine = same_as_reference(base, tuned, eps=(0.5, 0.75, 0.85))["max_cosine"]
    np.testing.assert_allclose(cosine[:2], 0.8, atol=0.02)


def test_what_the_check_cannot_settle_falls_back():
    shape = (220, 220)
    degenerate = np.eye(220, dtype=np.float32)
    degenerate[3, 3] = 1 + 1e-6  # every other vector is free to turn: only the reference's own choice counts
    base = decaying(shape)
    assert topk.intruders(base, degenerate, k=K)["fell_back"]
    exact = spectral.intruder_dimensions(base, base + noise(shape, 0.3), k=K)["max_cosine"]
    on_edge = topk.intruders(base, base + noise(shape, 0.3), k=K, eps=float(exact[K - 1]))
    assert on_edge["fell_back"] and on_edge["intruders"] == (exact < exact[K - 1]).sum()


def test_null_directions_are_no_intruders():
    base = decaying((220, 200))
    low = (base[:, :3] @ base[:3, :]).astype(np.float32)  # rank 3 < k: directions 4 and 5 are rounding
    out = same_as_reference(base, low)
    assert (out["max_cosine"][3:] == 1).all() and (out["max_cosine"][:3] < 1).all()
    a, b = factors((220, 200), [1.0, 0.5])
    zero = np.zeros((220, 200), np.float32)
    same_as_reference(zero, LowRank(jnp.asarray(zero), jnp.asarray(a), jnp.asarray(b), jnp.float32(1)), dense=a @ b)


def test_rounds_that_do_not_converge_fall_back(monkeypatch):
    base, tuned = decaying((200, 200)), noise((200, 200), 1.0)
    assert not topk.intruders(base, tuned, k=K)["fell_back"]
    real = lanczos.top
    monkeypatch.setattr(lanczos, "top", lambda *x, **hp: real(*x, **(hp | {"rounds": 1})))
    assert same_as_reference(base, tuned)["fell_back"]


def test_copies_tiny_shapes_and_many_directions():
    base = decaying((2, 3, 200, 200)[2:])
    out = topk.intruders(base, base.copy(), k=K, eps=0.99, left=True)
    assert out["intruders"] == 0 and (out["max_cosine"] == 1).all() and not out["fell_back"]
    assert out["singular_values"][0] == pytest.approx(1, rel=1e-5) and out["left"].shape == (200, K)
    for shape, k in (((3, 5), 10), ((1, 7), 1), ((40, 30), 10), ((200, 210), 60)):
        small = np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32)
        other = np.random.default_rng(1).standard_normal((2, *shape)).astype(np.float32)
        out = same_as_reference(small, other, k=k)
        assert out["max_cosine"].shape == (2, min(k, *shape)) and not out["fell_back"].any()
    zero = np.zeros((200, 200), np.float32)
    assert topk.intruders(base, zero, k=K)["intruders"] == 0


def test_on_a_device_array_with_jax(no_fall_back):
    base = np.stack([decaying((200, 230), seed) for seed in (0, 1, 2)])
    tuned = base + np.stack([noise((200, 230), 0.3), np.zeros((200, 230)), a_b((200, 230))]).astype(np.float32)
    device = topk.intruders(base, jnp.asarray(tuned), k=K, xp=jnp)
    host = topk.intruders(base, tuned, k=K)
    np.testing.assert_array_equal(device["intruders"], host["intruders"])
    np.testing.assert_allclose(device["max_cosine"], host["max_cosine"], atol=1e-4)


def a_b(shape):
    a, b = factors(shape, [1.5, 1.2])
    return a @ b


def test_error_bounds_hold():
    """The bound is never under the true angle, isolated, clustered or unconverged."""
    rng = np.random.default_rng(0)
    for values in (np.geomspace(1, 0.01, 60), np.r_[1, 1 - 1e-6, np.geomspace(0.9, 0.1, 58)], rng.random(60)):
        values = np.sort(values)[::-1]
        w = np.diag(np.sqrt(values))
        for size in (1e-1, 1e-3, 1e-6):
            vectors = np.eye(60)[:, :15] + size * rng.standard_normal((60, 15))
            ritz = lanczos.polish((w, None, None), vectors)
            true = np.sqrt(1 - np.minimum(np.square(np.diagonal(ritz.vectors)[:10]), 1))
            bound = lanczos.angle_bounds(ritz.values, ritz.residuals, 10)
            assert (true <= bound + 1e-7).all()
        assert bound[4] < 0.5  # and says something


def test_bad_input_is_named():
    base = decaying((30, 20))
    with pytest.raises(UserError, match="one shape"):
        topk.intruders(base, base.T)
    broken = base.copy()
    broken[2, 2] = np.nan
    with pytest.raises(UserError, match="tuned matrix of shape .* NaN"):
        topk.intruders(base, broken)
    with pytest.raises(UserError, match="base matrix of shape .* NaN"):
        topk.intruders(broken, base)


def test_over_tree_takes_kernels():
    base = np.stack([decaying((200, 200)), decaying((200, 200), 1)])
    a, b = factors((200, 200), [2.0])
    kernel = LowRank(jnp.asarray(base), jnp.asarray(np.stack([a, a])), jnp.asarray(np.stack([b, 0 * b])), jnp.ones(2))
    plain = {"layers": {"attn": {"q": {"kernel": base, "bias": np.zeros((2, 200))}}}}
    tuned = {"layers": {"attn": {"q": {"kernel": kernel, "bias": np.zeros((2, 200))}}}}
    out = topk.over_tree(plain, tuned, k=K)
    assert list(out) == ["layers/attn/q/kernel"]
    np.testing.assert_array_equal(out["layers/attn/q/kernel"]["intruders"], [1, 0])
    with pytest.raises(UserError, match="matches no leaf"):
        topk.over_tree(plain, tuned, include="nothing")


def count_computed(monkeypatch):
    computed, real = [], spectral.left_vectors
    monkeypatch.setattr(spectral, "left_vectors", lambda w: computed.append(w.shape) or real(w))
    return computed


@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
def test_cache_hits_and_heals(shape, monkeypatch):
    computed, w = count_computed(monkeypatch), decaying(shape)
    vectors, sigma = svd_cache.left(w)
    assert vectors.shape == (40, shape[1]) and len(computed) == 1
    np.testing.assert_allclose(np.abs((vectors @ w.T) @ np.linalg.svd(w)[0][:, :40]), np.diag(sigma), atol=1e-5)
    again = svd_cache.left(w.copy())
    assert len(computed) == 1
    np.testing.assert_array_equal(again[0], vectors)
    svd_cache.left(np.asfortranarray(w))  # another layout is another key, not another result
    (path, *_) = sorted(svd_cache.folder().glob("*.safetensors"), key=lambda p: p.stat().st_mtime_ns)
    whole, found = path.read_bytes(), len(computed)
    held = load_file(path)
    for broken in (whole[: len(whole) // 2], b"", whole[:-4] + b"\0\0\0\1"):
        path.write_bytes(broken)
        np.testing.assert_array_equal(svd_cache.left(w)[0], vectors)
        assert len(computed) == (found := found + 1)
        np.testing.assert_array_equal(load_file(path)["left"], held["left"])
    save_file({"other": sigma}, path)
    np.testing.assert_array_equal(svd_cache.left(w)[0], vectors)


def test_cache_is_bounded(monkeypatch):
    monkeypatch.setenv("FT_JAX_SVD_CACHE_GB", "1e-4")  # 100 kB: two matrices of 100 x 100
    computed = count_computed(monkeypatch)
    first, second, third = (decaying((100, 100), seed) for seed in range(3))
    svd_cache.left(first), svd_cache.left(second), svd_cache.left(first), svd_cache.left(third)
    assert len(list(svd_cache.folder().iterdir())) == 2
    svd_cache.left(first)
    assert len(computed) == 3  # the second went, used longest ago
    svd_cache.left(second)
    assert len(computed) == 4
    monkeypatch.setenv("FT_JAX_SVD_CACHE_GB", "0")
    svd_cache.left(first)
    assert len(computed) == 5
    monkeypatch.setenv("FT_JAX_SVD_CACHE_GB", "much")
    with pytest.raises(UserError, match="FT_JAX_SVD_CACHE_GB='much'"):
        svd_cache.left(first)


def test_jax_arrays_as_base(no_fall_back):
    base = decaying((200, 200))
    out = topk.intruders(jax.device_put(base), jax.device_put(base + a_b((200, 200))), k=K)
    assert out["intruders"] == 2
