"""What every kernel promises; a new one is held to it by being registered."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ft_jax import kernels, masks, parallel, registry, tree
from ft_jax.errors import UserError
from tests.helpers import assert_trees_close, step_flops

KERNELS = [m.name for m in registry.methods("kernel")]
MOVE_THE_BASE = {"pissa"}  # take a plain matrix apart: W is the sum of their parts up to rounding
NESTED = [(a, b) for a in KERNELS for b in KERNELS if b not in MOVE_THE_BASE]
D_IN, D_OUT, LAYERS = 24, 16, 3
LOW_RANK = {"lora": lambda alpha, rank: alpha / rank, "rslora": lambda alpha, rank: alpha / rank**0.5}


def matrix(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def adapted(*names, shape=(D_IN, D_OUT), seed=0):
    """``{"w": {"kernel": …}}`` with one kernel after the other put around a random matrix."""
    params = {"w": {"kernel": matrix(*shape)}}
    for i, name in enumerate(names):
        params = kernels.adapt(params, [("w/kernel", name)], jax.random.key(seed + i))
    return params


def moved(params, seed=1, size=0.3):
    """The same tree with every trainable field away from its start."""
    mask = masks.declared(params, 0)
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda m, x: x + jnp.asarray(size * rng.standard_normal(x.shape), jnp.float32) if m else x, mask, params
    )


def exact(x, kernel):
    return np.asarray(x, np.float64) @ np.asarray(kernel.dense(), np.float64)


@pytest.mark.parametrize("names", [(n,) for n in KERNELS] + NESTED, ids="+".join)
@pytest.mark.parametrize("stack", [(), (LAYERS,)], ids=["single", "stacked"])
def test_identity_at_the_start(names, stack):
    params = adapted(*names, shape=(*stack, D_IN, D_OUT))
    kernel, w = params["w"]["kernel"], matrix(*stack, D_IN, D_OUT)
    assert kernels.is_kernel(kernel)
    assert (kernel.shape, kernel.dtype) == (w.shape, w.dtype)
    tolerance = {"rtol": 0, "atol": 5e-6 if MOVE_THE_BASE & set(names) else 0}
    np.testing.assert_allclose(kernel.dense(), w, **tolerance)
    np.testing.assert_allclose(kernels.merge(params)["w"]["kernel"], w, **tolerance)


@pytest.mark.parametrize("names", [(a, b) for a in KERNELS for b in MOVE_THE_BASE], ids="+".join)
def test_what_moves_the_base_takes_a_plain_matrix(names):
    with pytest.raises(UserError, match=f"w/kernel: {names[1]} takes a plain matrix.*a LowRank"):
        adapted(*names)


@pytest.mark.parametrize("names", [(n,) for n in KERNELS] + NESTED, ids="+".join)
def test_dot_is_product_with_dense(names):
    kernel, x = moved(adapted(*names))["w"]["kernel"], matrix(2, 5, D_IN, seed=2)
    expected = exact(x, kernel)
    assert np.abs(expected - np.asarray(x @ matrix(D_IN, D_OUT))).max() > 0.1, "the trainable fields must matter"
    scale = np.abs(expected).max()
    np.testing.assert_allclose(kernels.dot(kernel, x), expected, rtol=0, atol=1e-5 * scale)
    half = kernels.dot(kernel, x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), expected, rtol=0, atol=2e-2 * scale)
    assert kernel.dense().dtype == jnp.float32


@pytest.mark.parametrize("names", [(n,) for n in KERNELS] + NESTED, ids="+".join)
def test_a_stack_is_scanned_and_mapped_layer_by_layer(names):
    kernel, x = moved(adapted(*names, shape=(LAYERS, D_IN, D_OUT)))["w"]["kernel"], matrix(LAYERS, 5, D_IN, seed=2)
    expected = exact(x, kernel)
    tolerance = {"rtol": 0, "atol": 1e-5 * np.abs(expected).max()}
    _, scanned = jax.lax.scan(lambda _, kx: (None, kernels.dot(*kx)), None, (kernel, x))
    np.testing.assert_allclose(scanned, expected, **tolerance)
    np.testing.assert_allclose(jax.vmap(kernels.dot)(kernel, x), expected, **tolerance)


@pytest.mark.parametrize("names", [(n,) for n in KERNELS] + NESTED, ids="+".join)
def test_only_declared_fields_get_gradients_and_optimiser_state(names):
    params, x = adapted(*names), matrix(5, D_IN, seed=2)
    trainable, frozen = tree.split(params, masks.declared(params, 0))
    paths, kernel = set(tree.flatten(trainable)), params["w"]["kernel"]
    assert paths and {p.split("/")[-1] for p in paths} <= {n for name in names for n in declared_by(name)}
    assert all(p not in paths for p in tree.flatten(frozen))
    moved_base = bool(MOVE_THE_BASE & set(names))
    assert np.array_equal(next(iter(jax.tree.leaves(frozen))), matrix(D_IN, D_OUT)) != moved_base

    def loss(t):
        return jnp.square(tree.join(t, frozen)["w"]["kernel"].dot(x) - 1).mean()

    grads = jax.grad(loss)(trainable)
    assert set(tree.flatten(grads)) == paths
    assert float(optax.global_norm(grads)) > 0, "the first step must be able to move"
    state = optax.adam(1e-2).init(trainable)
    assert tree.count(state) == 2 * tree.count(trainable) + 1
    moves, _ = optax.adam(1e-2).update(grads, state)
    after = optax.apply_updates(trainable, moves)
    assert float(loss(after)) < float(loss(trainable))
    assert not np.array_equal(tree.join(after, frozen)["w"]["kernel"].dense(), kernel.dense())


def declared_by(name):
    return type(adapted(name)["w"]["kernel"]).trainable


@pytest.mark.parametrize("name", LOW_RANK)
@pytest.mark.parametrize("rank, alpha, stack", [(1, 16.0, ()), (4, 2.0, (LAYERS,)), (D_OUT, 8.0, ())])
def test_low_rank_sizes_and_scale(name, rank, alpha, stack):
    """r (d_in + d_out) parameters; ΔW = scale · A B, A uniform within 1/sqrt(d_in)."""
    params = adapted(f"{name}(rank={rank}, alpha={alpha})", shape=(*stack, D_IN, D_OUT))
    trainable, _ = tree.split(params, masks.declared(params, 0))
    assert tree.count(trainable) == np.prod(stack, dtype=int) * rank * (D_IN + D_OUT)
    a = np.asarray(params["w"]["kernel"].a)
    assert 0.8 * D_IN**-0.5 < np.abs(a).max() <= D_IN**-0.5
    assert len(np.unique(a)) == a.size, "layers and entries are drawn independently"
    key = jax.random.fold_in(jax.random.key(0), zlib.crc32(b"w/kernel"))
    np.testing.assert_array_equal(a, jax.random.uniform(key, a.shape, jnp.float32, -(D_IN**-0.5), D_IN**-0.5))
    kernel = moved(params)["w"]["kernel"]
    delta = LOW_RANK[name](alpha, rank) * (np.asarray(kernel.a, np.float64) @ np.asarray(kernel.b, np.float64))
    expected = delta + np.asarray(matrix(*stack, D_IN, D_OUT), np.float64)
    np.testing.assert_allclose(kernel.dense(), expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("rank, alpha, stack", [(1, 16.0, ()), (4, 2.0, (LAYERS,)), (D_OUT, 8.0, ())])
def test_lora_b_freezes_orthonormal_columns(rank, alpha, stack):
    """AᵀA = I, signs fixed by R's diagonal in A R = the draw; r d_out parameters, W + alpha / r · A B."""
    params = adapted(f"lora_b(rank={rank}, alpha={alpha})", shape=(*stack, D_IN, D_OUT))
    trainable, _ = tree.split(params, masks.declared(params, 0))
    assert list(tree.flatten(trainable)) == ["w/kernel/b"]
    assert tree.count(trainable) == np.prod(stack, dtype=int) * rank * D_OUT
    kernel = moved(params)["w"]["kernel"]
    a, b = np.asarray(kernel.a, np.float64), np.asarray(kernel.b, np.float64)
    np.testing.assert_allclose(np.swapaxes(a, -1, -2) @ a, np.broadcast_to(np.eye(rank), (*stack, rank, rank)), atol=1e-6)
    np.testing.assert_allclose(kernel.dense(), matrix(*stack, D_IN, D_OUT) + alpha / rank * (a @ b), rtol=0, atol=1e-5)
    key = jax.random.fold_in(jax.random.key(0), zlib.crc32(b"w/kernel"))
    draw = np.asarray(jax.random.normal(key, (*stack, D_IN, rank)), np.float64)
    assert (np.diagonal(np.swapaxes(a, -1, -2) @ draw, axis1=-2, axis2=-1) > 0).all()


@pytest.mark.parametrize("rank, alpha, stack", [(1, 16.0, ()), (4, 2.0, (LAYERS,)), (D_OUT, 8.0, ())])
def test_pissa_splits_the_spectrum(rank, alpha, stack):
    """s A B is the best rank-r part, AᵀA = B Bᵀ = S_r / s, the base holds what is left."""
    w = np.asarray(matrix(*stack, D_IN, D_OUT), np.float64)
    kernel = adapted(f"pissa(rank={rank}, alpha={alpha})", shape=w.shape)["w"]["kernel"]
    a, b, scale = np.asarray(kernel.a, np.float64), np.asarray(kernel.b, np.float64), alpha / rank
    u, s, v = np.linalg.svd(w, full_matrices=False)
    top = (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]
    # float32 turns the cut a little where the singular values on both sides of it are close
    np.testing.assert_allclose(scale * (a @ b), top, rtol=0, atol=1e-4)
    np.testing.assert_allclose(kernel.base, w - top, rtol=0, atol=1e-4)
    sizes = s[..., None, :rank] / scale * np.eye(rank)
    np.testing.assert_allclose(np.swapaxes(a, -1, -2) @ a, sizes, rtol=0, atol=1e-4)
    np.testing.assert_allclose(b @ np.swapaxes(b, -1, -2), sizes, rtol=0, atol=1e-4)


WIDTHS = [(768, 3072), (3072, 768)] * 6  # the stack that the counts in the design are of


def mlp(params, x, multiply=kernels.dot):
    for layer in params.values():
        x = jnp.tanh(multiply(layer["kernel"], x))
    return jnp.square(x).mean()


def mlp_flops(name=None, multiply=kernels.dot):
    rules = [(".*", name)] if name else []
    plain = {f"w{i:02d}": {"kernel": jax.ShapeDtypeStruct(s, jnp.float32)} for i, s in enumerate(WIDTHS)}
    params = jax.eval_shape(lambda p: kernels.adapt(p, rules, jax.random.key(0)), plain)
    mask = masks.declared(params, 0) if name else jax.tree.map(lambda _: True, params)
    return step_flops(lambda p, x: mlp(p, x, multiply), params, mask, jax.ShapeDtypeStruct((2048, 768), jnp.float32))


@pytest.fixture(scope="module")
def full_flops():
    """Forward, input gradient (not of the first layer), weight gradient: 35 products."""
    counted = mlp_flops()
    assert counted == pytest.approx(35 * 2 * 2048 * 768 * 3072, rel=0.01)
    return counted


@pytest.mark.parametrize("name", KERNELS)
def test_the_base_is_never_differentiated_nor_materialised(name, full_flops):
    assert mlp_flops(name) < 0.75 * full_flops


def test_the_count_would_see_a_materialised_weight(full_flops):
    """The test above can fail: x (W + A B) costs more than full fine-tuning."""
    assert mlp_flops("lora(rank=8)", multiply=lambda w, x: x @ w.dense()) > full_flops


@pytest.mark.parametrize("name", KERNELS)
def test_jit_remat_and_sharding_leave_the_loss_alone(name):
    weights = {n: {"kernel": matrix(LAYERS, 32, 32, seed=i) * 0.2} for i, n in enumerate(("q", "out"))}
    params = moved(kernels.adapt({"layers": {"attn": weights}}, [(".*", name)], jax.random.key(0)), size=0.02)
    trainable, frozen = tree.split(params, masks.declared(params, 0))
    x = matrix(8, 32, seed=5)

    def loss(t, f, x, wrap=lambda body: body):
        layers = tree.join(t, f)["layers"]["attn"]
        body = wrap(lambda x, w: (jnp.tanh(kernels.dot(w["out"]["kernel"], kernels.dot(w["q"]["kernel"], x))), None))
        return jnp.square(jax.lax.scan(body, x, layers)[0]).mean()

    with jax.disable_jit():
        expected = jax.value_and_grad(loss)(trainable, frozen, x)
    mesh = parallel.make_mesh(2, 2, 2)
    spread = [parallel.shard(t, mesh) for t in (trainable, frozen)]
    assert any(not s.is_fully_replicated for s in (leaf.sharding for leaf in jax.tree.leaves(spread[1])))
    runs = {
        "jit": jax.jit(jax.value_and_grad(loss))(trainable, frozen, x),
        "remat": jax.value_and_grad(lambda t, f, x: loss(t, f, x, jax.checkpoint))(trainable, frozen, x),
        "sharded": jax.jit(jax.value_and_grad(loss))(*spread, parallel.shard_batch({"x": x}, mesh)["x"]),
    }
    for value, grads in runs.values():
        np.testing.assert_allclose(value, expected[0], rtol=1e-5)
        assert_trees_close(grads, expected[1], rtol=1e-4, atol=2e-6)


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
