"""What every kernel promises; a new one is held to it by being registered.

What a test cannot see of a method is a trait given to ``register`` (`registry.TRAITS`). The paper's count of trainable
parameters is a row ``name: (d_in, d_out, **hyper-parameters) -> count`` of the table COUNTS in a tests/kernels/test_*.py.
"""

import functools
import importlib
import pathlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from ft_jax import kernels, masks, parallel, registry, tree
from ft_jax.errors import UserError
from ft_jax.io import runs, safetensors
from tests.helpers import assert_trees_close, inputs, make_batch, make_model, make_params, product_flops, step_flops
from tests.kernels.trees import D_IN, D_OUT, LAYERS, adapted, hyperparameters, matrix, moved, put, trait

KERNELS = [m.name for m in registry.methods("kernel")]
PLAIN = [n for n in KERNELS if trait(n, "plain")]
# Each kernel around `lora` and `lora` around each: that any pair nests follows, for a kernel sees another as dot and dense.
NESTED = [(n, "lora") for n in KERNELS] + [("lora", n) for n in KERNELS if n not in (*PLAIN, "lora")]
MERGED = [n for n in KERNELS if trait(n, "merges")]
EVERY = [(n,) for n in KERNELS] + [pytest.param(pair, marks=pytest.mark.slow) for pair in NESTED]
# What a fast run compiles for devices and through a whole model: a kernel of each make.
MADE = ("lora", "dora", "loha", "oft", "bone", "sparse", "nf4", "polytropon")
COSTLY = [n if n in MADE else pytest.param(n, marks=pytest.mark.slow) for n in KERNELS]
DEAREST = [n if n in ("dora", "oft", "nf4", "polytropon") else pytest.param(n, marks=pytest.mark.slow) for n in KERNELS]


def fields_of(*names):
    """The fields that the kernels train: none for one that only stands under another."""
    nodes, found = [adapted(name)["w"]["kernel"] for name in names], set()
    while nodes:  # a method may put one kernel around another
        node = nodes.pop()
        found |= set(type(node).trainable)
        nodes += filter(kernels.is_kernel, vars(node).values())
    return found


def start_of(names):
    return next((s for s in ("moved", "rounded") if any(trait(n, "start") == s for n in names)), "exact")


def merges(names):
    return all(trait(n, "merges") for n in names)


def exact(x, dense):
    return np.asarray(x, np.float64) @ np.asarray(dense, np.float64)


@functools.cache
def seen(*names, stack=()):
    """What one program makes of the kernel on a matrix, or on each of a stack: as it starts, moved from there, after a step.

    Compiling is what these tests cost: every promise below looks at the same program.
    """
    params, x = adapted(*names, shape=(*stack, D_IN, D_OUT)), matrix(*(stack or (2,)), 5, D_IN, seed=2)
    trainable, frozen = tree.split(params, masks.declared(params, 0))
    away = moved(params)["w"]["kernel"]

    def loss(t):
        out = kernels.dot(tree.join(t, frozen)["w"]["kernel"], x[0])
        return jnp.square(out - 1).mean(), out

    @jax.jit
    def program(params, trainable, away, x):
        out = {}
        if merges(names):
            out |= {"start": params["w"]["kernel"].dense(), "merged": kernels.merge(params)["w"]["kernel"], "dense": away.dense()}
        if stack:
            out["scanned"] = jax.lax.scan(lambda _, kx: (None, kernels.dot(*kx)), None, (away, x))[1]
            out["mapped"] = jax.vmap(kernels.dot)(away, x)
            out["alone"] = [kernels.dot(jax.tree.map(lambda leaf, i=i: leaf[i], away), x[i]) for i in range(*stack)]
        else:
            out |= {"dot": kernels.dot(away, x), "half": kernels.dot(away, x.astype(jnp.bfloat16))}
        if trainable and not stack:
            step = optax.adam(1e-2)
            (before, first), grads = jax.value_and_grad(loss, has_aux=True)(trainable)
            moves, state = step.update(grads, step.init(trainable))
            after, then = loss(optax.apply_updates(trainable, moves))
            out |= {"grads": grads, "state": state, "losses": (before, after), "outputs": (first, then)}
        return out

    return SimpleNamespace(params=params, trainable=trainable, frozen=frozen, x=x, **program(params, trainable, away, x))


@pytest.mark.parametrize("names, stack", [((n,), ()) for n in MERGED]
                         + [pytest.param((n,), (LAYERS,), marks=() if n in MADE else pytest.mark.slow) for n in MERGED]
                         + [pytest.param(pair, (), marks=pytest.mark.slow) for pair in NESTED if merges(pair)],
                         ids=lambda x: "+".join(map(str, x)) or "single")  # fmt: skip
def test_the_start_is_as_declared(names, stack):
    run, w = seen(*names, stack=stack), matrix(*stack, D_IN, D_OUT)
    kernel = run.params["w"]["kernel"]
    assert kernels.is_kernel(kernel)
    assert (kernel.shape, kernel.dtype) == (w.shape, w.dtype) or start_of(names) == "moved"
    assert (run.start.shape, run.start.dtype) == (w.shape, jnp.float32)
    np.testing.assert_array_equal(run.merged, run.start)
    if start_of(names) == "moved":
        assert not np.allclose(run.start, w, rtol=0, atol=1e-5)
    else:
        np.testing.assert_allclose(run.start, w, rtol=0, atol=5e-6 if start_of(names) == "rounded" else 0)


@pytest.mark.parametrize("name", [n for n in KERNELS if not trait(n, "merges")])
def test_what_stands_for_no_one_matrix_is_not_merged(name):
    params = adapted(name)
    assert (params["w"]["kernel"].shape, params["w"]["kernel"].dtype) == ((D_IN, D_OUT), jnp.float32)
    with pytest.raises(UserError, match="w/kernel: .* stand for no one matrix and cannot be merged"):
        kernels.merge(params)


@pytest.mark.parametrize("name", PLAIN)
def test_what_takes_a_matrix_apart_takes_a_plain_one(name):
    with pytest.raises(UserError, match=f"{name} takes a plain matrix.*a LowRank"):
        adapted("lora", name)


@pytest.mark.parametrize("name", KERNELS)
def test_the_trainable_count_is_the_papers(name):
    tables = [importlib.import_module(f"tests.kernels.{f.stem}") for f in pathlib.Path(__file__).parent.glob("test_*.py")]
    counts = [t.COUNTS[name] for t in tables if name in getattr(t, "COUNTS", {})]
    assert len(counts) == 1, f"COUNTS of one tests/kernels/test_*.py holds the count of {name}"
    trainable, _ = tree.split(params := adapted(name, shape=(LAYERS, D_IN, D_OUT)), masks.declared(params, 0))
    assert tree.count(trainable) == LAYERS * counts[0](D_IN, D_OUT, **hyperparameters(name))
    assert bool(tree.count(trainable)) == bool(fields_of(name))


@pytest.mark.parametrize("names", [e for e in EVERY if merges(getattr(e, "values", (e,))[0])], ids="+".join)
def test_dot_is_product_with_dense(names):
    run = seen(*names)
    expected = exact(run.x, run.dense)
    if fields_of(*names):
        assert np.abs(expected - exact(run.x, run.start)).max() > 0.1, "the trainable fields must matter"
    scale = np.abs(expected).max()
    np.testing.assert_allclose(run.dot, expected, rtol=0, atol=1e-5 * scale)
    assert run.half.dtype == jnp.bfloat16
    np.testing.assert_allclose(run.half.astype(jnp.float32), expected, rtol=0, atol=2e-2 * scale)
    assert run.dense.dtype == jnp.float32


@pytest.mark.parametrize("name", COSTLY)
def test_a_stack_is_scanned_and_mapped_layer_by_layer(name):
    run = seen(name, stack=(LAYERS,))
    expected = exact(run.x, run.dense) if trait(name, "merges") else np.stack(run.alone)
    for out in (run.scanned, run.mapped, run.alone):
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("names", EVERY, ids="+".join)
def test_only_declared_fields_get_gradients_and_optimiser_state(names):
    run = seen(*names)
    paths = set(tree.flatten(run.trainable))
    assert all(fields_of(*names) & set(p.split("/")) for p in paths)
    assert all(p not in paths for p in tree.flatten(run.frozen))
    if start_of(names) == "exact":
        assert np.array_equal(next(iter(jax.tree.leaves(run.frozen))), matrix(D_IN, D_OUT)), "the base is kept as it came"
    if not fields_of(*names):
        assert not paths
        return
    assert set(tree.flatten(run.grads)) == paths
    assert any(np.any(g) for g in jax.tree.leaves(run.grads)), "the first step must be able to move"
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(run.grads))
    assert tree.count(run.state) == 2 * tree.count(run.trainable) + 1
    before, after = run.losses
    assert after < before
    assert not np.array_equal(*run.outputs)


WIDTHS = [(768, 3072), (3072, 768)] * 6  # the stack that the counts in the design are of


def mlp(params, x, multiply=kernels.dot):
    for layer in params.values():
        x = jnp.tanh(multiply(layer["kernel"], x))
    return jnp.square(x).mean()


def mlp_flops(name=None, multiply=kernels.dot):
    plain = {f"w{i:02d}": {"kernel": jax.ShapeDtypeStruct(s, jnp.float32)} for i, s in enumerate(WIDTHS)}
    params = jax.eval_shape(lambda p: put(p, name, fit=False) if name else p, plain)
    mask = masks.declared(params, 0) if name else jax.tree.map(lambda _: True, params)
    args = lambda p, x: mlp(p, x, multiply), params, mask, jax.ShapeDtypeStruct((2048, 768), jnp.float32)
    return np.array([step_flops(*args), product_flops(*args)])


@pytest.fixture(scope="module")
def full_flops():
    """Forward, input gradient (not of the first layer), weight gradient."""
    counted = mlp_flops()
    np.testing.assert_allclose(counted, (3 * len(WIDTHS) - 1) * 2 * 2048 * 768 * 3072, rtol=0.01)
    return counted


@pytest.mark.parametrize("name", COSTLY)
def test_a_step_costs_no_more_than_declared(name, full_flops):
    """Below 0.75 the base is neither differentiated nor materialised; what a method declares above that, it needs.

    By XLA's count, which has all operations but the body of a loop once, and by that of products, loops as often as they run.
    """
    share = (mlp_flops(name) / full_flops).max()
    assert share < trait(name, "flops"), f"{share:.3f}"
    assert trait(name, "flops") == 0.75 or share > 0.75, f"{share:.3f}: the method declares more than it needs"


def test_the_count_would_see_a_materialised_weight(full_flops):
    """The test above can fail: x (W + A B) costs more than full fine-tuning."""
    assert (mlp_flops("lora", multiply=lambda w, x: x @ w.dense()) > full_flops).all()


@pytest.mark.parametrize("name", DEAREST)
def test_scan_remat_vmap_and_sharding_leave_the_loss_alone(name):
    weights = {n: {"kernel": matrix(LAYERS, 32, 32, seed=i) * 0.2} for i, n in enumerate(("q", "out"))}
    params = put({"layers": {"attn": weights}}, name)
    params = moved(params if fields_of(name) else put(params, "lora"), size=0.02)
    trainable, frozen = tree.split(params, masks.declared(params, 0))
    x = matrix(8, 32, seed=5)

    def loss(t, f, x, wrap=lambda body: body):
        layers = tree.join(t, f)["layers"]["attn"]
        body = wrap(lambda x, w: (jnp.tanh(kernels.dot(w["out"]["kernel"], kernels.dot(w["q"]["kernel"], x))), None))
        return jnp.square(jax.lax.scan(body, x, layers)[0]).mean()

    def unrolled(t, f, x):
        layers = tree.join(t, f)["layers"]["attn"]
        for i in range(LAYERS):
            w = jax.tree.map(lambda leaf, i=i: leaf[i], layers)
            x = jnp.tanh(kernels.dot(w["out"]["kernel"], kernels.dot(w["q"]["kernel"], x)))
        return jnp.square(x).mean()

    run = jax.value_and_grad(loss)

    @jax.jit
    def alone(trainable, frozen, x):
        pair = jax.tree.map(lambda x: jnp.stack([x + 1, x]), trainable)
        return {
            "unrolled": jax.value_and_grad(unrolled)(trainable, frozen, x),
            "scanned": run(trainable, frozen, x),
            "remat": run(trainable, frozen, x, jax.checkpoint),
            "vmap": jax.tree.map(lambda x: x[1], jax.vmap(run, (0, None, None))(pair, frozen, x)),
        }

    mesh = parallel.make_mesh(2, 2, 2)
    spread = [parallel.shard(t, mesh) for t in (trainable, frozen)]
    assert any(not s.is_fully_replicated for s in (leaf.sharding for leaf in jax.tree.leaves(spread)))
    found = alone(trainable, frozen, x) | {"sharded": jax.jit(run)(*spread, parallel.shard_batch({"x": x}, mesh)["x"])}
    expected = found.pop("unrolled")
    for value, grads in found.values():
        np.testing.assert_allclose(value, expected[0], rtol=1e-5)
        assert_trees_close(grads, expected[1], rtol=1e-4, atol=2e-6)


def test_a_checkpoint_gives_every_kernel_back_bit_for_bit(tmp_path):
    """Orbax as runs use it, and safetensors by flat names: the trainable half and the frozen one."""
    params = {n: moved(adapted(n, shape=(LAYERS, D_IN, D_OUT))) for n in KERNELS}
    trainable, frozen = tree.split(params, masks.declared(params, 0))
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
        assert [x.dtype for x in jax.tree.leaves(found[half])] == [x.dtype for x in jax.tree.leaves(want)]


SITES = ("attn/q", "attn/k", "attn/v", "attn/out", "mlp/up", "mlp/down")
GROUPS = [MERGED[i : i + len(SITES)] for i in range(0, len(MERGED), len(SITES))]


@pytest.mark.slow
@pytest.mark.parametrize("names", GROUPS, ids="+".join)
def test_a_merged_model_gives_the_logits_of_the_unmerged_one(names):
    """One encoder carries several kernels, each on a matrix of its own; merged in float32."""
    model = make_model("bert")
    base, batch = make_params(model), inputs(make_batch(model))
    params = jax.tree.map(lambda x: x, base)
    for site, name in zip(SITES, names, strict=False):
        group, which = site.split("/")
        params["layers"][group][which] |= moved(put({"w": {"kernel": base["layers"][group][which]["kernel"]}}, name), size=0.05)["w"]
    logits, merged, before = (np.asarray(jax.jit(model.apply)(p, batch)) for p in (params, kernels.merge(params), base))
    assert np.abs(logits - before).max() > 1e-2
    np.testing.assert_allclose(merged, logits, rtol=0, atol=1e-4 * max(1, np.abs(logits).max()))


TREE = {
    "layers": {
        "attn": {n: {"kernel": matrix(2, 12, 12, seed=i), "bias": jnp.zeros((2, 12))} for i, n in enumerate("qv")}
    },
    "embed": {"tokens": {"embedding": matrix(20, 12)}},
    "head": {"kernel": matrix(12, 3)},
}  # fmt: skip


def test_the_first_rule_decides_and_every_leaf_draws_its_own_numbers():
    rules = [("layers/attn/v/kernel", "none"), ("head/kernel", "lora(rank=1)"), (r".*/kernel", "rslora(rank=2)")]
    out = kernels.adapt(TREE, rules, jax.random.key(3))
    again = kernels.adapt(TREE, rules, jax.random.key(3))
    assert_trees_close(out, again, rtol=0)
    found = {p: k.a.shape[-1] for p, k in tree.flatten(out, kernels.is_kernel).items() if kernels.is_kernel(k)}
    assert found == {"head/kernel": 1, "layers/attn/q/kernel": 2}
    both = kernels.adapt(TREE, [("layers/.*/kernel", "lora(rank=2)")], jax.random.key(3))["layers"]["attn"]
    assert not np.allclose(both["q"]["kernel"].a, both["v"]["kernel"].a)
    assert_trees_close(kernels.merge(out), TREE, rtol=0)


@pytest.mark.parametrize(
    "rule, words",
    [
        (("head/kernel", "lora(rank=4)"), ["head/kernel", "rank 4 does not fit a 12x3 matrix", "largest: 3"]),
        (("head/kernel", "lora(rank=0)"), ["head/kernel", "rank 0"]),
        (("head/kernel", "rslora(rank=-1)"), ["head/kernel", "rank -1"]),
        (("head/kernel", "pissa(rank=4)"), ["head/kernel", "rank 4 does not fit a 12x3 matrix", "largest: 3"]),
        (("head/kernel", "lora_b(rank=4)"), ["head/kernel", "rank 4 does not fit a 12x3 matrix", "largest: 3"]),
        (("embed/.*", "lora(rank=1)"), ["embed/tokens/embedding", "is not a matrix"]),
        (("layers/attn/q/bias", "lora"), ["layers/attn/q/bias", "(2, 12)", "nearest: 'layers/attn/q/kernel'"]),
        (("layers/atn/q/kernel", "lora"), ["'layers/atn/q/kernel' matches no leaf", "nearest: 'layers/attn/q/kernel'"]),
        (("head/kernel", "lroa"), ["head/kernel", "no kernel called 'lroa'", "nearest: 'lora'"]),
        (("head/kernel", "lora(rnak=1)"), ["head/kernel", "no parameter 'rnak'", "nearest: 'rank'"]),
        (("head/kernel", "lora(rank=1"), ["cannot read the method 'lora(rank=1'"]),
        (("head/kernel", "lora(1)"), ["cannot read '1' in 'lora(1)'"]),
    ],
    ids=lambda x: x[1] if isinstance(x, tuple) else "",
)
def test_an_unfit_rule_is_one_line_that_names_the_leaf(rule, words):
    with pytest.raises(UserError) as error:
        kernels.adapt(TREE, [rule], jax.random.key(0))
    assert all(w in str(error.value) for w in words), str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("lora", ("lora", {})),
        ("lora()", ("lora", {})),
        (" lora( rank = 4 , alpha=8.5 ) ", ("lora", {"rank": 4, "alpha": 8.5})),
        ("x(on=true, off=False, lr=1e-3, n=-2, word='a b')",
         ("x", {"on": True, "off": False, "lr": 1e-3, "n": -2, "word": "a b"})),
    ],
)  # fmt: skip
def test_parse_rule(text, expected):
    name, hp = kernels.parse_rule(text)
    assert (name, hp) == expected
    assert [type(v) for v in hp.values()] == [type(v) for v in expected[1].values()]
