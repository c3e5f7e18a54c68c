"""Optimiser states in 8 bits: the code table, the bytes, and the steps beside a restatement in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ft_jax import registry, updates


def test_the_codes_of_eight_bits_are_the_published_table():
    """256 values; in the largest decade 2^6 bins a side where signed, 2^7 where not, one or two in the smallest."""
    signed, positive = updates.dynamic_codes(True), updates.dynamic_codes(False)
    assert len(signed) == len(set(signed)) == len(positive) == len(set(positive)) == 256
    assert positive[0] == 0 and signed[-1] == positive[-1] == 1 and signed.min() > -1
    np.testing.assert_array_equal(np.sort(-signed[signed < 0]), signed[(signed > 0) & (signed < 1)])
    assert ((signed > 0.1) & (signed < 1)).sum() == 64 and ((positive > 0.1) & (positive < 1)).sum() == 128
    np.testing.assert_allclose(signed[signed > 0][0], 0.55e-6, rtol=1e-6)
    np.testing.assert_allclose(positive[1:3], [0.325e-6, 0.775e-6], rtol=1e-6)


@pytest.mark.parametrize("signed", [True, False])
def test_the_place_of_a_number_is_that_of_its_nearest_code(signed):
    rng, codes = np.random.default_rng(0), updates.dynamic_codes(signed)
    x = np.concatenate([rng.uniform(0, 1, 5000), 10 ** rng.uniform(-9, 0, 5000), codes[codes >= 0], [1, 0, 1e-30]]).astype(np.float32)
    x = np.concatenate([x, -x]) if signed else x
    far = np.abs(x[:, None] - codes)
    lost = np.take_along_axis(far, np.asarray(updates._nearest(jnp.asarray(x), signed)).astype(int)[:, None], 1)[:, 0] - far.min(1)
    assert lost.max() <= 1e-7 and (lost > 0).mean() < 1e-3, "halfway between two codes either is near"


def coded(x, signed):
    """An array after quantisation in blocks of 256, in numpy."""
    values = updates.dynamic_codes(signed)
    blocks = np.pad(x.reshape(-1), (0, -x.size % 256)).reshape(-1, 256)
    scale = np.abs(blocks).max(1, keepdims=True)
    nearest = np.abs((blocks / np.maximum(scale, 1e-30))[..., None] - values).argmin(-1)
    return (values[nearest] * scale).reshape(-1)[: x.size].reshape(x.shape)


def adam(theta, curve, steps, eight, rate=1e-2, b1=0.9, b2=0.99, decay=0.1):
    """AdamW on a quadratic in numpy, its moments coded after every step or not."""
    m, v = np.zeros_like(theta), np.zeros_like(theta)
    for t in range(1, steps + 1):
        g = curve * theta
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        theta = theta - rate * (m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + 1e-8) + decay * theta)
        m, v = (coded(m, True), coded(v, False)) if eight else (m, v)
    return theta


def test_adamw_8bit_holds_two_bytes_a_weight_and_steps_as_in_numpy():
    rng = np.random.default_rng(0)
    start = {"big": rng.standard_normal((70, 100)), "small": rng.standard_normal(9)}
    curve = {n: rng.uniform(0.1, 2, x.shape) for n, x in start.items()}
    tx = registry.call("update", "adamw_8bit", learning_rate=1e-2, weight_decay=0.1, b2=0.99)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), start)
    state = tx.init(params)
    step = jax.jit(lambda p, s: tx.update(jax.tree.map(jnp.multiply, curve, p), s, p))
    for _ in range(20):
        moves, state = step(params, state)
        params = optax.apply_updates(params, moves)
    blocks = -(-7000 // updates.BLOCK)
    held = sum(x.nbytes for x in jax.tree.leaves(state))
    assert held == 2 * (blocks * updates.BLOCK + 4 * blocks + 4 * 9) + 4 and held < 0.28 * 8 * (7000 + 9)
    np.testing.assert_allclose(params["small"], adam(start["small"], curve["small"], 20, eight=False), rtol=0, atol=1e-5)
    whole, eight = (adam(start["big"], curve["big"], 20, eight=e) for e in (False, True))
    moved, lost = np.linalg.norm(whole - start["big"]), np.linalg.norm(eight - whole)
    assert np.linalg.norm(params["big"] - eight) < 0.1 * lost, "rounding to the other of two codes is rare"
    assert 0 < lost < 0.06 * moved
