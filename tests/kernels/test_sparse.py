"""Sparse and sliced kernels against planted matrices, numpy restatements and masked steps of the full model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ft_jax import kernels, masks, tree
from ft_jax.errors import UserError
from ft_jax.kernels import sparse
from tests.helpers import assert_trees_close, inputs, make_batch, make_model, make_params

COUNTS = {
    **dict.fromkeys(("sparse", "sara"), lambda d_in, d_out, share, **_: round(share * d_in * d_out)),
    "dsee": lambda d_in, d_out, rank, entries, **_: rank * (d_in + d_out) + entries,
    "sltrain": lambda d_in, d_out, rank, share, **_: rank * (d_in + d_out) + round(share * d_in * d_out),
    "shira": lambda d_in, d_out, rank: rank * (d_in + d_out),
    "s2ft": lambda d_in, d_out, share, **_: round(share * d_in) * d_out,
}
D_IN, D_OUT, LAYERS = 24, 16, 3


def matrix(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def put(text, w, seed=0):
    return kernels.adapt({"w": {"kernel": jnp.asarray(w)}}, [("w/kernel", text)], jax.random.key(seed))["w"]["kernel"]


def moved(kernel, seed=1):
    mask = masks.declared(kernel, 0)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda m, x: x + jnp.asarray(rng.standard_normal(x.shape), x.dtype) if m else x, mask, kernel)


def scattered(values, places, shape):
    out = np.zeros((*shape[:-2], shape[-2] * shape[-1]))
    np.put_along_axis(out, np.asarray(places), np.asarray(values, np.float64), -1)
    return out.reshape(shape)


@pytest.mark.parametrize("stack", [(), (LAYERS,)], ids=["single", "stacked"])
@pytest.mark.parametrize("text, sign", [("sparse(share=0.1)", 1), ("sparse(share=0.02, pick=smallest)", -1), ("sara", -1)])
def test_the_places_are_the_largest_or_smallest_weights(text, sign, stack):
    w = matrix(*stack, D_IN, D_OUT)
    kernel = moved(put(text, w))
    n = kernel.values.shape[-1]
    expected = np.sort(np.argsort(-sign * np.abs(w).reshape(*stack, -1), axis=-1)[..., :n], axis=-1)
    np.testing.assert_array_equal(kernel.places, expected)
    assert kernel.places.dtype == jnp.int32
    full = w + scattered(kernel.values, kernel.places, w.shape)
    np.testing.assert_allclose(kernel.dense(), full, rtol=0, atol=1e-6)
    assert np.count_nonzero(np.asarray(kernel.dense()) != w) == n * int(np.prod(stack))


def test_shira_changes_its_places_alone():
    w = matrix(LAYERS, D_IN, D_OUT)
    kernel = moved(put("shira(rank=4)", w))
    places = np.asarray(kernel.places)
    assert places.shape == (LAYERS, 4 * (D_IN + D_OUT)) and all(len(set(p)) == len(p) for p in places)
    assert not np.array_equal(places[0], places[1])
    np.testing.assert_allclose(kernel.dense(), w + scattered(kernel.values, places, w.shape), rtol=0, atol=1e-6)


def test_random_places_differ_by_layer_and_are_as_many_as_asked():
    kernel = put("sparse(share=0.25, pick=random)", matrix(LAYERS, D_IN, D_OUT))
    rows = [set(r) for r in np.asarray(kernel.places).tolist()]
    assert all(len(r) == D_IN * D_OUT // 4 for r in rows) and len({frozenset(r) for r in rows}) == LAYERS
    assert set.union(*rows) <= set(range(D_IN * D_OUT))


def test_the_values_gradient_is_that_of_the_full_matrix_at_their_places():
    w, x, g = matrix(D_IN, D_OUT), matrix(2, 5, D_IN, seed=1), matrix(2, 5, D_OUT, seed=2)
    kernel = moved(put("sparse(share=0.2, pick=random)", w))
    got, on_x = jax.grad(lambda v, x: (kernel.replace(values=v).dot(x) * g).sum(), (0, 1))(kernel.values, jnp.asarray(x))
    dense = np.einsum("bti,bto->io", x.astype(np.float64), g)
    np.testing.assert_allclose(got, dense.reshape(-1)[np.asarray(kernel.places)], rtol=0, atol=1e-5)
    np.testing.assert_allclose(on_x, g @ np.asarray(kernel.dense(), np.float64).T, rtol=0, atol=2e-5)


@pytest.mark.parametrize("stack", [(), (LAYERS,)], ids=["single", "stacked"])
def test_regrowing_drops_the_smallest_changes_and_grows_the_largest_slopes(stack):
    w, slope = matrix(*stack, D_IN, D_OUT), matrix(*stack, D_IN, D_OUT, seed=4)
    kernel = moved(put("sparse(share=0.1)", w))
    new = sparse.regrow(kernel, jnp.asarray(slope), 10)
    n = kernel.values.shape[-1]
    for i in np.ndindex(*stack):
        values, places = np.asarray(kernel.values[i]), np.asarray(kernel.places[i])
        kept = np.argsort(-np.abs(values))[: n - 10]
        outside = np.setdiff1d(np.arange(D_IN * D_OUT), places)
        grown = outside[np.argsort(-np.abs(slope[i].reshape(-1)[outside]))[:10]]
        expected = dict(zip(places[kept].tolist(), values[kept].tolist(), strict=True)) | dict.fromkeys(grown.tolist(), 0.0)
        assert dict(zip(np.asarray(new.places[i]).tolist(), np.asarray(new.values[i]).tolist(), strict=True)) == expected
        assert (np.diff(new.places[i]) > 0).all()
    with pytest.raises(UserError, match="cannot move 39 of 38 places in a matrix of 384 weights"):
        sparse.regrow(kernel, jnp.asarray(slope), 39)


def test_dsee_finds_planted_spikes_in_a_low_rank_matrix():
    """W = L + S of rank 2 with 12 large entries: the alternating steps give exactly those places."""
    low = matrix(LAYERS, D_IN, 2) @ matrix(LAYERS, 2, D_OUT, seed=1)
    places = np.stack([np.sort(np.random.default_rng(i).choice(D_IN * D_OUT, 12, replace=False)) for i in range(LAYERS)])
    spikes = scattered(6 * np.where(matrix(LAYERS, 12, seed=3) > 0, 1, -1), places, low.shape)
    w = (low + spikes).astype(np.float32)
    kernel = put("dsee(rank=2, entries=12, turns=30)", w)
    np.testing.assert_array_equal(kernel.places, places)
    np.testing.assert_array_equal(kernel.dense(), w)
    kernel = moved(kernel)
    a, b = (np.asarray(x, np.float64) for x in (kernel.base.a, kernel.base.b))
    expected = w + 16.0 / 2 * (a @ b) + scattered(kernel.values, kernel.places, w.shape)
    np.testing.assert_allclose(kernel.dense(), expected, rtol=0, atol=2e-5)
    assert set(tree.flatten(tree.split(kernel, masks.declared(kernel, 0))[0])) == {"base/a", "base/b", "values"}


def test_sltrain_is_a_product_plus_a_random_support_and_forgets_w():
    w = matrix(LAYERS, D_IN, D_OUT)
    kernel = put("sltrain(rank=4, alpha=8, share=0.1)", w)
    values, a = np.asarray(kernel.values), np.asarray(kernel.base.a)
    for x in (values, a):
        assert 0.8 * D_IN**-0.5 < np.abs(x).max() <= D_IN**-0.5 and len(np.unique(x)) == x.size
    np.testing.assert_allclose(kernel.dense(), scattered(values, kernel.places, w.shape), rtol=0, atol=1e-7)
    assert kernel.shape == w.shape
    kernel = moved(kernel)
    product = 8 / 4 * (np.asarray(kernel.base.a, np.float64) @ np.asarray(kernel.base.b, np.float64))
    expected = product + scattered(kernel.values, kernel.places, w.shape)
    np.testing.assert_allclose(kernel.dense(), expected, rtol=0, atol=1e-5)
    assert set(tree.flatten(tree.split(kernel, masks.declared(kernel, 0))[0])) == {"base/a", "base/b", "values"}
    assert jax.tree.all(jax.tree.map(lambda x, y: (x == y).all(), put("sltrain", w), put("sltrain", 0 * w)))


def test_saras_nuclear_norm_and_its_slope():
    w = matrix(LAYERS, D_IN, D_OUT)
    kernel = moved(put("sara(share=0.3, norm=2)", w))
    np.testing.assert_array_equal(kernel.weight, [2, 2, 2])
    assert put("sara(share=0.3)", w).weight is None
    kept = scattered(np.take_along_axis(w.reshape(LAYERS, -1), np.asarray(kernel.places), -1) + kernel.values, kernel.places, w.shape)
    u, s, v = np.linalg.svd(kept, full_matrices=False)
    np.testing.assert_allclose(kernel.penalty(), s.sum(-1), rtol=1e-5)
    slope = jax.grad(lambda k: k.penalty().sum(), allow_int=True)(kernel)
    expected = np.take_along_axis((u @ v).reshape(LAYERS, -1), np.asarray(kernel.places), -1)
    np.testing.assert_allclose(slope.values, expected, rtol=0, atol=1e-4)
    assert not np.asarray(slope.base).any()


def test_slices_are_the_first_rows_or_columns():
    w = matrix(LAYERS, D_IN, D_OUT)
    for text, at in (("s2ft(share=0.25)", np.s_[:, :6]), ("s2ft(share=0.25, side=out)", np.s_[:, :, :4])):
        start = put(text, w)
        np.testing.assert_array_equal(start.dense(), w)
        kernel = moved(start)
        expected = w.copy()
        expected[at] += kernel.values
        np.testing.assert_array_equal(kernel.dense(), expected)


@pytest.mark.parametrize("family", ["bert", "llama", "qwen2"])
def test_reordered_units_leave_the_model_and_come_back(family):
    model = make_model(family)
    params, batch = make_params(model), inputs(make_batch(model))
    rng, layers = np.random.default_rng(0), model.config.num_layers
    heads = 4 if family == "bert" else 2
    orders = {"heads": np.stack([np.roll(np.arange(heads), i + 1) for i in range(layers)]),
              "channels": sparse.first(rng.permuted(np.tile(np.arange(48), (layers, 1)), axis=1)[:, :5], 48)}  # fmt: skip
    other = sparse.co_permute(params, **orders)
    assert not np.array_equal(other["layers"]["mlp"]["up"]["kernel"], params["layers"]["mlp"]["up"]["kernel"])
    assert not np.array_equal(other["layers"]["attn"]["out"]["kernel"], params["layers"]["attn"]["out"]["kernel"])
    logits = [np.asarray(jax.jit(model.apply)(p, batch)) for p in (params, other)]
    np.testing.assert_allclose(*logits, rtol=0, atol=2e-5)
    back = sparse.co_permute(other, **{k: np.argsort(o) for k, o in orders.items()})
    assert_trees_close(back, params, rtol=0)


def test_s2ft_after_co_permutation_is_a_masked_step_on_the_chosen_channels():
    """SGD on the two dense slices equals SGD on the whole pair with all but the chosen channels masked."""
    model, rate = make_model("llama"), 0.1
    params, batch = make_params(model), inputs(make_batch(model))
    target = matrix(*np.asarray(jax.eval_shape(model.apply, params, batch).shape), seed=5)
    chosen = np.stack([np.random.default_rng(i).choice(48, 6, replace=False) for i in range(model.config.num_layers)])
    order = sparse.first(chosen, 48)
    assert (order[:, :6] == chosen).all()

    def loss(p):
        return jnp.square(model.apply(p, batch) - target).mean()

    rules = [("layers/mlp/(up|gate)/kernel", "s2ft(share=0.125, side=out)"), ("layers/mlp/down/kernel", "s2ft(share=0.125)")]
    tuned = kernels.adapt(sparse.co_permute(params, channels=order), rules, jax.random.key(0))
    trainable, frozen = tree.split(tuned, masks.declared(tuned, 0))
    grads = jax.jit(jax.grad(lambda t: loss(tree.join(t, frozen))))(trainable)
    stepped = jax.tree.map(lambda x, g: x - rate * g, trainable, grads)
    after = sparse.co_permute(kernels.merge(tree.join(stepped, frozen)), channels=np.argsort(order))
    full = jax.jit(jax.grad(loss))(params)
    assert len(tree.flatten(trainable)) == 3
    for path, leaf in tree.flatten(params).items():
        expected = np.array(leaf)
        axis = {"layers/mlp/up/kernel": 2, "layers/mlp/gate/kernel": 2, "layers/mlp/down/kernel": 1}.get(path)
        for i, row in enumerate(chosen if axis else ()):
            at = (i, slice(None), row) if axis == 2 else (i, row)
            expected[at] -= rate * np.asarray(tree.flatten(full)[path])[at]
        assert axis is None or np.abs(expected - leaf).max() > 1e-3
        np.testing.assert_allclose(tree.flatten(after)[path], expected, rtol=0, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("text, words", [
    ("sparse(share=0.0)", ["share 0.0 of the weights", "nearest: 0.00260417"]),
    ("sara(share=1.5)", ["share 1.5 of the weights", "nearest: 1"]),
    ("sparse(pick=larges)", ["pick 'larges'", "nearest: 'largest'"]),
    ("dsee(rank=17)", ["rank 17 does not fit a 24x16 matrix", "largest: 16"]),
    ("dsee(entries=385)", ["entries 385 do not fit a 24x16 matrix", "largest: 384"]),
    ("sltrain(rank=0)", ["rank 0 does not fit"]),
    ("shira(rank=10)", ["rank 10 makes 400 places, a 24x16 matrix has 384", "largest rank: 9"]),
    ("shira(rank=0)", ["rank 0 makes 0 places"]),
    ("s2ft(side=inn)", ["side 'inn'", "nearest: 'in'"]),
    ("s2ft(share=2.0)", ["share 2.0"]),
], ids=lambda x: x if isinstance(x, str) else "")  # fmt: skip
def test_an_unfit_rule_is_one_line_that_names_the_leaf(text, words):
    with pytest.raises(UserError) as error:
        put(text, matrix(D_IN, D_OUT))
    assert all(w in str(error.value) for w in ["w/kernel", *words]), str(error.value)
    assert "\n" not in str(error.value)


def test_an_unfit_order_is_said():
    model = make_model("llama")
    params, layers = make_params(model), model.config.num_layers
    with pytest.raises(UserError, match="nothing is coupled by 'chanels'; nearest: 'channels'"):
        sparse.co_permute(params, chanels=np.tile(np.arange(48), (layers, 1)))
    with pytest.raises(UserError, match="no permutation of 0 … 47 in each layer"):
        sparse.co_permute(params, channels=np.zeros((layers, 48), int))
    with pytest.raises(UserError, match=r"layers/mlp/down/kernel \(shape .*\) is no stack of 3 plain matrices with 7 units"):
        sparse.co_permute(params, channels=np.tile(np.arange(7), (layers, 1)))
    with pytest.raises(UserError, match="are not different numbers below 4"):
        sparse.first([[1, 1]], 4)


def test_a_small_delta_of_a_bfloat16_matrix_is_not_rounded_before_it_is_added():
    """Float32 activations see S whole, and the gradient sums all tokens, over the end of a block too."""
    w = jnp.ones((1, 2), jnp.bfloat16)
    kernel = sparse.Sparse(w, jnp.asarray([0.003, 0.0041]), jnp.asarray([0, 1], jnp.int32))
    np.testing.assert_array_equal(kernel.dot(jnp.ones((1, 1), jnp.float32)), 1 + kernel.values[None])
    slope = jax.grad(lambda v: kernel.replace(values=v).dot(jnp.full((70, 1), 2.0, jnp.bfloat16)).astype(jnp.float32).sum())(kernel.values)
    np.testing.assert_array_equal(slope, [140.0, 140.0])
