"""Differential privacy: the noise of an update, and what a run spends beside published figures and a closed form."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ft_jax import registry, updates
from ft_jax.errors import UserError


def test_dp_noise_is_of_the_size_it_says_and_new_every_step():
    params = {"w": jnp.zeros((200, 200)), "v": jnp.zeros(10_000)}
    tx = registry.call("update", "dp_sgd", learning_rate=1.0, max_norm=0.5, noise=3.0)
    zero = lambda fn: (fn(jax.tree.map(jnp.zeros_like, params)), 16)  # noqa: E731
    first, state = tx.update(params, tx.init(params), params, each=zero)
    second, _ = tx.update(params, state, params, each=zero)
    again, _ = tx.update(params, tx.init(params), params, each=zero)
    for name in params:
        assert float(first[name].std()) == pytest.approx(3.0 * 0.5 / 16, rel=0.05)
        assert abs(float(jnp.mean(first[name] * second[name]))) < 0.05 * (1.5 / 16) ** 2
        np.testing.assert_array_equal(first[name], again[name])
    assert abs(float(jnp.corrcoef(first["w"].ravel()[:10_000], first["v"])[0, 1])) < 0.05


@pytest.mark.parametrize(
    "noise, epochs, published", [(1.3, 15, 1.19), (1.1, 60, 3.0), (0.7, 45, 7.0)]
)  # MNIST, batches of 256 of 60,000, delta 1e-5: TensorFlow Privacy's tutorial, whose accountant was a little looser
def test_epsilon_is_the_published_one(noise, epochs, published):
    found = updates.epsilon(noise, 256, 60_000, round(epochs * 60_000 / 256), 1e-5)
    assert 0.8 * published < found <= 1.03 * published


def test_epsilon_of_whole_batches_is_below_the_closed_form():
    """q = 1: Rényi divergence of order a is a T / (2 noise²), so ε <= min over a of that + log(1/delta) / (a - 1)."""
    noise, steps, delta = 4.0, 10, 1e-5
    orders = np.arange(1.01, 200, 0.01)
    bound = (orders * steps / (2 * noise**2) + np.log(1 / delta) / (orders - 1)).min()
    found = updates.epsilon(noise, 100, 100, steps, delta)
    assert 0.75 * bound < found <= bound
    assert updates.epsilon(0, 1, 2, 1) == float("inf")
    with pytest.raises(UserError, match="a batch of 3 cannot be drawn from 2"):
        updates.epsilon(1.0, 3, 2, 1)


def test_what_a_private_run_spent_is_in_its_summary():
    assert updates.spent({"name": "adamw", "hp": {}}, 8, 100, 10) == {}
    found = updates.spent({"name": "dp_adamw", "hp": {"noise": 2.0}}, 8, 100, 10)
    assert found == {"epsilon": updates.epsilon(2.0, 8, 100, 10, 0.01), "delta": 0.01}
    json.dumps(updates.spent({"name": "dp_sgd", "hp": {"noise": 0.0}}, 8, 100, 10), allow_nan=False)
