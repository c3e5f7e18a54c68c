"""Cross-entropy a stretch at a time: the same numbers and gradients as from all logits at once, and no such array."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ft_jax import kernels, masks, tree
from ft_jax.models import scored
from tests.helpers import assert_trees_close, make_batch, make_model, make_objective, make_params

# What a head is made of: (family, objective, rules).
CASES = {
    "tied table, all train": ("llama", "causal_lm", ()),
    "tied table, frozen": ("llama", "causal_lm", ((r"layers/.*/kernel", "lora(rank=2)"),)),
    "head of its own": ("mistral", "causal_lm", ()),
    "LoRA on int8 in the head": ("mistral", "causal_lm", ((r"head/kernel", "lora(rank=2) @ int8(block=8)"),)),
    "masked language model": ("bert", "mlm", ()),
}


def gradients(case, monkeypatch, limit):
    """(the program, loss and metrics, gradients of what trains) with stretches of at most ``limit`` numbers."""
    family, name, rules = CASES[case]
    monkeypatch.setattr(scored, "LIMIT", limit)
    monkeypatch.setattr(scored, "LEAST", 1)
    model = make_model(family, "mlm" if name == "mlm" else None)
    params = make_params(model)
    if rules:
        params = kernels.adapt(params, rules, jax.random.key(1))
    mask = masks.declared(params, 0) if rules else jax.tree.map(lambda _: True, params)
    trainable, frozen = tree.split(params, mask)
    trainable = jax.tree.map(lambda x: x + 0.01, trainable)
    objective, batch = make_objective(name, model), make_batch(model, 3, 11)
    weighted = batch | {"weight": np.asarray([1, 0.5, 2], np.float32)}
    # the sums of both round alike with the emitters that a run has, which the tests' flags leave out
    fn = jax.jit(jax.value_and_grad(lambda t, f: objective(tree.join(t, f), weighted, jax.random.key(3)), has_aux=True),
                 compiler_options={"xla_cpu_use_fusion_emitters": True})  # fmt: skip
    (loss, metrics), grads = fn(trainable, frozen)
    return fn.lower(trainable, frozen).as_text(), {"loss": loss, **metrics}, grads


@pytest.mark.parametrize("case", [c if "train" in c or "int8" in c else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_stretches_give_what_all_logits_at_once_do(case, monkeypatch):
    whole, at_once, grads = gradients(case, monkeypatch, 10**9)
    parts, found, cut = gradients(case, monkeypatch, 3 * 4 * 64)  # stretches of four of eleven tokens: the last is padded
    assert "tensor<3x11x64xf32>" in whole and "tensor<3x11x64xf32>" not in parts, "no array of all logits"
    assert_trees_close(found, at_once, rtol=2e-6)
    assert_trees_close(cut, grads, rtol=1e-5, atol=5e-7)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) > 1e-3


def test_a_frozen_table_has_no_gradient_in_the_program(monkeypatch):
    for case, wanted in (("tied table, frozen", False), ("tied table, all train", True)):
        text, _, _ = gradients(case, monkeypatch, 3 * 4 * 64)
        shapes = ("-> tensor<64x32xf32>", "-> tensor<32x64xf32>")
        products = [line for line in text.splitlines() if "dot_general" in line and line.rstrip().endswith(shapes)]
        assert bool(products) == wanted, case


def test_several_examples_of_their_own(monkeypatch):
    """vmap over rows, as DP does, and over members of a population."""
    monkeypatch.setattr(scored, "LEAST", 1)
    model = make_model("llama")
    params, batch, objective = make_params(model), make_batch(model, 3, 9), make_objective("causal_lm", model)

    def each(row):
        return jax.grad(lambda p: objective(p, jax.tree.map(lambda x: x[None], row), None)[0])(params)

    found = []
    for limit in (10**9, 4 * 64):
        monkeypatch.setattr(scored, "LIMIT", limit)
        found.append(jax.jit(jax.vmap(each))(batch))
    assert_trees_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_weights_are_differentiated_too():
    rng = np.random.default_rng(0)
    table, x = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((50, 4), (2, 300, 4)))
    targets, weights = jnp.asarray(rng.integers(0, 50, (2, 300))), jnp.asarray(rng.random((2, 300)), jnp.float32)

    def of(head, x):
        return x @ head.T

    old = jax.grad(lambda w: jnp.square(scored.sums(of(table, x), targets, w)["loss"]))(weights)
    cut = [jnp.moveaxis(a.reshape(2, 3, 100, *a.shape[2:]), 1, 0) for a in (x, targets)]
    new = jax.grad(lambda w: jnp.square(scored._sums(of, None, table, *cut, jnp.moveaxis(w.reshape(2, 3, 100), 1, 0))[0]))(weights)
    np.testing.assert_allclose(new, old, rtol=1e-5)


@pytest.mark.parametrize("rows, length, vocabulary, ways, tokens", [
    (4, 128, 49152, 1, 64), (8, 256, 49152, 1, 37), (8, 256, 30522, 8, 256), (1, 4096, 128256, 1, 256), (256, 4096, 128256, 256, 256), (2, 16, 64, 1, 16),
])  # fmt: skip
def test_the_length_of_a_stretch(rows, length, vocabulary, ways, tokens):
    assert scored.stretch(rows, length, vocabulary, ways) == tokens


def test_a_tap_on_the_logits_sees_them(monkeypatch):
    monkeypatch.setattr(scored, "LIMIT", 64)
    monkeypatch.setattr(scored, "LEAST", 1)
    model = make_model("llama")
    params, batch = make_params(model), make_batch(model, 2, 8)
    targets = jnp.asarray(batch["input_ids"]), jnp.ones((2, 8))
    sums, seen = model.apply(params, {"input_ids": batch["input_ids"]}, capture=("logits",), targets=targets)
    assert seen["logits"].shape == (2, 8, 64)
    assert_trees_close(sums, model.apply(params, {"input_ids": batch["input_ids"]}, targets=targets), rtol=1e-6)
    with pytest.raises(ValueError, match="targets are for a language-model head.*'classification'"):
        make_model("bert").apply(params, {}, targets=targets)
