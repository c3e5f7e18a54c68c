"""Quantised bases against the published code book, numpy restatements and a search over all choices."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ft_jax import kernels, masks, tree
from ft_jax.errors import UserError
from ft_jax.kernels import quantized
from tests.helpers import inputs, make_batch, make_model, make_params

COUNTS = {
    **dict.fromkeys(("int8", "nf4", "nf"), lambda d_in, d_out, **_: 0),
    **dict.fromkeys(("lqlora", "loftq"), lambda d_in, d_out, rank, **_: rank * (d_in + d_out)),
}
# The table that QLoRA's paper (appendix E) and bitsandbytes print.
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]  # fmt: skip
D_IN, D_OUT, LAYERS = 48, 32, 3


def matrix(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def put(text, w):
    return kernels.adapt({"w": {"kernel": jnp.asarray(w)}}, [("w/kernel", text)], jax.random.key(0))["w"]["kernel"]


def blocks_of(w, block):
    """[..., blocks, block] in the order of torch's [out, in], and the way back."""
    rows = np.swapaxes(w, -1, -2)
    shape = (*rows.shape[:-2], -1, block)
    return rows.reshape(shape).astype(np.float64), lambda x: np.swapaxes(x.reshape(rows.shape), -1, -2)


def nearest_in_book(w, book, block):
    rows, back = blocks_of(w, block)
    top = np.abs(rows).max(-1, keepdims=True)
    return back(np.asarray(book, np.float64)[np.abs(rows[..., None] / top[..., None] - book).argmin(-1)] * top)


def test_the_code_book_is_the_published_one():
    np.testing.assert_allclose(quantized.normal_float_book(4), NF4, rtol=0, atol=2e-7)
    for bits in range(2, 9):
        book = quantized.normal_float_book(bits)
        assert len(set(book)) == 2**bits and (np.diff(book) > 0).all() and book[[0, -1]].tolist() == [-1, 1] and 0 in book


@pytest.mark.parametrize("bits", range(2, 9))
def test_packed_codes_come_back(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 5, 24))
    packed = quantized._pack(jnp.asarray(codes), bits)
    assert (packed.shape, packed.dtype) == ((3, 5, 3 * bits), jnp.uint8)
    np.testing.assert_array_equal(quantized._unpack(packed, bits), codes)


@pytest.mark.parametrize("stack", [(), (LAYERS,)], ids=["single", "stacked"])
@pytest.mark.parametrize("text, book, block", [
    ("nf4", NF4, 64), ("nf4(block=16)", NF4, 16), ("nf(bits=4)", NF4, 64),
    ("nf(bits=2, block=32)", quantized.normal_float_book(2), 32), ("nf", quantized.normal_float_book(3), 64),
])  # fmt: skip
def test_a_normal_float_is_the_nearest_in_the_book_times_the_block_maximum(text, book, block, stack):
    w = matrix(*stack, D_IN, D_OUT)
    kernel = put(text, w)
    np.testing.assert_allclose(kernel.dense(), nearest_in_book(w, book, block), rtol=0, atol=1e-6)
    assert kernel.scales.shape == (*stack, D_IN * D_OUT // block)
    assert kernel.bits_per_weight == math.log2(len(book)) + 32 / block


@pytest.mark.parametrize("stack", [(), (LAYERS,)], ids=["single", "stacked"])
@pytest.mark.parametrize("block", [16, D_IN, D_IN * D_OUT])
def test_int8_rounds_to_the_127th_of_the_block_maximum(block, stack):
    w = matrix(*stack, D_IN, D_OUT)
    kernel = put(f"int8(block={block})", w)
    rows, back = blocks_of(w, block)
    step = np.abs(rows).max(-1, keepdims=True) / 127
    np.testing.assert_allclose(kernel.dense(), back(np.round(rows / step) * step), rtol=0, atol=1e-6)
    assert np.abs(np.asarray(kernel.dense()) - w).max() <= 0.5001 * step.max()
    assert kernel.base.dtype == jnp.int8 and kernel.bits_per_weight == 8 + 32 / block


def test_a_matrix_of_zeros_and_one_outlier_survives():
    w = np.zeros((16, 8), np.float32)
    for text in ("nf4(block=16)", "int8(block=16)", "nf4(block=16, double=8)"):
        np.testing.assert_array_equal(put(text, w).dense(), w)
    w[3, 5] = -7.5
    for text in ("nf4(block=16)", "int8(block=16)"):
        np.testing.assert_allclose(put(text, w).dense(), w, rtol=1e-6)


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_double_quantisation_costs_an_eighth_and_little_error(name):
    """QLoRA's figures for blocks of 64 and 256: 0.5 bits a weight become 0.127, and one mean a matrix."""
    w = matrix(256, 128)
    plain, double = put(name, w), put(f"{name}(double=256)", w)
    bits = 4 if name == "nf4" else 8
    assert plain.bits_per_weight == bits + 0.5
    assert double.bits_per_weight == pytest.approx(bits + 8 / 64 + 32 / (64 * 256) + 32 / w.size, rel=1e-9)
    maxima, kept = np.asarray(plain.scales), np.asarray(double.scales.expand())
    steps = np.abs((maxima - maxima.mean()).reshape(-1, 256)).max(-1, keepdims=True) / 127
    assert (np.abs(maxima - kept).reshape(-1, 256) <= 0.501 * steps).all()
    first, second = (np.linalg.norm(k.dense() - w) for k in (plain, double))
    assert second == pytest.approx(first, rel=0.1)


def test_qlora_trains_a_and_b_alone_and_draws_what_lora_draws():
    w = matrix(LAYERS, D_IN, D_OUT)
    qlora, lora, base = (put(t, w) for t in ("lora(rank=4) @ nf4(block=16)", "lora(rank=4)", "nf4(block=16)"))
    assert (type(qlora).__name__, type(qlora.base).__name__) == ("LowRank", "NormalFloat")
    assert (qlora.shape, qlora.dtype) == (w.shape, w.dtype)
    np.testing.assert_array_equal(qlora.a, lora.a)
    np.testing.assert_array_equal(qlora.dense(), base.dense())
    trainable, frozen = tree.split(params := {"w": {"kernel": qlora}}, masks.declared(params, 0))
    assert set(tree.flatten(trainable)) == {"w/kernel/a", "w/kernel/b"}
    assert {str(x.dtype) for x in jax.tree.leaves(frozen["w"]["kernel"].base)} == {"uint8", "float32"}
    x = jnp.asarray(matrix(5, D_IN, seed=1))
    layer = jax.tree.map(lambda leaf: leaf[1], qlora)
    np.testing.assert_allclose(layer.dot(x), x @ qlora.dense()[1], rtol=0, atol=1e-5)


def test_rules_nest_three_deep_and_around_a_quantised_base_only():
    kernel = put("lora_b(rank=2) @ lora(rank=4) @ int8", matrix(D_IN, D_OUT))
    assert [type(k).__name__ for k in (kernel, kernel.base, kernel.base.base)] == ["LowRankB", "LowRank", "Int8"]
    assert kernels.parse_rule("a(x=1) @ b(y=2) @ c") == ("a", {"x": 1, "@": "b(y=2) @ c"})
    with pytest.raises(UserError, match="w/kernel: nf4 takes a plain matrix.* a LowRank kernel"):
        put("nf4 @ lora", matrix(D_IN, D_OUT))


@pytest.mark.slow
def test_a_model_on_a_quantised_base_runs_and_its_merged_form_agrees():
    model = make_model("llama")
    params, batch = make_params(model), inputs(make_batch(model))
    adapted = kernels.adapt(params, [("layers/.*/kernel", "lora(rank=2) @ nf4(block=16)")], jax.random.key(1))
    full, few = (np.asarray(jax.jit(model.apply)(p, batch)) for p in (params, adapted))
    np.testing.assert_allclose(jax.jit(model.apply)(kernels.merge(adapted), batch), few, rtol=0, atol=1e-4)
    assert 1e-3 < np.abs(full - few).max() < np.abs(full).max()


def test_the_backward_pass_keeps_no_floats_of_the_base():
    """Twelve layers' floats would be 12 d² float32 more; the compiled step needs little more than one layer's."""
    d, layers = 128, 12
    shape = jax.eval_shape(lambda w: put("lora(rank=2) @ nf4", w), jax.ShapeDtypeStruct((layers, d, d), jnp.float32))
    trainable, frozen = tree.split({"w": {"kernel": shape}}, masks.declared({"w": {"kernel": shape}}, 0))

    def loss(t, f, x, multiply):
        kernel = tree.join(t, f)["w"]["kernel"]
        return jnp.square(jax.lax.scan(lambda x, w: (jnp.tanh(multiply(w, x)), None), x, kernel)[0]).mean()

    def temporary(multiply):
        x = jax.ShapeDtypeStruct((4, d), jnp.float32)
        step = jax.jit(jax.grad(lambda t, f, x: loss(t, f, x, multiply)))
        return step.lower(trainable, frozen, x).compile().memory_analysis().temp_size_in_bytes

    kept = layers * d * d * 4
    assert temporary(kernels.dot) < kept / 2
    assert temporary(lambda w, x: x @ w.dense()) > kept, "the test can see it"


def reference_lq(w, rank, bits, block, iterations):
    """The loop of the paper in float64 for one matrix; returns every error."""
    q, errors = np.zeros_like(w, np.float64), []
    for _ in range(iterations):
        u, s, v = np.linalg.svd(w - q, full_matrices=False)
        low = (u[:, :rank] * s[:rank]) @ v[:rank]
        q = nearest_in_book(w - low, quantized.normal_float_book(bits), block)
        errors.append(np.linalg.norm(w - q - low))
    return errors


@pytest.mark.parametrize("bits, rank", [(2, 4), (4, 8)])
def test_lq_lora_stops_where_the_error_stops_falling(bits, rank):
    w = matrix(LAYERS, D_IN, D_OUT).astype(np.float64)
    kernel = put(f"lqlora(rank={rank}, bits={bits}, block=32, iterations=20)", w)
    ours = np.linalg.norm(np.asarray(kernel.dense()) - w, axis=(1, 2))
    alone = np.linalg.norm(np.asarray(put(f"nf(bits={bits}, block=32)", w).dense()) - w, axis=(1, 2))
    for layer, error in enumerate(ours):
        errors = reference_lq(w[layer], rank, bits, 32, 20)
        falls = next((i for i in range(1, 20) if errors[i] >= errors[i - 1]), 20)
        # a code on the edge between two values may fall either way in float32
        assert error == pytest.approx(errors[falls - 1], rel=2e-2)
        assert error < errors[0] * 1.001 and error < 0.9 * alone[layer]
    once = put(f"lqlora(rank={rank}, bits={bits}, block=32, iterations=1)", w)
    first = [reference_lq(w[i], rank, bits, 32, 1)[0] for i in range(LAYERS)]
    np.testing.assert_allclose(np.linalg.norm(np.asarray(once.dense()) - w, axis=(1, 2)), first, rtol=1e-3)


@pytest.mark.parametrize("iterations", [1, 4])
def test_loftq_puts_the_best_low_rank_part_of_the_error_around_a_quantised_matrix(iterations):
    """Its first turn is NF of W itself and the SVD of what that loses; each further one quantises what A B leaves."""
    w = matrix(LAYERS, D_IN, D_OUT).astype(np.float64)
    kernel = put(f"loftq(rank=6, bits=3, block=32, iterations={iterations})", w)
    for layer in range(LAYERS):
        low = np.zeros_like(w[layer])
        for _ in range(iterations):
            q = np.asarray(put("nf(bits=3, block=32)", w[layer] - low).dense(), np.float64)
            u, sizes, v = np.linalg.svd(w[layer] - q, full_matrices=False)
            low = (u[:, :6] * sizes[:6]) @ v[:6]
        error = np.linalg.norm(kernel.dense()[layer] - w[layer])
        # a code on the edge between two values may fall either way in float32
        assert error == pytest.approx(np.linalg.norm(q + low - w[layer]), rel=2e-2 if iterations > 1 else 1e-3)
        assert error < 0.9 * np.linalg.norm(put("nf(bits=3, block=32)", w[layer]).dense() - w[layer])


RULES = ("nf(bits=2, block=32)", "nf(bits=3, block=32)", "nf4(block=32)", "int8(block=32)")


@pytest.mark.parametrize("budget", [3.0, 3.7, 5.5, 20])
def test_the_bit_budget_is_spent_as_a_search_over_all_choices_would(budget):
    params = {n: {"kernel": jnp.asarray(matrix(2, 16, 8 * (i % 2 + 1), seed=i) * (i + 1))} for i, n in enumerate("abcd")}
    table = quantized.error_table(params, ".*/kernel", RULES)
    assert list(table) == [f"{n}/kernel" for n in "abcd"] and all(tuple(row) == RULES for row in table.values())
    weights = sum(x.size for x in jax.tree.leaves(params))

    def total(rules, what):
        return sum(table[path][rule][what] for path, rule in zip(table, rules, strict=True))

    every = [r for r in itertools.product(RULES, repeat=4) if total(r, 1) <= budget * weights]
    best = min(total(r, 0) for r in every)
    chosen = quantized.allocate_bits(table, budget)
    assert [p.replace("\\", "") for p, _ in chosen] == list(table)
    rules = [rule for _, rule in chosen]
    assert total(rules, 1) <= budget * weights and total(rules, 0) == pytest.approx(best, rel=1e-6)
    adapted = kernels.adapt(params, [(p, f"lora(rank=2) @ {rule}") for p, rule in chosen], jax.random.key(0))
    spent = sum(k["kernel"].base.bits_per_weight * math.prod(k["kernel"].shape) for k in adapted.values())
    assert spent == pytest.approx(total(rules, 1))
    error = sum(np.square(np.asarray(adapted[n]["kernel"].dense() - params[n]["kernel"])).sum() for n in "abcd")
    assert error == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("text, words", [
    ("nf4(block=50)", ["w/kernel", "block 50 does not divide the 1536 weights of a 48x32 matrix", "nearest: 48"]),
    ("int8(block=0)", ["w/kernel", "block 0 does not divide", "nearest: 1"]),
    ("nf4(double=7)", ["w/kernel", "double 7 does not divide the 24 block maxima", "nearest: 6"]),
    ("nf(bits=9)", ["w/kernel", "nf takes 2 to 8 bits, not 9", "nearest: 8"]),
    ("lqlora(rank=33)", ["w/kernel", "rank 33 does not fit a 48x32 matrix", "largest: 32"]),
    ("lqlora(iterations=0)", ["w/kernel", "iterations 0"]),
    ("loftq(iterations=0)", ["w/kernel", "iterations 0"]),
    ("loftq(bits=9)", ["w/kernel", "loftq takes 2 to 8 bits, not 9"]),
    ("lora(rank=2) @ nf44", ["w/kernel", "no kernel called 'nf44'", "nearest: 'nf4'"]),
    ("lora(rank=2) @", ["cannot read the method ''", "outer(…) @ inner(…)"]),
    ("lora(rank=2) @ nf4(block)", ["cannot read 'block' in ' nf4(block)'"]),
], ids=lambda x: x if isinstance(x, str) else "")  # fmt: skip
def test_an_unfit_rule_is_one_line_that_names_the_leaf(text, words):
    with pytest.raises(UserError) as error:
        put(text, matrix(D_IN, D_OUT))
    assert all(w in str(error.value) for w in words), str(error.value)
    assert "\n" not in str(error.value)


def test_what_cannot_be_packed_or_paid_is_said():
    with pytest.raises(UserError, match="w/kernel: nf4 packs eight weights of an input side.*12x16 matrix; int8 takes any"):
        put("nf4", matrix(12, 16))
    params = {"w": {"kernel": jnp.asarray(matrix(D_IN, D_OUT))}}
    with pytest.raises(UserError, match="budget of 1.5 bits a weight.*nearest: 2.5"):
        quantized.allocate_bits(quantized.error_table(params, ".*", ["nf(bits=2)"]), 1.5)
    with pytest.raises(UserError, match=r"w/kernel: 'lora\(rank=2\)' quantises nothing"):
        quantized.error_table(params, ".*", ["lora(rank=2)"])


def test_a_config_names_qlora_in_one_word():
    from configs.train import get_config

    rule = "lora(rank=4,alpha=8) @ nf4(block=32)"
    cfg = get_config(f"method={rule}")
    assert [tuple(r) for r in cfg.method.kernels] == [(r"layers/(attn|mlp)/\w+/kernel", rule)]
    assert cfg.optimizer.learning_rate == get_config("method=lora").optimizer.learning_rate
