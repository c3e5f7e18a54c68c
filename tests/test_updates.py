"""Optimisers go downhill, schedules follow their closed forms, and a step is the same however it is cut up."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ft_jax import kernels, registry, train, tree, updates
from ft_jax.errors import UserError
from ft_jax.io import hf
from tests import gate_trees
from tests.helpers import assert_trees_close, make_batch, make_model, make_objective, make_params

# drift needs another model, adalora_adamw its kernels, cofitune_soft scores: see below and test_allocation.py
UPDATES = [m.name for m in registry.methods("update") if m.name not in ("drift", "adalora_adamw", "cofitune_soft")]
START = {"a": jnp.linspace(-1, 1, 6).reshape(2, 3), "frozen": None, "w": {"b": jnp.asarray([[2.0], [-3.0]])}}
CURVES = {"a": jnp.linspace(0.5, 4, 6).reshape(2, 3), "frozen": None, "w": {"b": jnp.asarray([[1.0], [0.2]])}}
EXAMPLES = 64


def quadratic(params):
    return sum(jnp.sum(d * x**2) for d, x in zip(jax.tree.leaves(CURVES), jax.tree.leaves(params))) / 2


def run(tx, steps, params=START):
    """Losses before each step and after the last one, and the last parameters."""

    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(quadratic)(params)

        def each(fn):  # as many examples of one kind, so that their mean is the gradient
            return jax.tree.map(lambda g: EXAMPLES * g, fn(grads)), EXAMPLES

        moves, state = tx.update(grads, state, params, grad_fn=lambda p, i: jax.grad(quadratic)(p), each=each,
                              outputs=dict)  # fmt: skip
        return optax.apply_updates(params, moves), state, loss

    state, losses = tx.init(params), []
    for _ in range(steps):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    return [*losses, float(quadratic(params))], params


@pytest.mark.parametrize("name", UPDATES)
def test_every_update_goes_downhill_and_knows_nothing_of_frozen_leaves(name):
    losses, params = run(registry.call("update", name, learning_rate=1e-2), 60)
    assert losses[1] < losses[0] and losses[-1] < 0.95 * losses[0], losses
    assert all(np.isfinite(losses))
    assert params["frozen"] is None
    default, _ = run(registry.call("update", name), 20)
    assert default[-1] < default[0], "the default learning rate moves too"


@pytest.mark.parametrize("name", UPDATES)
def test_every_update_follows_a_schedule(name):
    tx = registry.call("update", name, learning_rate=lambda step: jnp.where(step < 2, 0.0, 1e-2))
    losses, _ = run(tx, 4)
    assert losses[0] == losses[1] == losses[2] > losses[3] > losses[4]


GRAD, PARAM = np.asarray([0.3, -2.0, 1e-3]), np.asarray([1.0, -0.5, 2.0])
FIRST = {  # first move with learning rate 0.1 on gradient GRAD at PARAM
    "sgd": ({"momentum": 0.9, "weight_decay": 0.1}, -0.1 * (GRAD + 0.1 * PARAM)),
    "adamw": ({"weight_decay": 0.1}, -0.1 * (GRAD / (np.abs(GRAD) + 1e-8) + 0.1 * PARAM)),
    "lion": ({"weight_decay": 0.1}, -0.1 * (np.sign(GRAD) + 0.1 * PARAM)),
}


@pytest.mark.parametrize("name", FIRST)
def test_the_first_move_is_the_closed_form(name):
    hp, expected = FIRST[name]
    tx = registry.call("update", name, learning_rate=0.1, **hp)
    moves, _ = tx.update(jnp.asarray(GRAD), tx.init(jnp.asarray(PARAM)), jnp.asarray(PARAM))
    np.testing.assert_allclose(moves, expected, rtol=1e-5)


LOW_RANK = {"w": {"kernel": {"a": jnp.asarray([1.0, -0.5, 2.0]), "b": jnp.asarray([1.0, -0.5, 2.0])}}}


def test_lora_plus_is_adamw_with_a_faster_b():
    """A moves as AdamW moves it, B ``ratio`` times as far, decay included; without any B it is refused."""
    hp = {"learning_rate": 0.1, "weight_decay": 0.1}
    one = registry.call("update", "adamw", **hp)
    grads = jax.tree.map(lambda _: jnp.asarray(GRAD), LOW_RANK)
    plain, _ = one.update(grads, one.init(LOW_RANK), LOW_RANK)
    for ratio in (1.0, 16.0):
        tx = registry.call("update", "lora_plus", **hp, ratio=ratio)
        moves, _ = tx.update(grads, tx.init(LOW_RANK), LOW_RANK)
        np.testing.assert_array_equal(moves["w"]["kernel"]["a"], plain["w"]["kernel"]["a"])
        np.testing.assert_allclose(moves["w"]["kernel"]["b"], ratio * plain["w"]["kernel"]["b"], rtol=1e-6)
    with pytest.raises(UserError, match="'lora_plus' is for low-rank kernels"):
        registry.call("update", "lora_plus").init({"w": {"kernel": jnp.ones(3)}})


def test_layerwise_decay_is_adamw_with_a_rate_for_each_layer():
    """Head 1, top layer decay, lowest layer decay^L, embeddings decay^(L + 1), weight decay included."""
    params, hp = gate_trees.make(), {"learning_rate": 0.1, "weight_decay": 0.1}
    grads = jax.grad(gate_trees.loss)(params)
    one, slow = registry.call("update", "adamw", **hp), registry.call("update", "layerwise_decay", **hp, decay=0.7)
    plain, _ = one.update(grads, one.init(params), params)
    moves, _ = slow.update(grads, slow.init(params), params)
    count = gate_trees.LAYERS
    for path, x in tree.flatten(plain).items():
        if path.startswith("layers/"):
            factor = (0.7 ** np.arange(count, 0, -1)).reshape(-1, *[1] * (x.ndim - 1))
        else:
            factor = {"head": 1.0, "embed": 0.7 ** (count + 1)}[path.split("/")[0]]
        np.testing.assert_allclose(tree.flatten(moves)[path], factor * np.asarray(x), rtol=1e-5, err_msg=path)
    with pytest.raises(UserError, match="decay is 1.5"):
        registry.call("update", "layerwise_decay", decay=1.5)


def test_allora_scales_gradients_by_the_size_of_their_rows():
    """SGD-like first step of Adam hides a scale, so the second moment is read: nu = (1 - b2) (g · factor)²."""
    rng = np.random.default_rng(0)
    kernel = {"a": rng.standard_normal((3, 5, 2)), "b": rng.standard_normal((3, 2, 4)), "bias": rng.standard_normal(4)}
    params = {"w": jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), kernel)}
    grads = jax.tree.map(lambda x: jnp.cos(3 * x), params)
    tx = registry.call("update", "allora", eta=2.0, b2=0.9)
    _, state = tx.update(grads, tx.init(params), params)
    second = {p.split("/")[-1]: x for p, x in tree.flatten(state).items() if "/nu/" in p}
    rows = {"a": np.sqrt((kernel["a"] ** 2).sum(-1, keepdims=True)), "b": np.sqrt((kernel["b"] ** 2).sum(-2, keepdims=True))}
    for name, x in grads["w"].items():
        factor = (rows[name] + 1 / 2.0**2) ** -0.5 if name in rows else 1.0
        np.testing.assert_allclose(second[name], 0.1 * (np.asarray(x) * factor) ** 2, rtol=1e-4)
    with pytest.raises(UserError, match="'allora' is for low-rank kernels"):
        registry.call("update", "allora").init({"w": {"kernel": jnp.ones(3)}})


def test_sam_takes_the_gradient_at_the_top_of_the_ball():
    """Numpy: g at θ + rho g/‖g‖, then Adam's first step, whose second moment shows which gradient it was."""
    theta, curve, rho = np.asarray([1.0, -0.5, 2.0]), np.asarray([0.3, 2.0, 1.0]), 0.4
    tx = registry.call("update", "sam", learning_rate=0.1, rho=rho, b2=0.5)
    x = jnp.asarray(theta, jnp.float32)
    moves, state = tx.update(x * curve, tx.init(x), x, grad_fn=lambda p, i: p * curve)
    g = theta * curve
    top = (theta + rho * g / np.linalg.norm(g)) * curve
    second = next(leaf for path, leaf in tree.flatten(state).items() if path.endswith("nu"))
    np.testing.assert_allclose(second, 0.5 * top**2, rtol=1e-5)
    np.testing.assert_allclose(moves, -0.1 * np.sign(top), rtol=1e-5)
    clipped, _ = updates.build("sam", learning_rate=0.1, steps=3, schedule_name="constant", warmup=0, clip=0.1, rho=rho, b2=0.5)
    _, state = clipped.update(x * curve, clipped.init(x), x, grad_fn=lambda p, i: p * curve)
    second = next(leaf for path, leaf in tree.flatten(state).items() if path.endswith("nu"))
    np.testing.assert_allclose(second, 0.5 * (0.1 * top / np.linalg.norm(top)) ** 2, rtol=1e-5)


def test_drift_pulls_each_matrix_towards_the_prior(tmp_path):
    """g - alpha ‖g‖ Δ/‖Δ‖ for a layer's matrix, in numpy; everything else is left alone, a prior like the start too."""
    model = make_model("llama", num_hidden_layers=2)
    start, prior = make_params(model), make_params(model, seed=1)
    prior["layers"]["mlp"]["up"] = start["layers"]["mlp"]["up"]
    hf.save(tmp_path / "prior", model, prior)
    grads = jax.tree.map(lambda x: jnp.cos(5 * x), start)
    tx = registry.call("update", "drift", prior=str(tmp_path / "prior"), alpha=0.3, b1=0.5)
    _, state = jax.jit(lambda g, p: tx.update(g, tx.init(p), p))(grads, start)
    first = {p.split("/mu/")[1]: x for p, x in tree.flatten(state).items() if "/mu/" in p}
    assert set(first) == set(tree.flatten(start))
    for path, g in tree.flatten(grads).items():
        g, expected = np.asarray(g, np.float64), np.asarray(g, np.float64).copy()
        delta = np.asarray(tree.flatten(prior)[path], np.float64) - np.asarray(tree.flatten(start)[path], np.float64)
        for i in range(2) if path.startswith(("layers/attn/", "layers/mlp/")) else ():
            if np.linalg.norm(delta[i]):
                expected[i] -= 0.3 * np.linalg.norm(g[i]) * delta[i] / np.linalg.norm(delta[i])
        np.testing.assert_allclose(first[path], 0.5 * expected, rtol=0, atol=1e-5, err_msg=path)
    with pytest.raises(UserError, match="'drift' needs prior=FOLDER"):
        registry.call("update", "drift")
    wider = make_params(make_model("llama", num_hidden_layers=2, intermediate_size=40))
    with pytest.raises(UserError, match="has no layers/mlp/down/kernel of shape"):
        tx.init(wider)


# Differential privacy


@pytest.mark.slow
def test_dp_clips_every_example_by_itself():
    """Without noise: the numpy mean of clipped gradients of single examples, however the batch is cut up."""
    objective, params, mask, batch = of_task("classification")
    del batch["weight"]
    trainable, frozen = tree.split(params, mask)

    gradient = jax.jit(lambda row: jax.grad(lambda t: objective(tree.join(t, frozen), row, None)[0])(trainable))
    single = [gradient({k: v[i : i + 1] for k, v in batch.items()}) for i in range(8)]
    norms = [float(optax.global_norm(g)) for g in single]
    clip = float(np.median(norms))
    expected = jax.tree.map(lambda *gs: sum(g * min(1, clip / n) for g, n in zip(gs, norms)) / 8, *single)
    tx = registry.call("update", "dp_sgd", learning_rate=1.0, max_norm=clip, noise=0.0)
    start = train.TrainState(jnp.asarray(0), trainable, tx.init(trainable))
    for parts in (1, 4):
        state, _ = jax.jit(train.make_step(objective, tx, parts, seed=0))(start, frozen, batch)
        moved = jax.tree.map(lambda a, b: a - b, trainable, state.trainable)
        assert_trees_close(moved, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "name, hp, words",
    [
        ("dp_sgd", {"clip": 1.0}, ["clips each example", "optimizer.clip to 0"]),
        ("dp_adamw", {"clip": 0.0, "noise": -1.0}, ["noise >= 0", "noise=-1.0"]),
        ("lora_plus", {"mask": "lisa"}, ["'lora_plus' sees the tree as a whole", "'lisa'"]),
    ],
)
def test_an_update_that_cannot_be(name, hp, words):
    with pytest.raises(UserError) as error:
        updates.build(name, learning_rate=1e-3, steps=5, **hp)
    assert all(w in str(error.value) for w in words) and "\n" not in str(error.value), str(error.value)


def test_the_pull_leads_back_to_the_start():
    """No task gradient: weights that were moved away return to θ_0, those on it stay; l1 = 0 is AdamW."""
    tx = registry.call("update", "adamw_l1", learning_rate=1e-2, l1=0.5)
    start = jnp.asarray([1.0, -0.5, 2.0])
    state, zero = tx.init(start), jnp.zeros(3)
    away = start + jnp.asarray([0.3, -0.2, 0.0])
    step = jax.jit(lambda x, s: tx.update(zero, s, x))
    for _ in range(60):
        moves, state = step(away, state)
        away = optax.apply_updates(away, moves)
    np.testing.assert_allclose(away, start, rtol=0, atol=3e-2)
    assert away[2] == start[2]
    free, plain = registry.call("update", "adamw_l1", l1=0.0), registry.call("update", "adamw")
    for update in (free, plain):
        moves, _ = update.update(jnp.asarray(GRAD), update.init(start), start)
        np.testing.assert_allclose(moves, -1e-3 * np.sign(GRAD), rtol=1e-4)


def test_the_pull_matches_a_torch_loop():
    """Ten steps of torch's AdamW on the loss plus l1 · ‖θ − θ_0‖₁ (gradient sign(0) = 0 in both)."""
    import torch

    hp = {"l1": 0.3, "weight_decay": 0.1, "b1": 0.8, "b2": 0.95}
    _, ours = run(registry.call("update", "adamw_l1", learning_rate=3e-2, **hp), 10)
    theta = [torch.tensor(np.asarray(x)).requires_grad_() for x in jax.tree.leaves(START)]
    start, curves = [x.detach().clone() for x in theta], [torch.tensor(np.asarray(d)) for d in jax.tree.leaves(CURVES)]
    theirs = torch.optim.AdamW(theta, lr=3e-2, betas=(0.8, 0.95), weight_decay=0.1)
    for _ in range(10):
        theirs.zero_grad()
        loss = sum((d * x**2).sum() for d, x in zip(curves, theta)) / 2
        (loss + hp["l1"] * sum((x - x0).abs().sum() for x, x0 in zip(theta, start))).backward()
        theirs.step()
    for x, y in zip(jax.tree.leaves(ours), theta, strict=True):
        np.testing.assert_allclose(x, y.detach().numpy(), rtol=0, atol=1e-6)


SHAPES = {
    "constant": lambda share: 1.0,
    "linear": lambda share: 1 - share,
    "cosine": lambda share: (1 + math.cos(math.pi * share)) / 2,
}


@pytest.mark.parametrize("name", updates.SCHEDULES)
@pytest.mark.parametrize("steps, warmup, rise", [(100, 0.06, 6), (40, 0.0, 0), (50, 10, 10), (10, 1, 1), (1, 0.06, 0)])
def test_schedules_are_their_closed_forms(name, steps, warmup, rise):
    assert set(SHAPES) == set(updates.SCHEDULES)
    schedule, peak = updates.schedule(name, 2e-3, steps, warmup), 2e-3
    for step in range(steps + 1):
        expected = step / rise if step < rise else SHAPES[name]((step - rise) / (steps - rise))
        assert float(schedule(step)) == pytest.approx(peak * expected, abs=1e-9), step


@pytest.mark.parametrize(
    "args, message",
    [
        (("linaer", 1e-3, 10, 0.0), "no schedule called 'linaer'; nearest: 'linear'"),
        (("linear", 1e-3, 10, 10), "warm-up of 10 steps does not fit a run of 10 steps"),
        (("linear", 1e-3, 10, -1), "warm-up is -1; it is a share"),
    ],
)
def test_a_schedule_that_cannot_be(args, message):
    with pytest.raises(UserError, match=message):
        updates.schedule(*args)


def test_build_clips_by_the_global_norm_and_names_what_is_unknown():
    grads = {"a": jnp.asarray([3.0, 0.0]), "b": jnp.asarray([4.0])}
    for clip, factor in ((1.0, 1 / 5), (10.0, 1.0), (0.0, 1.0)):
        tx, lr = updates.build("sgd", learning_rate=0.5, steps=10, schedule_name="constant", warmup=0, clip=clip)
        moves, _ = tx.update(grads, tx.init(grads), grads)
        assert_trees_close(moves, jax.tree.map(lambda g, f=factor: -0.5 * f * g, grads), rtol=1e-6)
        assert float(lr(3)) == 0.5
    with pytest.raises(UserError, match="no update called 'adamv'; nearest: 'adamw'"):
        updates.build("adamv", learning_rate=0.5, steps=10)
    with pytest.raises(UserError, match="update 'adamw' has no parameter 'beta1'"):
        updates.build("adamw", learning_rate=0.5, steps=10, beta1=0.9)


def of_task(task):
    """(objective, params, mask, batch of 8) whose micro-batches hold unequal numbers of targets."""
    family, name, kernel = {
        "classification": ("bert", "classification", None),
        "causal_lm": ("llama", "causal_lm", [("layers/.*/kernel", "lora(rank=2)")]),
    }[task]
    model = make_model(family, num_hidden_layers=2)
    params, batch = make_params(model), make_batch(model, rows=8, length=10)
    params = kernels.adapt(params, kernel or [], jax.random.key(0))
    if task == "causal_lm":
        batch["loss_mask"][:2] = 0  # a micro-batch without any target
        batch["loss_mask"][4, 3:] = 0
    else:
        batch["weight"] = np.asarray([1, 0, 1, 1, 0, 0, 1, 1], np.float32)
    return make_objective(name, model), params, registry.call("mask", "rules", params, 0), batch


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_accumulated_steps_equal_whole_ones(task):
    objective, params, mask, batch = of_task(task)
    trainable, frozen = tree.split(params, mask)
    tx = optax.sgd(0.1)  # linear in the gradient, so that rounding is not blown up as Adam does
    start = train.TrainState(jnp.asarray(0), trainable, tx.init(trainable))
    outcomes = {}
    for parts in (1, 4):
        state, metrics = jax.jit(train.make_step(objective, tx, parts, seed=0))(start, frozen, batch)
        outcomes[parts] = state.trainable, metrics
        assert int(state.step) == 1
    whole, metrics = outcomes[1]
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), whole, trainable)
    assert max(jax.tree.leaves(moved)) > 1e-3
    assert_trees_close(outcomes[4][0], whole, rtol=0, atol=1e-6)
    assert_trees_close(outcomes[4][1], metrics, rtol=1e-5)
    assert float(metrics["weight"]) == {"classification": 5, "causal_lm": batch["loss_mask"][:, 1:].sum()}[task]


def test_evaluation_is_the_mean_over_units_however_batched():
    objective, params, mask, batch = of_task("causal_lm")
    evaluate = train.make_eval(objective)
    halves = [tree.split(params, mask)]
    cut = [{k: v[i : i + 2] for k, v in batch.items()} for i in range(0, 8, 2)]
    one, many, twice = (evaluate(*halves[0], b) for b in ([batch], cut, cut))
    assert set(one) == {"loss", "accuracy"} and many == twice
    assert many == pytest.approx(one, rel=1e-5)


def test_dropout_follows_the_seed_and_the_step():
    model = make_model("bert", num_hidden_layers=1)
    params, batch = make_params(model), make_batch(model, rows=4)
    objective = make_objective("classification", model, dropout=True)
    tx, halves = optax.sgd(0.0), tree.split(params, tree.map_with_path(lambda p, _: p == "head/bias", params))

    @functools.cache
    def step_of(seed):
        return jax.jit(train.make_step(objective, tx, 1, seed))

    def loss(seed, step):
        state = train.TrainState(jnp.asarray(step), halves[0], tx.init(halves[0]))
        return float(step_of(seed)(state, halves[1], batch)[1]["loss"])

    assert loss(0, 3) == loss(0, 3)
    assert len({loss(0, 3), loss(0, 4), loss(1, 3)}) == 3
    evaluate = train.make_eval(objective)
    plain = evaluate(*halves, [batch])["loss"]
    assert plain == evaluate(*halves, [batch])["loss"] and plain not in (loss(0, 3), loss(0, 4))
