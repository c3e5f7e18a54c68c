"""The fast and the certified counts against full factorisations, on every matrix of the demo models."""

import numpy as np
import pytest

from ft_jax import tree
from ft_jax.analysis import certify, spectral, topk
from ft_jax.io import hf
from ft_jax.kernels import LowRank

EPS = (0.25, 0.5, 0.75)
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    # Before the model is taken from the real cache: only base vectors go elsewhere.
    folder = tmp_path_factory.mktemp("svd")
    monkeypatch.setattr("ft_jax.analysis.svd_cache.folder", lambda: folder)


def matrices(params):
    flat = tree.flatten(params)
    return {p: np.asarray(w, np.float32) for p, w in flat.items() if "layers/" in p and p.endswith("/kernel")}


def low_rank(base, rank, seed=0):
    """LoRA-like changes whose σ run from 1.3 to 0.2 of the matrix's own largest, layer by layer at other strengths."""
    rng, out = np.random.default_rng(seed), {}
    for path, w in base.items():
        layers, d_in, d_out = w.shape
        edge = np.array([np.linalg.norm(x, 2) for x in w]) * rng.uniform(0.2, 1.2, layers)
        a = rng.standard_normal((layers, d_in, rank)) / np.sqrt(d_in) * np.geomspace(1.3, 0.2, rank)
        b = rng.standard_normal((layers, rank, d_out)) / np.sqrt(d_out)
        out[path] = LowRank(w, a.astype(np.float32), b.astype(np.float32), edge.astype(np.float32))
    return out


def dense(base, share, seed=0):
    rng = np.random.default_rng(seed)
    return {p: (w + share * np.std(w) * rng.standard_normal(w.shape)).astype(np.float32) for p, w in base.items()}


def assert_same_counts(base, tuned, certified):
    """Counts at several ε; returns how many intruders there are at 0.5 and how many matrices fell back."""
    total, fell = 0, 0
    for path, w in base.items():
        whole = np.asarray(tuned[path].dense() if isinstance(tuned[path], LowRank) else tuned[path])
        want = spectral.intruder_dimensions(w, whole)["max_cosine"]
        fast = topk.intruders(w, tuned[path], sweep=EPS)
        for eps in EPS:
            counts = spectral.count_intruders(want, eps=eps)
            np.testing.assert_array_equal(spectral.count_intruders(fast["max_cosine"], eps=eps), counts, err_msg=path)
        np.testing.assert_allclose(fast["max_cosine"], want, atol=1.1e-3, err_msg=path)
        total, fell = total + int(fast["intruders"].sum()), fell + int(fast["fell_back"].sum())
        for i in range(certified and len(w)):
            pair = (w[i], LowRank(*(np.asarray(x)[i] for x in (tuned[path].base, tuned[path].a, tuned[path].b, tuned[path].scale)))
                    if isinstance(tuned[path], LowRank) else whole[i])  # fmt: skip
            assert certify.intruders(*pair)["intruders"] == (want[i] < 0.5).sum(), (path, i)
    return total, fell


@pytest.mark.parametrize("name,rank", [("minilm", 1), ("minilm", 8), ("smollm2", 1)])
def test_low_rank_changes(real_model, name, rank):
    _, params, *_ = hf.load(real_model(name))
    base = matrices(params)
    total, fell = assert_same_counts(base, low_rank(base, rank), certified=name == "minilm")
    assert total > len(base) and fell <= 0.05 * sum(len(w) for w in base.values())


@pytest.mark.parametrize("name,share", [("minilm", 0.02), ("minilm", 0.5), ("smollm2", 0.1)])
def test_dense_changes(real_model, name, share):
    _, params, *_ = hf.load(real_model(name))
    base = matrices(params)
    _, fell = assert_same_counts(base, dense(base, share), certified=name == "minilm")
    assert fell <= 0.05 * sum(len(w) for w in base.values())
