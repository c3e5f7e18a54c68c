"""What every tap that extends the sequence promises, on an encoder with a classifier and on a decoder with its LM head."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from ft_jax import masks, parallel, registry, taps, tree
from ft_jax.io import runs, safetensors
from ft_jax.models import EXTENSIONS, SITES, Model
from tests.helpers import assert_trees_close, inputs, make_batch, make_model, make_params, step_flops

METHODS = {m.name: m for m in registry.methods("tap") if m.traits["sites"] in EXTENSIONS}
NAMES, FAMILIES = tuple(METHODS), ("bert", "llama")
ROWS, TOKENS, LENGTH, HIDDEN = 8, 7, 4, 6


def _features(c):
    return c.num_layers, c.num_kv_heads * c.head_dim


def _p_tuning(c):
    d = c.hidden_size
    return LENGTH * d + (d + 1) * HIDDEN + (HIDDEN + 1) * HIDDEN + (HIDDEN + 1) * d


def _recurrent(c):
    d, h = c.hidden_size, HIDDEN
    lstm = 2 * 4 * h * (d + h + 2) + 2 * 4 * h * (2 * h + h + 2)
    return LENGTH * d + lstm + (2 * h + 1) * 2 * h + (2 * h + 1) * d


def _projected(c):
    n, f = _features(c)
    return LENGTH * f + (f + 1) * HIDDEN + (HIDDEN + 1) * 2 * n * f


def _prefix(c):
    n, f = _features(c)
    return 2 * n * LENGTH * f


def _dept(c):
    return LENGTH * c.hidden_size + 16 * 2 + 2 * c.hidden_size


def _l2m(c):
    n, f = _features(c)
    return 3 * c.hidden_size + 3 * n * (2 * c.hidden_size * 2 + 2 * c.hidden_size + 2 * f)


def _l2m_scales(c):
    n, f = _features(c)
    return 3 * c.hidden_size + 3 * n * (2 * f + c.intermediate_size)


# The paper's count of trained weights: a method without one fails here.
COUNTS = {
    "prompt_tuning": lambda c: LENGTH * c.hidden_size, "p_tuning": _p_tuning, "prefix_tuning": _projected,
    "p_tuning_v2": _prefix, "l2m": _l2m, "dept": _dept,
    "ept": lambda c: _dept(c) + 4 * (2 * HIDDEN + 1) * c.hidden_size,
}  # fmt: skip
VARIANTS = {  # forms with weights of their own
    ("p_tuning", "encoder=lstm, layers=2"): _recurrent, ("prefix_tuning", "hidden=0"): _prefix, ("l2m", "form=ia3"): _l2m_scales,
}  # fmt: skip


def rule(name, more=""):
    """The method at this test's sizes."""
    known = METHODS[name].hyperparameters
    sizes = {k: v for k, v in {"length": LENGTH, "hidden": HIDDEN}.items() if k in known and f"{k}=" not in more}
    hp = {**METHODS[name].traits["fit"], **sizes}
    return f"{name}({', '.join([*(f'{k}={v}' for k, v in hp.items()), *filter(None, [more])])})"


def put(model, params, name, more="", seed=0):
    return taps.attach(model, params, [(METHODS[name].traits["sites"], rule(name, more))], jax.random.key(seed))


@functools.cache
def setting(family):
    model = make_model(family)
    return model, make_params(model), make_batch(model, rows=ROWS, length=TOKENS)


def trained(params):
    """The trainable half, moved away from its start, and the frozen one."""
    trainable, frozen = tree.split(params, masks.declared(params, 0))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + jnp.asarray(0.1 * rng.standard_normal(x.shape), x.dtype), trainable), frozen


def loss_of(model):
    def loss(trainable, frozen, batch):
        out = model.apply(tree.join(trainable, frozen), inputs(batch)).astype(jnp.float32)
        return (jnp.square(out - 1) * (batch["attention_mask"][..., None] if out.ndim == 3 else 1)).mean()

    return loss


@functools.cache
def plain(family):
    model, params, batch = setting(family)
    return jax.jit(lambda p, b: model.apply(p, b, capture=SITES))(params, inputs(batch))


# Every method on one kind of model in a fast run, on both in a whole one.
EVERY = [pytest.param(name, family, marks=() if (i + j) % 2 else pytest.mark.slow)
         for i, name in enumerate(NAMES) for j, family in enumerate(FAMILIES)]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name, family", EVERY)
def test_shapes_start_counts_and_learning(name, family):
    """Output and captures keep the caller's shape; what is declared trains, all of it, as many as the paper says; the loss falls."""
    model, params, batch = setting(family)
    before, captured = plain(family)
    tapped = put(model, params, name)
    assert set(tree.flatten(params)) < set(tree.flatten(tapped)), "attach leaves the tree it was given alone"
    after, seen = jax.jit(lambda p, b: model.apply(p, b, capture=SITES))(tapped, inputs(batch))
    assert {s: x.shape for s, x in seen.items()} == {s: x.shape for s, x in captured.items()} and after.shape == before.shape
    moved = float(jnp.abs(after - before).max())
    assert moved > 1e-3 if METHODS[name].traits["start"] == "moved" else moved < 1e-5

    trainable, frozen = tree.split(tapped, masks.declared(tapped, 0))
    site = METHODS[name].traits["sites"]
    tap = tapped["taps"][site]
    assert {p.split("/")[2] for p in tree.flatten(trainable)} == {f for f in tap.trainable if jax.tree.leaves(getattr(tap, f))}
    assert all(p.startswith(f"taps/{site}/") for p in tree.flatten(trainable))
    assert tree.count(trainable) == COUNTS[name](model.config)
    values, grads = learn(model, trainable, frozen, batch)
    assert values[-1] < 0.95 * values[0], values
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads)), {p: float(np.abs(g).max()) for p, g in tree.flatten(grads).items()}


def learn(model, trainable, frozen, batch, steps=15):
    """Losses of some steps of Adam, and the last gradient."""
    tx = optax.adam(0.02)

    @jax.jit
    def step(trainable, state):
        value, grads = jax.value_and_grad(loss_of(model))(trainable, frozen, batch)
        moves, state = tx.update(grads, state)
        return optax.apply_updates(trainable, moves), state, value, grads

    state, values = tx.init(trainable), []
    for _ in range(steps):
        trainable, state, value, grads = step(trainable, state)
        values.append(float(value))
    return values, grads


@pytest.mark.parametrize("name, more", VARIANTS)
def test_counts_of_variants(name, more):
    model, params, batch = setting("llama")
    tapped = put(model, params, name, more)
    trainable, _ = tree.split(tapped, masks.declared(tapped, 0))
    assert tree.count(trainable) == VARIANTS[name, more](model.config)
    values, grads = learn(model, *trained(tapped), batch)
    assert values[-1] < values[0] and all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("name", [n if n == "prefix_tuning" else pytest.param(n, marks=pytest.mark.slow)
                                  for n in NAMES])  # fmt: skip
def test_jit_remat_vmap_sharding_and_bfloat16(name):
    """The same loss and gradients, and in bfloat16 nearly the same loss."""
    model, params, batch = setting("llama")
    params = jax.tree.map(lambda x: x * 0.5, params)
    trainable, frozen = trained(put(model, params, name))
    step = jax.value_and_grad(loss_of(model))
    expected = jax.jit(step)(trainable, frozen, batch)
    mesh = parallel.make_mesh(2, 2, 2)
    spread = [parallel.shard(t, mesh) for t in (trainable, frozen)]
    others = {
        "remat": jax.jit(jax.value_and_grad(loss_of(Model(model.config, remat="full"))))(trainable, frozen, batch),
        "vmap": jax.tree.map(lambda x: x[1], jax.jit(jax.vmap(step, (0, None, None)))(
            jax.tree.map(lambda x: jnp.stack([x + 1, x]), trainable), frozen, batch)),
        "sharded": jax.jit(step)(*spread, parallel.shard_batch(batch, mesh)),
    }  # fmt: skip
    for value, grads in others.values():
        np.testing.assert_allclose(value, expected[0], rtol=1e-5)
        assert_trees_close(grads, expected[1], rtol=1e-3, atol=1e-5 * float(optax.global_norm(expected[1])))
    half = jax.jit(loss_of(Model(model.config, dtype="bfloat16")))(trainable, frozen, batch)
    np.testing.assert_allclose(half, expected[0], rtol=0.05)


@functools.cache
def full_flops(family):
    """Of a full step over as many more tokens, as it goes into XLA."""
    model, params, _ = setting(family)
    longer = make_batch(model, rows=ROWS, length=TOKENS + LENGTH)
    return step_flops(functools.partial(_squares, model), params, jax.tree.map(lambda _: True, params), longer, compiled=False)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_a_step_costs_no_more_than_full_fine_tuning_of_as_many_positions(name, family):
    model, params, batch = setting(family)
    tapped = put(model, params, name)
    own = step_flops(functools.partial(_squares, model), tapped, masks.declared(tapped, 0), batch, compiled=False)
    assert own < full_flops(family), f"{own / full_flops(family):.3f}"


def _squares(model, params, batch):
    return jnp.square(model.apply(params, inputs(batch)).astype(jnp.float32) - 1).mean()


def test_checkpoints_give_every_tap_back_bit_for_bit(tmp_path):
    """Orbax as runs use it, the frozen half rebuilt from its rule and seed, and safetensors by flat names."""
    model, params, _ = setting("llama")
    made = {name: trained(put(model, params, name)) for name in NAMES}
    items = {name: halves[0] for name, halves in made.items()}
    run = runs.Run(tmp_path / "run", {}, tensorboard=False)
    run.save("checkpoints", 1, items, {})
    _, found, _ = run.restore("checkpoints", jax.tree.map(jnp.zeros_like, items))
    run.close()
    for name, (trainable, frozen) in made.items():
        assert_trees_close(found[name], trainable, rtol=0)
        rebuilt = put(model, params, name)
        again = tree.split(rebuilt, masks.declared(rebuilt, 0))[1]
        assert_trees_close(again, frozen, rtol=0)
        whole = tree.flatten(tree.join(trainable, frozen)["taps"])
        safetensors.save(tmp_path / name, whole.items())
        read = load_file(tmp_path / name / "model.safetensors")
        for path, leaf in whole.items():
            np.testing.assert_array_equal(read[path], leaf, err_msg=path)


@pytest.mark.parametrize("name", NAMES)
def test_draws_follow_the_seed(name):
    model, params, _ = setting("llama")
    first, again, other = (put(model, params, name, seed=s)["taps"] for s in (0, 0, 1))
    assert_trees_close(first, again, rtol=0)
    assert any(not np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (first, other)), strict=True))
