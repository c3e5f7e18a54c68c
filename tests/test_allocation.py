"""AdaLoRA's budget against its parts called one after the other by hand; MIGU and CoFiTune's soft mask in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ft_jax import allocation, importance, kernels, masks, registry, train, tree, updates
from ft_jax.errors import UserError
from ft_jax.kernels import subspace
from tests.helpers import make_batch, make_model, make_objective, make_params

STEPS, HP = 20, {"target": 1.0, "begin": 0.2, "end": 0.7, "every": 3}


def setting():
    model = make_model("bert")
    params = kernels.adapt(make_params(model), [(r"layers/attn/\w+/kernel", "adalora(rank=3)")], jax.random.key(0))
    objective, batch = make_objective("classification", model), make_batch(model)
    trainable, frozen = tree.split(params, masks.whole(params))
    grad = jax.jit(jax.grad(lambda t: objective(tree.join(t, frozen), batch, jax.random.key(0))[0]))
    return trainable, grad


def kept(params):
    return sum(int(np.count_nonzero(f["e"])) for f in subspace.triplets(params).values())


def test_the_budget_falls_as_planned_and_the_rest_is_adamw():
    start, grad = setting()
    tx = registry.call("update", "adalora_adamw", learning_rate=1e-2, steps=STEPS, **HP)
    plain, total, target = optax.adamw(1e-2, weight_decay=0.0), 12 * 3, 12
    ours, theirs, state, inner, seen, left = start, start, tx.init(start), plain.init(start), None, []
    update = jax.jit(tx.update)
    for step in range(1, STEPS + 1):
        moves, state = update(grad(ours), state, ours)
        ours = optax.apply_updates(ours, moves)
        g = grad(theirs)
        seen = subspace.importance(theirs, g, seen)
        moves, inner = plain.update(g, inner, theirs)
        theirs = optax.apply_updates(theirs, moves)
        if step > 14 or (step > 4 and step % 3 == 0):
            budget = subspace.budget_at(step, start=total, target=target, warmup=4, final=6, total=STEPS)
            theirs = subspace.allocate(theirs, seen, budget)
            assert kept(ours) == budget, step
        left.append(kept(ours))
        for path, x in tree.flatten(ours).items():
            np.testing.assert_allclose(x, tree.flatten(theirs)[path], rtol=0, atol=1e-5, err_msg=f"{step}: {path}")
    assert left[:4] == [total] * 4 and left[-6:] == [target] * 6 and 12 < left[5] < 36


def test_it_is_built_with_the_steps_of_the_run_and_goes_by_its_schedule():
    start, grad = setting()
    tx, _ = updates.build("adalora_adamw", learning_rate=1e-2, steps=5, schedule_name="constant", warmup=0, clip=1.0,
                          target=2.0, begin=0.0, end=0.6, every=1)  # fmt: skip
    state, params = tx.init(start), start
    for _ in range(5):
        moves, state = tx.update(grad(params), state, params)
        params = optax.apply_updates(params, moves)
    assert kept(params) == 24


@pytest.mark.parametrize("hp, words", [
    ({"target": 0.0}, "target 0.0 is not above 0 and up to the mean rank 3"),
    ({"target": 4.0}, "target 4.0 is not above 0 and up to the mean rank 3"),
    ({"begin": 0.8}, "begin 0.8 and end 0.7 of 20 steps"),
    ({"every": 0}, "every 0: the budget falls"),
])  # fmt: skip
def test_what_cannot_be_planned_is_said_before_a_step(hp, words):
    start, _ = setting()
    with pytest.raises(UserError, match=words):
        registry.call("update", "adalora_adamw", steps=20, **HP | hp).init(start)


def test_other_kernels_have_no_ranks_to_allocate():
    with pytest.raises(UserError, match="'adalora_adamw' is for AdaLoRA's kernels, and none trains here"):
        registry.call("update", "adalora_adamw").init({"w": {"kernel": jnp.ones((3, 4))}})
    budgets, due = allocation.plan(100, 48, 16, 0.1, 0.7, 10)
    assert budgets[10] == 48 and budgets[71] == 16 and not due[10] and due[20] and not due[21] and due[71:].all()


@pytest.mark.parametrize("family, frozen, accumulate", [("bert", 0, 1), ("llama", 1, 2)])
def test_migu_trains_the_outputs_of_largest_magnitude(family, frozen, accumulate):
    """|x W + b| summed over real tokens in numpy, from the taps: the rest of a matrix's columns get no gradient."""
    model = make_model(family)
    params, batch = masks.split_layers(make_params(model), frozen), make_batch(model)
    objective = make_objective("classification" if family == "bert" else "causal_lm", model)
    trainable, held = tree.split(params, masks.whole(params, "rules", [("layers/.*", True)]))
    tx, state = registry.call("update", "migu", learning_rate=0.1, share=0.25), None
    step = jax.jit(train.make_step(objective, tx, accumulate, 0))
    state, _ = step(train.TrainState(jnp.zeros((), jnp.int32), trainable, tx.init(trainable)), held, batch)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    _, seen = model.apply(params, inputs, capture=("q", "k", "v", "attn_out", "ffn_out"))
    for name, site in (("attn/q", "q"), ("attn/v", "v"), ("attn/out", "attn_out"), ("mlp/down", "ffn_out")):
        group, one = name.split("/")
        for layer in range(3 - frozen):
            size = (np.abs(np.asarray(seen[site][layer + frozen])) * batch["attention_mask"][..., None]).sum((0, 1))
            on = size >= np.sort(size)[-round(0.25 * size.size)]
            for leaf in ("kernel", "bias") if family == "bert" else ("kernel",):
                before, after = (t["layers"][group][one][leaf][layer] for t in (trainable, state.trainable))
                moved = np.atleast_2d(np.asarray(before != after)).any(0)
                # the loss has no slope in the bias of a key, which moves no softmax
                assert (moved == on).all(), (name, layer, leaf)
    norm = "layers/attn_norm/scale"
    assert (tree.flatten(trainable)[norm] != tree.flatten(state.trainable)[norm]).all(), "what is no matrix trains throughout"


def test_migu_cuts_the_b_of_low_rank_kernels_and_refuses_other_shares():
    grads = {"layers": {"attn": {"q": {"kernel": {"a": jnp.ones((1, 3, 2)), "b": jnp.ones((1, 2, 4))}}}}}
    tx = registry.call("update", "migu", learning_rate=0.1, share=0.5)
    sizes = {"layers/attn/q/kernel": jnp.asarray([[1.0, 4.0, 2.0, 3.0]])}
    moves, _ = tx.update(grads, tx.init(grads), grads, outputs=lambda: sizes)
    assert (np.asarray(moves["layers"]["attn"]["q"]["kernel"]["b"]) != 0).any(1).tolist() == [[False, True, False, True]]
    assert (np.asarray(moves["layers"]["attn"]["q"]["kernel"]["a"]) != 0).all()
    with pytest.raises(UserError, match="share is 1.5"):
        registry.call("update", "migu", share=1.5)


@pytest.mark.slow
def test_cofitunes_soft_mask_lets_through_what_general_text_does_not_need(tmp_path):
    """Adam's second moment shows which gradient it was; outside the FFN's outputs the whole one."""
    model = make_model("bert")
    params = make_params(model)
    slope = importance.disagreement(model, params, [make_batch(model, seed=i) for i in range(2)], seed=3)
    importance.save(tmp_path / "scores", slope, "disagreement")
    grads = jax.tree.map(lambda x: jnp.cos(7 * x), params)
    tx = registry.call("update", "cofitune_soft", scores=str(tmp_path / "scores"), b2=0.5)
    _, state = tx.update(grads, tx.init(params), params)
    factors = {}
    for name, width in (("up", 48), ("down", 32)):
        s = np.asarray(slope[f"layers/mlp/{name}/kernel"], np.float64)
        assert s.shape == (3, width) and s.min() < 0 < s.max(), "slopes keep their sign"
        free = 1 - np.abs(np.tanh((s - s.mean(-1, keepdims=True)) / s.std(-1, ddof=1, keepdims=True)))
        assert free.min() < 0.2 and free.max() > 0.9
        factors |= {f"layers/mlp/{name}/kernel": free[:, None], f"layers/mlp/{name}/bias": free}
    second = {p.split("nu/")[1]: x for p, x in tree.flatten(state).items() if "/nu/" in p}
    for path, g in tree.flatten(grads).items():
        np.testing.assert_allclose(second[path], 0.5 * (factors.get(path, 1.0) * np.asarray(g)) ** 2, rtol=1e-3, atol=1e-7)
    with pytest.raises(UserError, match="this mask needs scores=FOLDER"):
        registry.call("update", "cofitune_soft").init(params)
    with pytest.raises(UserError, match="goes by the units of layers/mlp/up/kernel and layers/mlp/down/kernel"):
        registry.call("update", "cofitune_soft").init({"w": {"kernel": jnp.ones((3, 4))}})
    with pytest.raises(UserError, match="no example to score units by"):
        importance.disagreement(model, params, [])
