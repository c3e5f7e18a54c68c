"""Terms that kernels add to a loss: in training alone, by their weights, in numpy; free where no kernel declares one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ft_jax import kernels, masks, train, tree
from ft_jax.errors import UserError
from ft_jax.objectives import terms
from tests.helpers import make_batch, make_model, make_objective, make_params

LINEAR = r"layers/(attn|mlp)/\w+/kernel"
KEY = jax.random.key(3)


def setting(text, family="bert", where=LINEAR, frozen=0, size=0.1):
    """(objective, params away from their start, batch with tasks, the model)."""
    model = make_model(family)
    params = kernels.adapt(masks.split_layers(make_params(model), frozen), [(where, text)], jax.random.key(0))
    mask, rng = masks.declared(params, 0), np.random.default_rng(1)
    params = jax.tree.map(lambda m, x: x + size * rng.standard_normal(x.shape).astype(np.float32) if m else x, mask, params)
    name = "classification" if family == "bert" else "causal_lm"
    batch = make_batch(model) | {"tasks": np.asarray([0, 2, 1, 0], np.int32)}
    return make_objective(name, model), params, batch, model


@pytest.mark.slow
@pytest.mark.parametrize("text", ["lora(rank=2)", "sara(share=0.1)", "adalora(rank=2, orthogonality=0)", "loramoe(experts=3, rank=2, balance=0)",
                                  "pela(share=0.5)"])  # fmt: skip
def test_nothing_is_paid_where_no_kernel_declares_a_term(text):
    """The training step is the program that evaluation is, but for its key."""
    objective, params, batch, model = setting(text)
    assert terms.declared(params) == {}
    plain, keyed = (str(jax.make_jaxpr(lambda p, k=k: objective(p, batch, k))(params)) for k in (None, KEY))
    assert plain == keyed
    assert "orthogonality" not in objective(params, batch, KEY)[1]


@pytest.mark.parametrize("text, name", [("adalora(rank=2, orthogonality=0.5)", "orthogonality"), ("sara(share=0.1, norm=0.01)", "nuclear_norm")])
def test_a_term_of_the_weights_is_the_mean_over_all_matrices(text, name):
    objective, params, batch, _ = setting(text)
    found = jax.tree.leaves(params["layers"], is_leaf=kernels.is_kernel)
    found = [k for k in found if kernels.is_kernel(k)]
    assert len(found) == 6
    expected = np.mean([np.asarray(k.weight * k.penalty()) for k in found])
    loss, metrics = jax.jit(objective)(params, batch, KEY)
    plain, measured = objective(params, batch, None)
    assert float(metrics[name]) == pytest.approx(expected, rel=1e-5) and expected > 1e-3
    assert float(loss) == pytest.approx(float(plain) + expected, rel=1e-5)
    assert float(metrics["loss"]) == pytest.approx(float(plain), rel=1e-6) and name not in measured


@pytest.mark.parametrize("family, frozen", [("bert", 0), pytest.param("llama", 1, marks=pytest.mark.slow)])
def test_the_balance_of_experts_in_numpy(family, frozen):
    """The gates of every matrix on what goes into it, which the model's own taps show; padding does not count."""
    objective, params, batch, model = setting("loramoe(experts=3, rank=2, balance=0.5, delta=0.2)", family, frozen=frozen)
    sites = {"q": "attn_in", "k": "attn_in", "v": "attn_in", "out": "heads", "up": "ffn_in", "gate": "ffn_in", "down": "ffn_hidden"}
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "tasks")}
    _, seen = model.apply(params, inputs, capture=tuple(set(sites.values())))
    real, kinds, expected = batch["attention_mask"], batch["tasks"] > 0, []
    for path, kernel in tree.flatten(params["layers"], is_leaf=kernels.is_kernel).items():
        if not kernels.is_kernel(kernel):
            continue
        for layer in range(3 - frozen):
            x = np.asarray(seen[sites[path.split("/")[1]]][layer + frozen], np.float64)
            gates = np.exp(x @ np.asarray(kernel.gate[layer], np.float64))
            gates = gates / gates.sum(-1, keepdims=True) * real[..., None]
            z = gates.sum(1) / real.sum(1)[:, None]
            z = z * np.where(kinds[:, None] == np.asarray([False, False, True]), 1.2, 0.8)
            expected.append(0.5 * z.var() / z.mean() ** 2)
    loss, metrics = jax.jit(objective)(params, batch, KEY)
    assert len(expected) == (6 if family == "bert" else 7) * (3 - frozen)
    assert float(metrics["balance"]) == pytest.approx(np.mean(expected), rel=1e-4) and np.mean(expected) > 1e-3
    assert float(loss) == pytest.approx(float(objective(params, batch, None)[0]) + np.mean(expected), rel=1e-5)


@pytest.mark.parametrize("text, name, accumulate", [("adalora(rank=4, orthogonality=1)", "orthogonality", 2),
                                                     ("loramoe(experts=4, rank=2, balance=30)", "balance", 1)])  # fmt: skip
def test_a_term_is_pulled_on_in_a_step(text, name, accumulate):
    """With a weight that outweighs the loss the term falls; micro-batches are averaged; the step's metrics hold it."""
    objective, params, batch, _ = setting(text, where="layers/attn/[qv]/kernel")
    trainable, frozen = tree.split(params, masks.declared(params, 0))
    tx = optax.adam(5e-3)
    step = jax.jit(train.make_step(objective, tx, accumulate, 0))
    state, rows = train.TrainState(jnp.zeros((), jnp.int32), trainable, tx.init(trainable)), []
    for _ in range(6):
        state, metrics = step(state, frozen, batch)
        rows.append(float(metrics[name]))
    assert rows[-1] < 0.95 * rows[0] and np.isfinite(rows).all(), rows
    assert float(metrics["loss"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("text", ["pela(share=0.4, distil=2)", "lora(rank=2) @ pela(share=0.4, distil=2)"])
def test_features_are_distilled_from_the_model_with_the_whole_matrices(text):
    """PELA: squared distance of every layer's output from the base model's over real tokens; it falls when it outweighs."""
    objective, params, batch, model = setting(text, where=r"layers/mlp/\w+/kernel")
    base, inputs = make_params(model), {k: batch[k] for k in ("input_ids", "attention_mask")}
    (_, ours), (_, theirs) = (model.apply(p, inputs, capture=("block_out",)) for p in (params, base))
    far = np.square(np.asarray(ours["block_out"], np.float64) - np.asarray(theirs["block_out"]))
    expected = 2 * far[:, batch["attention_mask"] > 0].mean()
    loss, metrics = jax.jit(objective)(params, batch, KEY)
    assert float(metrics["distillation"]) == pytest.approx(expected, rel=1e-4) and expected > 1e-2
    assert float(loss) == pytest.approx(float(metrics["loss"]) + expected, rel=1e-5)
    trainable, frozen = tree.split(params, masks.declared(params, 0))
    assert not any("original" in path for path in tree.flatten(trainable))
    slope = jax.grad(lambda t: objective(tree.join(t, frozen), batch, KEY)[1]["distillation"])(trainable)
    nearer = jax.tree.map(lambda x, g: x - 1e-2 * g, trainable, slope)
    assert float(objective(tree.join(nearer, frozen), batch, KEY)[1]["distillation"]) < expected


def test_a_kernel_inside_another_keeps_its_term_and_one_that_reads_needs_a_layer():
    objective, params, batch, _ = setting("lora(rank=2) @ adalora(rank=2)", where="layers/attn/q/kernel")
    assert list(terms.declared(params)) == ["layers/attn/q/kernel/base"]
    assert float(objective(params, batch, KEY)[1]["orthogonality"]) > 0
    for text, where, path in (("lora(rank=2) @ loramoe(experts=2)", "layers/attn/q/kernel", "layers/attn/q/kernel/base"),
                              ("loramoe(experts=2, rank=2)", "pooler/kernel", "pooler/kernel")):  # fmt: skip
        objective, params, batch, _ = setting(text, where=where)
        with pytest.raises(UserError, match=f"{path}: the loss term of this kernel looks at the input"):
            objective(params, batch, KEY)
