"""What every tap that changes features promises, at the sites it goes to by name; and what adapters alone do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from ft_jax import masks, parallel, registry, taps, tree
from ft_jax.errors import UserError
from ft_jax.io import runs, safetensors
from ft_jax.models import LAYER_SITES, Model
from ft_jax.taps import heads
from tests.helpers import assert_trees_close, inputs, make_batch, make_model, step_flops
from tests.taps.trees import (  # fmt: skip
    FAMILIES,
    attached,
    halves,
    hyperparameters,
    method,
    moved,
    rule,
    setting,
    sites_of,
    tap_at,
    tapped,
)

ROOMS = ("adapters", "domains", "heads", "hyper", "side")
NAMES = [m.name for m in registry.methods("tap") if m.fn.__module__.removeprefix("ft_jax.taps.") in ROOMS]
# What a fast run compiles: one of each make.
MADE = ("parallel_adapter", "pfeiffer", "mixda", "lofit", "polyhistor", "unipt", "qst")
COSTLY = [n if n in MADE else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
DEAREST = [n if n == "parallel_adapter" else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
EACH = [(n, f) if n in MADE and (f == "bert" or n == "unipt") else pytest.param(n, f, marks=pytest.mark.slow) for n in NAMES for f in FAMILIES]
ADAM = optax.adam(1e-2)


def block(m, inner, attention=4, gated=False):
    return attention * m * m + (3 if gated else 2) * m * inner + (2 if attention else 1) * m


def bottleneck(c, *, size, **_):
    return c.num_layers * (2 * c.hidden_size * size + size + c.hidden_size)


def gate(c, width, adapters):
    return c.num_layers * (c.intermediate_size * width + width + 2 * (width**2 + width) + width * (adapters + 1) + adapters + 1)


# name -> numbers that train a site, from the config and the hyper-parameters
COUNTS = {
    "houlsby": bottleneck, "pfeiffer": bottleneck, "parallel_adapter": bottleneck, "mam_adapter": bottleneck, "adapter": bottleneck,
    "mixda_domain": lambda c, *, reduction, width, **_: gate(c, width, 1) + c.num_layers * (
        (c.intermediate_size + c.hidden_size + 1) * (c.intermediate_size // reduction) + c.hidden_size),
    "mixda": lambda c, *, reduction, width, **_: gate(c, width, 2) + bottleneck(c, size=c.hidden_size // reduction),
    "lofit_scale": lambda c: c.num_layers * c.num_heads * c.head_dim,
    "lofit": lambda c, *, heads: len(heads.split("/")) * c.head_dim,
    "polyhistor": lambda c, *, size, factor, rank, embedding, **_: (
        embedding + 2 * c.num_layers * factor**2 + 2 * embedding * rank * (c.hidden_size + size) // factor
        + c.num_layers * (size + c.hidden_size)),
    "compacter": lambda c, *, size, factor, rank, **_: (
        2 * factor**3 + c.num_layers * (2 * rank * (c.hidden_size + size) + size + c.hidden_size)),
    "unipt": lambda c, *, size: (
        (c.num_layers + 1) * (c.hidden_size * size + 3 * size) + size + 2 * c.hidden_size * size + c.hidden_size + 3 * size
        + size * c.hidden_size + c.hidden_size),
    "lst": lambda c, *, reduction, **_: (
        (m := c.hidden_size // reduction) and (c.num_layers + 1) * (c.hidden_size * m + m) + c.num_layers
        + c.num_layers * block(m, c.intermediate_size // reduction) + m + m * c.hidden_size + c.hidden_size),
    "qst": lambda c, *, reduction, rank: (
        (m := c.hidden_size // reduction) and c.num_layers * (c.hidden_size * rank + rank * m + 3 * m)
        + c.num_layers * block(m, c.intermediate_size // reduction, gated=True) + m + m * c.hidden_size + 2 * c.hidden_size),
    "levi": lambda c, *, reduction, depth, size: (
        (m := c.hidden_size // reduction) and c.hidden_size * m + m + depth * block(m, c.intermediate_size // reduction) + m
        + c.num_layers * ((c.hidden_size + m) * size + size + size * c.hidden_size + c.hidden_size)),
}  # fmt: skip


@functools.cache
def logits(family):
    model, params, batch = setting(family)
    return np.asarray(jax.jit(model.apply)(params, batch))


def loss_of(model):
    def loss(trainable, frozen, batch):
        return jnp.square(model.apply(tree.join(trainable, frozen), batch) - 1).mean()

    return loss


@pytest.mark.parametrize("name, family", EACH)
def test_the_start_is_as_declared_and_the_first_step_moves_it(name, family):
    model, _, batch = setting(family)
    trainable, frozen = halves(tapped(name, family))

    @jax.jit
    def trained(trainable, frozen):
        """Logits, loss and gradient's norm before each of six steps of Adam, and the size of its state."""

        def step(state, _):
            weights, adam = state
            out, back = jax.vjp(lambda w: model.apply(tree.join(w, frozen), batch), weights)
            (grads,) = back(2 * (out - 1) / out.size)
            moves, adam = ADAM.update(grads, adam)
            return (optax.apply_updates(weights, moves), adam), (out, jnp.square(out - 1).mean(), optax.global_norm(grads))

        return jax.lax.scan(step, (trainable, ADAM.init(trainable)), None, length=6)

    (_, adam), (outs, losses, norms) = trained(trainable, frozen)
    off = np.abs(outs[0] - logits(family)).max()
    low, high = {"exact": (-1, 3e-6), "near": (3e-6, 0.2), "moved": (0.01, np.inf)}[method(name).traits["start"]]
    assert low < off < high, off
    assert norms[0] > 0, "the first step must be able to move"
    assert losses[-1] < losses[0]  # what ends in zeros starts to move below them with the second step
    assert np.abs(outs[-1] - outs[0]).max() > 1e-4
    assert tree.count(adam) == 2 * tree.count(trainable) + 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_only_declared_fields_train_and_as_many_as_the_paper_says(name, family):
    model, plain, _ = setting(family)
    params = tapped(name, family)
    trainable, frozen = halves(params)
    assert set(tree.flatten(plain)) < set(tree.flatten(params)) and set(tree.flatten(plain)) <= set(tree.flatten(frozen))
    leaves = jax.tree.leaves(trainable)
    assert len({x.unsafe_buffer_pointer() for x in leaves}) == len(leaves), "a step donates each of them"
    own = {s: tap_at(params, s) for s in sites_of(name)}
    fields = {p.split("taps/")[1].split("/")[1] for p in tree.flatten(trainable)}
    assert fields == set(next(iter(own.values())).trainable)
    assert tree.count(trainable) == len(own) * COUNTS[name](model.config, **hyperparameters(name))
    homes = {p.split("/taps/")[0] if "/taps/" in p else "" for p in tree.flatten(trainable)}
    assert homes == {"layers" if s in LAYER_SITES and not t.shared else "" for s, t in own.items()}


@pytest.mark.parametrize("name", COSTLY)
def test_every_trained_number_matters(name):
    """No leaf of a tap away from its start has a gradient of zeros alone."""
    model, _, batch = setting("bert")
    trainable, frozen = halves(moved(tapped(name)))
    grads = jax.jit(jax.grad(loss_of(model)))(trainable, frozen, batch)
    for path, g in tree.flatten(grads).items():
        assert np.abs(g).max() > 1e-8, path


@pytest.mark.parametrize("name", DEAREST)
def test_remat_vmap_and_sharding_leave_the_loss_alone(name):
    model, _, _ = setting("llama")
    batch = inputs(make_batch(model, rows=8, length=7))
    trainable, frozen = halves(moved(tapped(name, "llama"), size=0.05))
    run = jax.jit(jax.value_and_grad(loss_of(model)))
    expected = run(trainable, frozen, batch)
    mesh = parallel.make_mesh(2, 2, 2)
    spread = [parallel.shard(t, mesh) for t in (trainable, frozen)]
    others = {
        "remat": jax.jit(jax.value_and_grad(loss_of(Model(model.config, remat="full"))))(trainable, frozen, batch),
        "vmap": jax.tree.map(lambda x: x[1], jax.jit(jax.vmap(jax.value_and_grad(loss_of(model)), (0, None, None)))(
            jax.tree.map(lambda x: jnp.stack([x + 1, x]), trainable), frozen, batch)),
        "sharded": run(*spread, parallel.shard_batch(batch, mesh)),
    }  # fmt: skip
    for value, grads in others.values():
        np.testing.assert_allclose(value, expected[0], rtol=2e-5)
        assert_trees_close(grads, expected[1], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("name", DEAREST)
def test_without_jit_in_half_precision_and_above_frozen_layers(name):
    model, plain, batch = setting("bert")
    hp = {"heads": "0:1/0:3"} if name == "lofit" else {}
    params = moved(tapped(name, **hp), size=0.05)
    run = jax.jit(model.apply)
    found = run(params, batch)
    with jax.disable_jit():
        np.testing.assert_allclose(model.apply(params, batch), found, atol=2e-5)
    half = jax.jit(Model(model.config, dtype="bfloat16").apply)(params, batch)
    np.testing.assert_allclose(half, found, atol=0.1 * max(1, np.abs(found).max()))
    split = tapped(name, frozen=2, **hp)
    assert "taps" not in split["frozen_layers"]
    near = {"exact": 1e-6, "near": 0.2, "moved": np.inf}[method(name).traits["start"]]
    np.testing.assert_allclose(run(split, batch), run(plain, batch), atol=near)
    trainable, frozen = halves(moved(split))
    value, grads = jax.jit(jax.value_and_grad(loss_of(model)))(trainable, frozen, batch)
    assert np.isfinite(value) and float(optax.global_norm(grads)) > 0


def test_a_checkpoint_gives_every_tap_back_bit_for_bit(tmp_path):
    """Orbax as runs use it, and safetensors by flat names: the trainable half and what of the taps is frozen."""
    params = {n: {"taps": {s: tap_at(moved(tapped(n)), s) for s in sites_of(n)}} for n in NAMES}
    trainable, frozen = halves(params)
    items = {"trainable": trainable, "frozen": frozen}
    run = runs.Run(tmp_path / "run", {}, tensorboard=False)
    run.save("checkpoints", 1, items, {})
    _, found, _ = run.restore("checkpoints", jax.tree.map(jnp.zeros_like, items))
    run.close()
    safetensors.save(tmp_path, tree.flatten(params).items())
    read = load_file(tmp_path / "model.safetensors")
    for path, leaf in tree.flatten(params).items():
        np.testing.assert_array_equal(read[path], leaf, err_msg=path)
    for half, want in items.items():
        assert_trees_close(found[half], want, rtol=0)
        assert jax.tree.structure(found[half]) == jax.tree.structure(want)


@functools.cache
def flops(name=None, only_head=False):
    """Of a step of a 128-wide model over 8 x 64 tokens: full fine-tuning, the head alone, or a tap with the head."""
    model = make_model("bert", hidden_size=128, intermediate_size=512)
    params = model.shapes()
    if name:
        params = jax.eval_shape(lambda p: attached(model, p, name), params)
    mask = masks.rules(params, 0) if name else tree.map_with_path(lambda p, _: not only_head or p.startswith("head"), params)
    batch = {k: jax.ShapeDtypeStruct((8, 64), jnp.int32) for k in ("input_ids", "attention_mask")}
    return step_flops(lambda p, b: jnp.square(model.apply(p, b)).mean(), params, mask, batch)


@pytest.mark.slow
@pytest.mark.parametrize("name", COSTLY)
def test_a_step_costs_no_more_than_full_fine_tuning(name):
    assert flops(only_head=True) < flops(name) < flops(), flops(name) / flops()


@pytest.mark.parametrize(
    "site, text, words",
    [
        ("ffn_out", "houlsby(size=0)", ["houlsby: size 0 does not fit a layer of 32 features", "from 1 to 32"]),
        ("ffn_out", "pfeiffer(size=33)", ["pfeiffer: size 33 does not fit a layer of 32 features"]),
        ("embed", "parallel_adapter(size=4)", ["nothing to read parallel at site 'embed'", "sites: q, k, v, heads, attn_out"]),
        ("heads", "pfeiffer(size=4)", ["nothing to read after at site 'heads'", "sites: attn_out, ffn_out"]),
        ("ffn_out", "adapter(form=serial)", ["no form 'serial'"]),
        ("ffn_out", "adapter(form=paralel)", ["no form 'paralel'", "nearest: 'parallel'"]),
        ("ffn_out", "houlsby(activation=gellu)", ["no activation 'gellu'", "nearest: 'gelu'"]),
        ("ffn_out", "houlsby(widths=3)", ["tap 'houlsby' has no parameter 'widths'"]),
        ("ffn_out", "houlsby(sise=3)", ["tap 'houlsby' has no parameter 'sise'", "nearest: 'size'"]),
        ("logits", "compacter", ["is shared by layers, and its site belongs to none"]),
        ("ffn_out", "polyhistor(size=8, factor=3)", ["factor 3 does not divide 32 features and size 8 alike; one of [1, 2, 4, 8]"]),
        ("ffn_out", "polyhistor(size=8, factor=4, rank=3)", ["rank 3 does not fit a layer of 2 features"]),
        ("q", "lofit_scale", ["at the site 'heads', not at 'q'"]),
        ("ffn_out", "mixda", ["mixda starts from finished runs and names none; write mixda(runs=FOLDER)"]),
        ("block_out", "mixda_domain", ["at the site 'ffn_out', not at 'block_out'"]),
        ("ffn_out", "mixda_domain(reduction=49)", ["mixda_domain: size 0 does not fit a layer of 48 features"]),
        ("ffn_out", "mixda_domain(keep=-1.0)", ["the weight -1.0 of a loss term is negative"]),
        ("heads", "lofit", ["no heads are named"]),
        ("heads", "lofit(heads=1-2)", ["cannot read the head '1-2'"]),
        ("heads", "lofit(heads=3:0)", ["no head 3:0; there are 3 layers that train of 4 heads each"]),
        ("heads", "lofit(heads=1:0/1:0)", ["head 1:0 is named twice"]),
    ],
)
def test_an_unfit_rule_is_one_line(site, text, words):
    model, params, _ = setting("bert")
    with pytest.raises(UserError) as error:
        taps.attach(model, params, [(site, text)], jax.random.key(0))
    assert all(w in str(error.value) for w in words) and "\n" not in str(error.value), str(error.value)


def test_a_tap_reads_only_what_has_passed():
    model, params, _ = setting("bert")
    tap = tapped("parallel_adapter")["layers"]["taps"]["ffn_out"].replace(reads=("block_out",))
    with pytest.raises(UserError, match="reads 'block_out', which has not passed at site 'ffn_out'; there: attn_in, q"):
        taps._check_reads("mine", "ffn_out", tap)
    with pytest.raises(UserError, match="site 'ffn_out' already has a tap"):
        taps.attach(model, tapped("polyhistor"), [rule("houlsby")], jax.random.key(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_parallel_adapter_without_activation_at_q_and_v_is_lora(family):
    """The unified view's LoRA: q + s · x D U, which a kernel adds to W."""
    model, params, batch = setting(family)
    made = taps.attach(model, params, [("q|v", "adapter(form=parallel,size=3,activation=linear,scale=2.0)")], jax.random.key(0))
    made = moved(made)
    layers = jax.tree.map(lambda x: x, params["layers"])
    for site in "qv":
        tap = made["layers"]["taps"][site] = made["layers"]["taps"][site].replace(
            down_bias=jnp.zeros((3, 3)), up_bias=jnp.zeros_like(made["layers"]["taps"][site].up_bias))
        kernel = layers["attn"][site]["kernel"] + 2 * jnp.einsum("lir,lro->lio", tap.down, tap.up)
        layers["attn"][site] = {**layers["attn"][site], "kernel": kernel}
    found, expected = (jax.jit(model.apply)(p, batch) for p in (made, {**params, "layers": layers}))
    assert np.abs(found - logits(family)).max() > 1e-2
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_a_learnt_scale_trains():
    trainable, _ = halves(tapped("adapter", learnt=True))
    assert "layers/taps/ffn_out/scale" in tree.flatten(trainable)
    assert "layers/taps/ffn_out/scale" not in tree.flatten(halves(tapped("adapter"))[0])


def test_kronecker_adapters_in_closed_form():
    poly = moved(tapped("polyhistor", factor=4, rank=2, embedding=3))["taps"]["ffn_out"]
    comp = moved(tapped("compacter", rank=2))["taps"]["attn_out"]
    for side in ("down", "up"):
        w = {k: np.asarray(v, np.float64) for k, v in poly.weights[side].items()}
        template = np.tensordot(poly.task, w["a"], 1) @ np.tensordot(poly.task, w["b"], 1)
        expected = np.stack([np.kron(s, template) for s in w["scale"]])
        np.testing.assert_allclose(getattr(poly.unfold(), side), expected, atol=1e-5)
        w = {k: np.asarray(v, np.float64) for k, v in comp.weights[side].items()}
        expected = np.stack([sum(np.kron(w["shared"][n], w["s"][i, n] @ w["t"][i, n]) for n in range(2)) for i in range(3)])
        np.testing.assert_allclose(getattr(comp.unfold(), side), expected, atol=1e-5)


def test_lofit_offsets_the_named_heads_alone_and_the_strongest_are_named():
    model, params, batch = setting("bert")
    made = tapped("lofit", heads="2:3/0:1")
    tap = made["taps"]["heads"].replace(v=jnp.arange(16.0).reshape(2, 8))
    _, seen = model.apply({**made, "taps": {"heads": tap}}, batch, capture=("heads",))
    _, plain = model.apply(params, batch, capture=("heads",))
    np.testing.assert_allclose(seen["heads"][0] - plain["heads"][0], np.broadcast_to(
        np.concatenate([np.zeros(8), np.arange(8, 16), np.zeros(16)]), seen["heads"][0].shape), atol=1e-5)
    a = np.zeros((3, 4, 8))
    a[1, 2], a[0, 3], a[2, 0, 0] = 0.5, -0.6, 1.6
    scaled = tapped("lofit_scale")
    scaled = {**scaled, "layers": {**scaled["layers"], "taps": {"heads": heads.Scale(jnp.asarray(a.reshape(3, 32)))}}}
    assert heads.strongest(model.config, scaled, 3) == "0:3/2:0/1:2"
    with pytest.raises(UserError, match="count 13 does not fit 12 heads"):
        heads.strongest(model.config, scaled, 13)
    with pytest.raises(UserError, match="no tap lofit_scale"):
        heads.strongest(model.config, params, 3)
