"""Which leaves train, and the split of the layer stack that stops the backward pass."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ft_jax import kernels, masks, registry, taps, tree
from ft_jax.errors import UserError
from tests.helpers import assert_trees_close, inputs, make_batch, make_model, make_params, step_flops

MASKS = [m.name for m in registry.methods("mask") if not m.traits["gate"]]  # gates: tests/test_schedules.py
LORA = [(r"layers/attn/[qv]/kernel", "lora(rank=2)")]


@functools.cache
def params_of(shape, family="bert"):
    """The tree of a tiny classifier: plain, adapted, nested, tapped, or split and adapted."""
    model = make_model(family, "classification")
    params, key = make_params(model), jax.random.key(0)
    if "split" in shape:
        params = masks.split_layers(params, 2)
    if "tapped" in shape:
        params = taps.attach(model, params, [("heads|logits", "affine")], key)
    for _ in range(shape.count("lora")):
        params = kernels.adapt(params, LORA, key)
    return params


def trained(name, params, **hp):
    mask = registry.call("mask", name, params, 0, **hp)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    marks = tree.flatten(mask)
    assert all(isinstance(m, (bool, np.bool_)) for m in marks.values())
    return {p for p, m in marks.items() if m}


SHAPES = ("plain", "lora", "lora lora", "tapped", "tapped lora", "split", "split lora", "split tapped")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", MASKS)
def test_a_mask_is_a_tree_of_booleans_that_spares_bases_and_frozen_layers(name, shape):
    marked = trained(name, params_of(shape))
    assert not [p for p in marked if p.startswith("frozen_layers/")]
    assert not [p for p in marked if re.search(r"/kernel/(base/)*(base|scale)$", p)]
    if name != "declared" or shape not in ("plain", "split"):
        assert marked, "something trains"


HEAD = {"head/kernel", "head/bias", "pooler/kernel", "pooler/bias"}
AB = {f"layers/attn/{n}/kernel/{f}" for n in "qv" for f in "ab"}
INNER = {p.replace("kernel/", "kernel/base/") for p in AB}
TAPS = {f"{p}/{f}" for p in ("layers/taps/heads", "taps/logits") for f in ("scale", "shift")}


@pytest.mark.parametrize(
    "shape, declared, default",
    [
        ("plain", set(), "every leaf"),
        ("lora", AB, AB | HEAD),
        ("lora lora", AB | INNER, AB | INNER | HEAD),
        ("tapped", TAPS, TAPS | HEAD),
        ("tapped lora", TAPS | AB, TAPS | AB | HEAD),
        ("split", set(), "every leaf above the frozen layers"),
        ("split lora", AB, AB | HEAD),
    ],
)
def test_declared_fields_and_the_default_rules(shape, declared, default):
    params = params_of(shape)
    if isinstance(default, str):
        below = ("embed/", "frozen_layers/") if "split" in shape else ()
        default = {p for p in tree.flatten(params) if not p.startswith(below)}
    assert trained("declared", params) == declared
    assert trained("rules", params) == default


@pytest.mark.parametrize(
    "shape, rules, expected",
    [
        ("plain", [("head/.*", True)], {"head/kernel", "head/bias"}),
        ("plain", [("head/bias", False), ("head/.*", True)], {"head/kernel"}),
        ("plain", [("embed/norm/.*", True)], {"embed/norm/scale", "embed/norm/bias"}),
        ("lora", [("layers/attn/q/.*", True)],
         {"layers/attn/q/kernel/a", "layers/attn/q/kernel/b", "layers/attn/q/bias"}),  # never base or scale
        ("lora", [(".*/b", True)], {"layers/attn/q/kernel/b", "layers/attn/v/kernel/b"}),
        ("tapped", [("taps/.*", True)], {"taps/logits/scale", "taps/logits/shift"}),
        ("split", [("(frozen_)?layers/attn_norm/.*", True)], {"layers/attn_norm/scale", "layers/attn_norm/bias"}),
    ],
)  # fmt: skip
def test_ordered_rules(shape, rules, expected):
    assert trained("rules", params_of(shape), trainable=rules) == expected


def test_bitfit_trains_biases_and_the_head():
    params = params_of("plain")
    expected = {p for p in tree.flatten(params) if p.split("/")[-1] == "bias"} | {"head/kernel"}
    assert trained("bitfit", params) == expected and "layers/mlp/up/bias" in expected


@pytest.mark.parametrize("shape", ["plain", "split"])
def test_ln_tuning_trains_norms_and_the_head(shape):
    params = params_of(shape)
    below = ("frozen_layers/", "embed/") if shape == "split" else ()
    norms = {f"{owner}/{leaf}" for owner in ("embed/norm", "layers/attn_norm", "layers/mlp_norm") for leaf in ("scale", "bias")}
    assert trained("ln_tuning", params) == {p for p in norms if not p.startswith(below)} | {"head/kernel", "head/bias"}


def test_whole_masks_are_met_and_united():
    params = params_of("plain")
    marks = {m: trained(m, params) for m in ("bitfit", "ln_tuning")}

    def found(text, trainable=()):
        return {p for p, m in tree.flatten(masks.whole(params, text, trainable)).items() if m}

    assert found("bitfit+ln_tuning") == marks["bitfit"] & marks["ln_tuning"]
    assert found("bitfit|ln_tuning") == marks["bitfit"] | marks["ln_tuning"]
    assert found("bitfit+lisa(n=1)+random") == marks["bitfit"]
    assert found("lisa") == found("rules") == set(tree.flatten(params))
    layers = [("layers/.*", True)]
    assert found("bitfit", layers) == {p for p in marks["bitfit"] if p.startswith("layers/")}
    assert found("rules", layers) == found("hft", layers) == {p for p in tree.flatten(params) if p.startswith("layers/")}


def test_a_rule_that_matches_nothing_names_the_nearest():
    with pytest.raises(UserError, match="trainable rule 'layer/.*' matches no leaf"):
        trained("rules", params_of("plain"), trainable=[("layer/.*", True)])
    with pytest.raises(UserError, match="trainable rule 'head/kernal' matches no leaf; nearest: 'head/kernel'"):
        trained("rules", params_of("plain"), trainable=[("head/kernal", True)])


@functools.cache
def logits_of(family, frozen):
    model = make_model(family)
    params, batch = masks.split_layers(make_params(model), frozen), inputs(make_batch(model))
    return jax.jit(model.apply)(params, batch, jax.random.key(1))


@pytest.mark.parametrize("family", ["bert", "qwen2"])  # one drops out, the other has a window per layer
@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_a_split_stack_is_the_same_model_and_joins_again(family, frozen):
    params = make_params(make_model(family))
    split = masks.split_layers(params, frozen)
    assert ("frozen_layers" in split) == (frozen > 0)
    assert split["layers"]["attn"]["q"]["kernel"].shape[0] == 3 - frozen
    assert_trees_close(masks.join_layers(split), params, rtol=0)
    np.testing.assert_allclose(logits_of(family, frozen), logits_of(family, 0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("frozen", [-1, 3, 7])
def test_a_split_that_leaves_no_layer_is_refused(frozen):
    with pytest.raises(UserError, match=f"cannot freeze the lowest {frozen} of 3 layers; at most 2"):
        masks.split_layers(params_of("plain"), frozen)


@pytest.mark.parametrize("family, head", [pytest.param("bert", "classification", marks=pytest.mark.slow), ("llama", "lm")])
def test_freezing_the_lowest_layers_stops_the_backward_pass(family, head, monkeypatch):
    """XLA counts the body of a loop once, so the scan is unrolled for counting."""
    monkeypatch.setattr(jax.lax, "scan", functools.partial(jax.lax.scan, unroll=True))
    model = make_model(family, head, hidden_size=64, intermediate_size=128)
    params, batch = model.shapes(), inputs(make_batch(model, rows=2, length=32))

    def loss(params, batch):
        return jnp.square(model.apply(params, batch)).mean()

    def backward(frozen, rules=(("layers/.*", True),), compiled=False):
        split = jax.eval_shape(lambda p: masks.split_layers(p, frozen), params)
        mask = registry.call("mask", "rules", split, 0, trainable=rules)
        forward = step_flops(loss, split, jax.tree.map(lambda _: False, split), batch, compiled=compiled)
        return step_flops(loss, split, mask, batch, compiled=compiled) - forward

    costs = [backward(k) for k in range(3)]
    saved = -np.diff(costs)
    np.testing.assert_allclose(saved, saved.mean(), rtol=0.02)  # every layer saves the same
    assert costs[2] < 0.5 * costs[0]
    through = backward(2, (("(layers|embed)/.*", True),))
    assert through > 1.5 * costs[2], "training the embeddings goes through the frozen layers"
    if family == "bert":
        assert backward(2, ()) < 1.05 * costs[2], "without rules the embeddings below stay frozen"
        assert backward(2, compiled=True) < 0.5 * backward(0, compiled=True)
