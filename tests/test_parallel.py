"""Sharding on eight virtual devices: the rules, the mesh, and the same losses whatever the mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ft_jax import kernels, parallel, registry, train, tree, updates
from ft_jax.errors import UserError
from tests.helpers import assert_trees_close, make_batch, make_model, make_objective, make_params

# data, fsdp, tensor, sequence
MESHES = {"1 device": (1, 1, 1, 1), "8 data": (8, 1, 1, 1), "8 fsdp": (1, 8, 1, 1), "2x2x2": (2, 2, 2, 1), "sequence": (1, 2, 2, 2)}
STEPS = 6
# task -> (family, objective, kernel rules)
TASKS = {
    "encoder, full, classification": ("bert", "classification", ()),
    "decoder, LoRA, causal LM": ("llama", "causal_lm", ((r"layers/.*/kernel", "lora(rank=4)"),)),
}


@functools.cache
def outcome(task, mesh_name):
    """(losses of STEPS steps, trained leaves as numpy, their shardings, shardings of the frozen leaves)."""
    family, name, rules = TASKS[task]
    mesh = parallel.make_mesh(*MESHES[mesh_name])
    model = dataclasses.replace(make_model(family, num_hidden_layers=2), mesh=mesh)
    params = kernels.adapt(make_params(model), rules, jax.random.key(1))
    mask = registry.call("mask", "rules", params, 0)
    trainable, frozen = tree.split(parallel.shard(params, mesh), mask)
    tx, _ = updates.build("adamw", learning_rate=3e-3, steps=STEPS, clip=1.0)
    opt_state = parallel.shard(jax.jit(tx.init)(trainable), mesh)
    state = train.TrainState(parallel.shard(jnp.asarray(0), mesh), trainable, opt_state)
    kept = (jax.tree.map(lambda x: x.sharding, state), None)
    step = train.make_step(make_objective(name, model, dropout=True), tx, 1, seed=0)
    step = jax.jit(step, donate_argnums=0, out_shardings=kept)
    losses = []
    for i in range(STEPS):
        state, metrics = step(state, frozen, parallel.shard_batch(make_batch(model, 8, 8, seed=i), mesh))
        losses.append(float(metrics["loss"]))
    assert step._cache_size() == 1, "one compilation for all steps"
    shardings = [{p: x.sharding for p, x in tree.flatten(t).items()} for t in (state.trainable, frozen)]
    return np.asarray(losses), jax.tree.map(np.asarray, state.trainable), *shardings


# A fast run takes the mesh that is all of them in one; the others show which is wrong.
@pytest.mark.parametrize("mesh_name, task", [
    (m, t) if m == "2x2x2" and "LoRA" in t else pytest.param(m, t, marks=pytest.mark.slow) for m in list(MESHES)[1:] for t in TASKS])  # fmt: skip
def test_losses_are_the_same_on_every_mesh(mesh_name, task):
    alone, trained, *_ = outcome(task, "1 device")
    losses, again, trainable, frozen = outcome(task, mesh_name)
    assert np.abs(np.diff(alone)).min() > 1e-3, "the run must move"
    np.testing.assert_allclose(losses, alone, rtol=0, atol=1e-5)
    # a key's bias cancels in the softmax: its gradient is rounding alone, which Adam blows up
    sides = [{p: x for p, x in tree.flatten(t).items() if p != "layers/attn/k/bias"} for t in (again, trained)]
    assert_trees_close(*sides, rtol=0, atol=1e-4)

    data, fsdp, tensor, sequence = MESHES[mesh_name]  # after all steps the weights are still cut up
    assert {len(s.device_set) for s in (trainable | frozen).values()} == {data * fsdp * tensor * sequence}
    lora = "LoRA" in task
    matrix = frozen["layers/mlp/up/kernel/base"] if lora else trainable["layers/mlp/up/kernel"]
    assert sharding_share(matrix, (2, 32, 48)) == 1 / (fsdp * tensor)
    if lora:
        assert sharding_share(trainable["layers/mlp/up/kernel/a"], (2, 32, 4)) == 1 / fsdp
        assert sharding_share(trainable["layers/mlp/up/kernel/b"], (2, 4, 48)) == 1 / tensor


def sharding_share(sharding, shape):
    """The part of an array that one device holds."""
    return np.prod(sharding.shard_shape(shape)) / np.prod(shape)


MESH = parallel.make_mesh(2, 2, 2)


@pytest.mark.parametrize(
    "path, shape, expected",
    [
        ("layers/attn/q/kernel", (3, 32, 32), P(None, "fsdp", "tensor")),
        ("frozen_layers/attn/q/kernel", (3, 32, 32), P(None, "fsdp", "tensor")),
        ("layers/attn/out/kernel", (3, 32, 32), P(None, "tensor", "fsdp")),
        ("layers/mlp/gate/kernel", (32, 64), P("fsdp", "tensor")),
        ("layers/mlp/down/kernel", (3, 64, 32), P(None, "tensor", "fsdp")),
        ("layers/mlp/up/bias", (3, 64), P(None, "tensor")),
        ("layers/mlp/down/bias", (3, 32), P()),
        ("layers/attn_norm/scale", (3, 32), P()),
        ("embed/tokens/embedding", (64, 32), P("tensor", "fsdp")),
        ("head/kernel", (32, 64), P("fsdp", "tensor")),
        ("pooler/kernel", (32, 32), P("fsdp", None)),
        # what does not divide stays whole
        ("layers/attn/q/kernel", (3, 31, 32), P(None, None, "tensor")),
        ("head/kernel", (32, 3), P("fsdp", None)),
        # a kernel's fields inherit from the weight, nested ones too
        ("layers/attn/q/kernel/base", (3, 32, 32), P(None, "fsdp", "tensor")),
        ("layers/attn/q/kernel/a", (3, 32, 4), P(None, "fsdp", None)),
        ("layers/attn/q/kernel/b", (3, 4, 32), P(None, None, "tensor")),
        ("layers/attn/out/kernel/a", (3, 32, 4), P(None, "tensor", None)),
        ("layers/attn/out/kernel/b", (3, 4, 32), P(None, None, "fsdp")),
        ("layers/attn/out/kernel/base/base", (3, 32, 32), P(None, "tensor", "fsdp")),
        ("layers/attn/out/kernel/base/a", (3, 32, 4), P(None, "tensor", None)),
        ("layers/attn/q/kernel/scale", (3,), P()),
        # optimiser states follow the leaf they belong to
        ("0/mu/layers/attn/q/kernel/a", (3, 32, 4), P(None, "fsdp", None)),
        ("1/0/nu/layers/mlp/down/kernel", (3, 64, 32), P(None, "tensor", "fsdp")),
        ("0/count", (), P()),
    ],
)
def test_spec_of(path, shape, expected):
    found = parallel.spec_of(path, shape, MESH)
    strip = [tuple(p)[: max((i + 1 for i, a in enumerate(p) if a), default=0)] for p in (found, expected)]
    assert strip[0] == strip[1]


@pytest.mark.parametrize(
    "sizes, shape",
    [({}, (8, 1, 1, 1)), ({"fsdp": 4}, (2, 4, 1, 1)), ({"data": 1, "tensor": -1}, (1, 1, 1, 8)), ({"data": 2}, (2, 1, 1, 1)),
     ({"sequence": 4}, (2, 1, 4, 1))],
)
def test_make_mesh_fills_what_is_left(sizes, shape):
    mesh = parallel.make_mesh(**sizes)
    assert mesh.axis_names == parallel.AXES and mesh.devices.shape == shape


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"fsdp": 3}, "does not fit 8 devices"),
        ({"fsdp": 16}, "does not fit 8 devices"),
        ({"data": 4, "fsdp": 4}, "does not fit 8 devices"),
        ({"data": -1, "fsdp": -1}, "mesh sizes are positive, at most one of them -1"),
        ({"tensor": 0}, "mesh sizes are positive"),
        ({"data": -2}, "mesh sizes are positive"),
    ],
)
def test_a_mesh_that_does_not_fit(sizes, message):
    with pytest.raises(UserError, match=message):
        parallel.make_mesh(**sizes)


def test_batches_are_split_over_data_and_fsdp():
    batch = {"input_ids": np.arange(16).reshape(8, 2), "label": np.arange(8)}
    out = parallel.shard_batch(batch, MESH)
    for key, value in batch.items():
        np.testing.assert_array_equal(out[key], value)
        assert {s.data.shape[0] for s in out[key].addressable_shards} == {2}
    parallel.check_batch(8, MESH)
    with pytest.raises(UserError, match="batch_size 6 is not a multiple of data x fsdp = 4; nearest: 8"):
        parallel.check_batch(6, MESH)
