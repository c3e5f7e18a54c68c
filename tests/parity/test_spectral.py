"""Intruder counts against a torch re-statement of the published loop."""

import numpy as np
import pytest
import torch

from ft_jax.analysis import spectral


def published_loop(w0, w, k):
    """Economy SVD of both ``[out, in]`` weights; best absolute cosine of each top-k left vector with any base one."""
    base_left, _, _ = torch.linalg.svd(torch.from_numpy(w0), full_matrices=False)
    tuned_left, _, _ = torch.linalg.svd(torch.from_numpy(w), full_matrices=False)
    return [max((base_left.T @ tuned_left[:, j]).abs().tolist()) for j in range(k)]


LARGE = [pytest.param(shape, marks=pytest.mark.slow) for shape in ((3072, 768), (768, 3072), (768, 768))]


@pytest.mark.parametrize("out_in", [*LARGE, (384, 96), (96, 384)])
def test_same_counts_as_the_published_loop(out_in):
    rng = np.random.default_rng(sum(out_in))
    # A decaying spectrum like a trained network's, so that single vectors are well determined in float32.
    n = min(out_in)
    left, right = (np.linalg.qr(rng.standard_normal((d, n)))[0] for d in out_in)
    w0 = ((left * np.geomspace(10, 0.1, n)) @ right.T).astype(np.float32)
    u, v = (rng.standard_normal((d, 8)) / np.sqrt(d) for d in out_in)
    w = (w0 + (u * np.linspace(0.2, 15, 8)) @ v.T).astype(np.float32)
    ours = spectral.intruder_dimensions(w0.T, w.T)["max_cosine"]
    cosine = published_loop(w0, w, 10)
    counts = set()
    for eps in (0.3, 0.5, 0.7, 0.9, 0.99):
        count = sum(c < eps for c in cosine)
        assert spectral.count_intruders(ours, eps=eps) == count
        counts.add(count)
    np.testing.assert_allclose(ours, cosine, atol=1e-4)
    assert len(counts) > 2  # the case separates the thresholds
