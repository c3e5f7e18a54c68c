"""Side networks: what they read is constant, no backward pass goes through the backbone, and who sees whom is kept."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ft_jax import masks, registry, taps, tree
from ft_jax.errors import UserError
from ft_jax.models import Model
from tests.helpers import assert_trees_close, inputs, make_batch, make_model, make_params, step_flops
from tests.taps.trees import FAMILIES, moved, rule, setting, tapped

NAMES = [m.name for m in registry.methods("tap") if m.traits["sites"] == "side"]
COSTLY = [n if n in ("unipt", "qst") else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]


def with_side(name, family, head="none"):
    return setting(family, head)[0], moved(tapped(name, family, head), size=0.3)


@functools.cache
def wide(name):
    """(model, shapes of its parameters with the tap, batch): 6 layers of 256 features, 8 x 32 tokens."""
    model = make_model("bert", hidden_size=256, intermediate_size=1024, num_hidden_layers=6)
    params = model.shapes()
    if name:
        params = jax.eval_shape(lambda p: taps.attach(model, p, [rule(name)], jax.random.key(0)), params)
    batch = {k: jax.ShapeDtypeStruct((8, 32), jnp.int32) for k in ("input_ids", "attention_mask")}
    return model, params, batch


def forward_flops(name=None):
    model, params, batch = wide(name)
    return jax.jit(model.apply).lower(params, batch).compile().cost_analysis()["flops"]


def backward_scans(name):
    """How many scans of a step run from the last layer to the first, over weights of the backbone's size."""
    model, params, batch = wide(name)
    trainable, frozen = tree.split(params, masks.rules(params, 0))
    step = jax.make_jaxpr(jax.grad(lambda t, f, b: jnp.square(model.apply(tree.join(t, f), b)).mean()))(trainable, frozen, batch)
    found = []

    def look(jaxpr):
        for eqn in jaxpr.eqns:
            shapes = {v.aval.shape for v in eqn.invars}
            if eqn.primitive.name == "scan" and eqn.params["reverse"] and (6, 256, 1024) in shapes:
                found.append(eqn)
            for sub in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
                if hasattr(sub, "eqns") or hasattr(sub, "jaxpr"):
                    look(getattr(sub, "jaxpr", sub))

    look(step.jaxpr)
    return len(found)


@pytest.mark.parametrize("name", NAMES)
def test_no_backward_pass_goes_through_the_backbone(name):
    """By XLA's count a step is the backbone's forward pass and at most four times the side network's; and by the program."""
    model, params, batch = wide(name)
    mask = masks.rules(params, 0)
    step = step_flops(lambda p, b: jnp.square(model.apply(p, b)).mean(), params, mask, batch)
    base, whole = forward_flops(), forward_flops(name)
    assert base < whole < 2 * base, "else the count below says nothing"
    assert step < base + 4 * (whole - base) + 0.05 * base, step / base
    assert backward_scans(name) == 0


def test_the_counts_would_see_a_backward_pass():
    """An adapter inside the layers needs one."""
    model, params, batch = wide("parallel_adapter")
    step = step_flops(lambda p, b: jnp.square(model.apply(p, b)).mean(), params, masks.rules(params, 0), batch)
    base, whole = forward_flops(), forward_flops("parallel_adapter")
    assert step > base + 4 * (whole - base) + 0.05 * base
    assert backward_scans("parallel_adapter") == 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", COSTLY)
def test_what_it_reads_is_constant_to_the_gradient(name, family):
    """Even where every weight trains, the layers' gradient is that of the path past the side network."""
    model, params = with_side(name, family)
    batch, side = setting(family, "none")[2], params["taps"]["side"]
    plain = {k: v for k, v in params.items() if k != "taps"}
    _, seen = jax.jit(lambda p: model.apply(p, batch, capture=("embed", "block_out")))(plain)
    real = batch["attention_mask"] > 0
    allowed = jnp.broadcast_to(real[:, None, None], (*real.shape[:1], 1, 7, 7))
    allowed = allowed & jnp.tril(jnp.ones((7, 7), bool)) if family == "llama" else allowed

    def by_hand(p):
        return jnp.square(side(model.apply(p, batch), seen["embed"], seen["block_out"], allowed)).mean()

    def in_the_model(p):
        return jnp.square(model.apply({**p, "taps": params["taps"]}, batch)).mean()

    expected, found = (jax.jit(jax.value_and_grad(f))(plain) for f in (by_hand, in_the_model))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    assert_trees_close(found[1], expected[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", COSTLY)
def test_padding_packing_and_the_future_stay_unseen(name):
    """In a decoder every token's features are those of its own prefix; in an encoder padding changes nothing."""
    model, params = with_side(name, "llama")
    run = jax.jit(model.apply)
    batch = inputs(make_batch(model, rows=2, length=8, padded=False))
    whole = np.asarray(run(params, batch))
    first = {k: v[:, :5] for k, v in batch.items()}
    np.testing.assert_allclose(run(params, first), whole[:, :5], atol=2e-5)
    packed = {
        "input_ids": np.concatenate([batch["input_ids"][:1], batch["input_ids"][1:]], 1),
        "segment_ids": np.repeat([[1, 2]], 8, 1).astype(np.int32), "positions": np.tile(np.arange(8, dtype=np.int32), (1, 2)),
    }  # fmt: skip
    np.testing.assert_allclose(run(params, packed)[0], whole.reshape(16, -1), atol=2e-5)
    model, params = with_side(name, "bert")
    run, batch = jax.jit(model.apply), inputs(make_batch(model, rows=2, length=8, padded=False))
    longer = {k: np.pad(v, ((0, 0), (0, 3))) for k, v in batch.items()}
    np.testing.assert_allclose(run(params, longer)[:, :8], run(params, batch), atol=2e-5)


@pytest.mark.parametrize("name", COSTLY)
def test_a_split_stack_and_remat_are_read_alike(name):
    model, params = with_side(name, "bert", "classification")
    batch = setting("bert")[2]
    expected = jax.jit(model.apply)(params, batch)
    split = masks.split_layers(params, 2)
    np.testing.assert_allclose(jax.jit(model.apply)(split, batch), expected, atol=1e-5)
    np.testing.assert_allclose(jax.jit(Model(model.config, remat="dots").apply)(params, batch), expected, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_capture_gives_what_was_asked_for_and_free_when_absent(family):
    model, params = with_side("unipt", family)
    batch = setting(family, "none")[2]
    out, seen = model.apply(params, batch, capture=("q", "side"))
    assert set(seen) == {"q", "side"}
    np.testing.assert_array_equal(seen["side"], out)
    _, seen = model.apply(params, batch, capture=("block_out",))
    assert set(seen) == {"block_out"} and seen["block_out"].shape[0] == 3
    plain = {k: v for k, v in params.items() if k != "taps"}
    texts = [jax.jit(model.apply).lower(p, batch).as_text() for p in (plain, params)]
    assert "3x4x7x32" not in texts[0] and "3x4x7x32" in texts[1], "the stack of layer outputs is there only if read"


def test_a_plain_tap_stands_at_side_too():
    model, params, batch = setting("llama", "none")
    made = taps.attach(model, params, [("side", "affine")], jax.random.key(0))
    made["taps"]["side"] = made["taps"]["side"].replace(shift=jnp.ones(32))
    np.testing.assert_allclose(model.apply(made, batch), model.apply(params, batch) + 1, atol=1e-5)
    taps.check_side(made, jax.tree.map(lambda _: True, made))


@pytest.mark.parametrize(
    "site, text, words",
    [
        ("block_out", "unipt(size=4)", ["unipt: a side network stands at the site 'side', not at 'block_out'"]),
        ("logits", "lst", ["lst: a side network stands at the site 'side'"]),
        ("side", "unipt(size=0)", ["unipt: size 0 does not fit a layer of 32 features"]),
        ("side", "unipt(size=33)", ["unipt: size 33 does not fit"]),
        ("side", "lst(reduction=5)", ["lst: reduction 5 does not fit 32 features in 4 heads; one of [1, 2, 4, 8]"]),
        ("side", "lst(block=mpl)", ["no block 'mpl'", "nearest: 'mlp'"]),
        ("side", "qst(reduction=16)", ["qst: reduction 16 does not fit 32 features in 4 heads"]),
        ("side", "qst(reduction=8, rank=40)", ["qst: rank 40 does not fit a layer of 32 features"]),
        ("side", "levi(size=8, depth=0)", ["levi: depth 0 leaves no small model"]),
        ("side", "unipt(config=2)", ["tap 'unipt' has no parameter 'config'", "known: size"]),
    ],
)
def test_an_unfit_rule_is_one_line(site, text, words):
    model, params, _ = setting("bert")
    with pytest.raises(UserError) as error:
        taps.attach(model, params, [(site, text)], jax.random.key(0))
    assert all(w in str(error.value) for w in words) and "\n" not in str(error.value), str(error.value)


@pytest.mark.parametrize("trains", ["layers/attn/q/kernel", "embed/tokens/embedding", "layers/mlp_norm/scale"])
def test_a_backbone_that_trains_below_is_refused(trains):
    params = tapped("unipt")
    mask = tree.map_with_path(lambda p, m: m or p == trains, masks.rules(params, 0))
    taps.check_side(params, masks.rules(params, 0))
    with pytest.raises(UserError, match=f"{trains} trains below the side network"):
        taps.check_side(params, mask)
    taps.check_side(make_params(make_model("bert")), tree.map_with_path(lambda p, _: True, make_params(make_model("bert"))))
