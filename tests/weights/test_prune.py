"""Pruning by first-order importance and by movement: what is scored, what is cut, what is said of bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ft_jax import registry, tree
from ft_jax.errors import UserError
from ft_jax.weights import prune
from tests import helpers


def small(seed=0):
    rng = np.random.default_rng(seed)
    return {"layers": {"up": {"kernel": jnp.asarray(rng.standard_normal((2, 3, 4)), jnp.float32)},
                       "down": {"kernel": jnp.asarray(rng.standard_normal((2, 4, 3)), jnp.float32), "bias": jnp.ones((2, 3))}},
            "head": {"kernel": jnp.ones((3, 2))}}  # fmt: skip


@pytest.mark.slow
def test_first_order_scores_tell_the_fall_of_the_loss():
    model = helpers.make_model("llama")
    params, batch = helpers.make_params(model), helpers.make_batch(model)
    run = helpers.make_objective("causal_lm", model)

    def loss(p):
        return run(p, batch, None)[0]

    grads = jax.grad(loss)(params)
    scores = prune.first_order(params, grads)
    assert set(scores) == {p for p in tree.flatten(params) if p.startswith("layers/") and p.endswith("/kernel")}
    for path in ("layers/mlp/down/kernel", "layers/attn/q/kernel"):
        shrunk = tree.map_with_path(lambda p, x, path=path: x * (1 - 1e-3) if p == path else x, params)
        np.testing.assert_allclose(float(loss(params) - loss(shrunk)), 1e-3 * scores[path].sum(), rtol=0.05, atol=1e-6)


def test_top_neurons_are_zeroed_columns_and_nothing_else_changes():
    params, grads = small(), small(1)
    scores = prune.of_units(prune.first_order(params, grads))
    flat = np.concatenate([s.reshape(-1) for s in scores.values()])
    out = tree.flatten(registry.call("edit", "prune_first_order", params, grads, count=3))
    zeroed = {path: np.asarray(out[path] == 0).all(-2) for path in scores}
    assert sum(z.sum() for z in zeroed.values()) == 3
    cut = np.concatenate([scores[p][z] for p, z in zeroed.items()])
    assert sorted(cut) == sorted(np.sort(flat)[-3:])
    for path, leaf in tree.flatten(params).items():
        kept = ~zeroed[path][..., None, :] if path in zeroed else True
        np.testing.assert_array_equal(np.where(kept, out[path], 0), np.where(kept, leaf, 0))
    np.testing.assert_array_equal(out["head/kernel"], params["head"]["kernel"])


def test_single_weights_and_none_at_all():
    params, grads = small(), small(1)
    out = tree.flatten(prune.prune_first_order(params, grads, count=5, unit="weight"))
    assert sum(int((x == 0).sum()) for x in out.values()) == 5
    helpers.assert_trees_close(prune.prune_first_order(params, grads, count=0), params)


def test_movement_finds_what_grew_away_from_zero():
    base = small()
    grown = tree.map_with_path(lambda p, x: x.at[1, :, 2].mul(3.0) if p == "layers/up/kernel" else x, base)
    shrunk = tree.map_with_path(lambda p, x: x * 0.5 if p == "layers/down/kernel" else x, grown)
    mask = prune.top(prune.of_units(prune.movement(base, shrunk)), 1)
    assert mask["layers/up/kernel"][1, 2] and sum(m.sum() for m in mask.values()) == 1
    out = registry.call("edit", "prune_movement", base, shrunk, count=1)
    assert (out["layers"]["up"]["kernel"][1, :, 2] == 0).all()
    np.testing.assert_array_equal(out["layers"]["down"]["kernel"], shrunk["layers"]["down"]["kernel"])


def test_random_units_are_drawn_by_the_seed():
    scores = prune.of_units(prune.first_order(small(), small(1)))
    first, again, other = (prune.random(scores, 6, np.random.default_rng(s)) for s in (3, 3, 4))
    assert sum(m.sum() for m in first.values()) == 6
    assert all((first[p] == again[p]).all() for p in first) and any((first[p] != other[p]).any() for p in first)


def test_bad_requests_say_what_is_wrong():
    params, grads = small(), small(1)
    other = tree.map_with_path(lambda p, x: x[:1] if p == "layers/up/kernel" else x, grads)
    for call, message in (
        (lambda: prune.prune_first_order(params, grads, count=99), "cannot prune 99 of 14 units"),
        (lambda: prune.prune_first_order(params, grads, unit="nuron"), "no unit called 'nuron'; nearest: 'neuron'"),
        (lambda: prune.prune_first_order(params, other), "differ at 'layers/up/kernel'"),
        (lambda: prune.prune_first_order(params, grads, eligible=((r"layers/.*/bias", True),)), "is no matrix and has no neurons"),
        (lambda: prune.prune_first_order(params, grads, eligible=((r"layer/.*", True),)), "matches no leaf"),
        (lambda: prune.apply(params, {"layers/up/kernl": np.zeros(4, bool)}), "no leaf 'layers/up/kernl'.*nearest"),
        (lambda: prune.apply(params, {"layers/up/kernel": np.zeros(4, bool)}), "neither weights nor neurons"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            call()
