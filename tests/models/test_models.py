"""What holds for every model whatever its weights: names, padding, packing, causality, remat, precision, the scan."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ft_jax import models, tree
from ft_jax.errors import UserError
from ft_jax.models import attention, decoder, encoder
from ft_jax.models import layers as L
from ft_jax.models.attention import attend
from ft_jax.models.config import ARCHITECTURES, HEADS
from tests.helpers import CONFIGS, FAMILIES, assert_trees_close, inputs, make_batch, make_model, make_params

DECODERS = [f for f in FAMILIES if make_model(f).config.kind == "decoder"]
ALL_HEADS = [(f, h) for f in FAMILIES for h in HEADS[make_model(f).config.kind]]
CLOSE = {"rtol": 0, "atol": 2e-5}


@functools.cache
def setting(family, head="none"):
    model = make_model(family, head)
    return model, make_params(model), jax.jit(model.apply)


def padded(batch, left, right, pad):
    """The same rows with more padding on either side."""
    return {k: np.pad(v, ((0, 0), (left, right)), constant_values=pad * (k == "input_ids")) for k, v in batch.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_tiny_model(family):
    assert family in CONFIGS and make_model(family).config.family == family


@pytest.mark.parametrize("family, head", ALL_HEADS)
def test_every_weight_has_one_name(family, head):
    model = make_model(family, head)
    table, shapes = models.names(model.config), tree.flatten(model.shapes())
    assert set(table) == set(shapes)
    assert len(set(table.values())) == len(table)
    assert all(("{i}" in name) == path.startswith("layers/") for path, name in table.items())
    assert all(x.dtype == jnp.float32 for x in shapes.values())
    assert {x.shape[0] for p, x in shapes.items() if p.startswith("layers/")} == {3}


@pytest.mark.parametrize("family, head", ALL_HEADS)
def test_configs_survive_the_way_to_hugging_face_and_back(family, head):
    config = make_model(family, head, num_labels=3 if head in ("classification", "prototype") else 2).config
    raw = models.config_to_hf(config)
    assert models.config_from_hf(raw) == config
    assert {k: raw[k] for k in CONFIGS[family]} == CONFIGS[family]
    assert raw["architectures"][0] in ARCHITECTURES[family].values()


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_init_draws_weights_and_leaves_norms_alone(family):
    model = make_model(family, hidden_size=64)
    flat = tree.flatten(jax.jit(model.init)(jax.random.key(0)))
    assert {p: x.shape for p, x in flat.items()} == {p: x.shape for p, x in tree.flatten(model.shapes()).items()}
    for path, x in flat.items():
        start = {"bias": 0.0, "scale": 1.0}.get(path.split("/")[-1])
        if start is None:
            assert 0.018 < x.std() < 0.022, path
            assert not path.startswith("layers/") or not np.allclose(x[0], x[1]), "each layer draws its own"
        else:
            np.testing.assert_array_equal(x, start)


@pytest.mark.parametrize("family", FAMILIES)
def test_real_tokens_do_not_see_padding(family):
    model, params, run = setting(family)
    batch, pad = inputs(make_batch(model, rows=3, length=8)), model.config.pad_token_id
    expected, real = np.asarray(run(params, batch)), batch["attention_mask"] == 1
    assert not real.all()
    garbage = {**batch, "input_ids": np.where(real, batch["input_ids"], 7).astype(np.int32)}
    np.testing.assert_allclose(run(params, garbage)[real], expected[real], **CLOSE)
    sides = [(0, 4)] + [(3, 1)] * (family != "bert")  # BERT counts positions from the first column
    for left, right in sides:
        out = run(params, padded(batch, left, right, pad))[:, left : left + 8]
        np.testing.assert_allclose(out[real], expected[real], **CLOSE)


@pytest.mark.parametrize("family, head", [("bert", "pooled"), ("bert", "classification"), ("llama", "prototype"),
                                          ("llama", "classification")])  # fmt: skip
def test_outputs_of_a_sequence_do_not_see_padding(family, head):
    model, params, run = setting(family, head)
    batch = inputs(make_batch(model, rows=3, length=8))
    expected = run(params, batch)
    assert expected.shape == (3, 32 if head == "pooled" else 2)
    np.testing.assert_allclose(run(params, padded(batch, 0, 4, model.config.pad_token_id)), expected, **CLOSE)


@pytest.mark.parametrize("family", [*DECODERS, "bert"])
def test_packed_segments_are_separate_sequences(family):
    model, params, run = setting(family)
    ids = make_batch(model, rows=1, length=11, padded=False)["input_ids"][0]
    lengths, total = (5, 6), 14
    packed = {"input_ids": np.full((1, total), 9, np.int32), "segment_ids": np.zeros((1, total), np.int32),
              "positions": np.zeros((1, total), np.int32)}  # fmt: skip
    alone = {"input_ids": np.full((2, total), 9, np.int32), "attention_mask": np.zeros((2, total), np.int32)}
    start = 0
    for i, n in enumerate(lengths):
        part, own = slice(start, start + n), ids[start : start + n]
        packed["input_ids"][0, part], packed["segment_ids"][0, part] = own, i + 1
        packed["positions"][0, part] = np.arange(n)
        alone["input_ids"][i, :n], alone["attention_mask"][i, :n] = own, 1
        start += n
    together, separate = run(params, packed)[0], run(params, alone)
    np.testing.assert_allclose(together[:5], separate[0, :5], **CLOSE)
    np.testing.assert_allclose(together[5:11], separate[1, :6], **CLOSE)
    merged = run(params, packed | {"segment_ids": np.minimum(packed["segment_ids"], 1)})[0]
    assert np.abs(merged[5:11] - together[5:11]).max() > 1e-2, "without the segments they would see each other"


@pytest.mark.parametrize("family, reach", [("llama", 8), ("mistral", 5), ("bert", None)])
def test_a_token_reaches_what_it_may(family, reach):
    """One layer: later tokens only, within the window; both ways in an encoder."""
    model = make_model(family, "none", num_hidden_layers=1)
    params, batch = make_params(model), inputs(make_batch(model, rows=1, length=8, padded=False))
    run = jax.jit(model.apply)
    for t in (0, 2):
        other = {**batch, "input_ids": batch["input_ids"].copy()}
        other["input_ids"][0, t] = 5 + (other["input_ids"][0, t] - 4) % 59
        moved = np.abs(run(params, batch) - run(params, other))[0].max(-1) > 1e-6
        expected = [True] * 8 if reach is None else [t <= i < t + reach for i in range(8)]
        assert moved.tolist() == expected


@pytest.mark.parametrize("family", [pytest.param("bert", marks=pytest.mark.slow), "llama"])
def test_remat_saves_memory_and_leaves_gradients_alone(family):
    outcomes, sizes = {}, {}
    for remat in L.REMAT:
        model = make_model(family, remat=remat, num_hidden_layers=6)
        params, batch = make_params(model), inputs(make_batch(model, rows=4, length=32))

        def loss(params, batch, model=model):
            return jnp.square(model.apply(params, batch, jax.random.key(0))).mean()

        program = jax.jit(jax.value_and_grad(loss)).lower(params, batch).compile()
        sizes[remat] = program.memory_analysis().temp_size_in_bytes
        outcomes[remat] = program(params, batch)
    value, grads = outcomes["none"]
    for again, others in (outcomes["dots"], outcomes["full"]):
        np.testing.assert_allclose(again, value, rtol=1e-5)
        assert_trees_close(others, grads, rtol=1e-3, atol=1e-4 * max(np.abs(g).max() for g in jax.tree.leaves(grads)))
    assert sizes["full"] < sizes["dots"] < sizes["none"] and sizes["full"] < 0.5 * sizes["none"]


@pytest.mark.parametrize("family, head", [("bert", "mlm"), ("roberta", "classification"), ("qwen2", "lm")])
def test_bfloat16_compute_is_close_and_gives_float32_out(family, head):
    model, params, run = setting(family, head)
    batch = inputs(make_batch(model))
    expected = run(params, batch)
    half = make_model(family, head, dtype="bfloat16")
    out, seen = jax.jit(lambda p, b: half.apply(p, b, capture=("q", "block_out")))(params, batch)
    assert out.dtype == jnp.float32 and {x.dtype for x in seen.values()} == {jnp.dtype("bfloat16")}
    real = batch["attention_mask"] == 1 if head != "classification" else slice(None)
    error = np.abs(out - expected)[real]
    assert 0 < error.max() < 0.06 * np.abs(expected).max() and error.mean() < 0.015 * np.abs(expected).max()


@pytest.mark.parametrize("family", ["bert", "llama", "qwen2"])
def test_the_scan_is_a_loop_over_layers(family):
    model, params, _ = setting(family)
    c, batch = model.config, inputs(make_batch(model, rows=2, length=9))
    _, seen = jax.jit(lambda p, b: model.apply(p, b, capture=("embed", "block_out")))(params, batch)
    allowed = jnp.broadcast_to(batch["attention_mask"][:, None, None] > 0, (2, 1, 9, 9))
    if c.kind == "encoder":
        layer, context = encoder.Layer(c, parent=None), allowed
    else:
        tables, distance = L.rope_tables(c, jnp.broadcast_to(jnp.arange(9), (2, 9))), jnp.arange(9)[:, None] - jnp.arange(9)
        layer, context = decoder.Layer(c, parent=None), (allowed & (distance >= 0), distance, *tables)
    step = jax.jit(lambda p, x, extra: layer.apply({"params": p}, x, context, (extra, None), None)[0])
    x = seen["embed"]
    for i in range(c.num_layers):
        extra = () if c.kind == "encoder" else (jnp.asarray(c.windows[i]) if c.windows else None, None)
        x = step(jax.tree.map(lambda w, i=i: w[i], params["layers"]), x, extra)
        np.testing.assert_allclose(seen["block_out"][i], x, **CLOSE)


@pytest.mark.parametrize("dtype, close", [("float32", 2e-6), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("queries", ["causal", "padded"])
@pytest.mark.parametrize("grouped", [1, 3])
def test_attention_in_an_order_of_its_own(grouped, queries, dtype, close):
    """Value and gradients against the library's attention; a row with nothing allowed, and a mask that all queries share."""
    rng, heads = np.random.default_rng(0), 6
    q, k, v, g = (jnp.asarray(rng.standard_normal((2, 5, h, 8)), dtype) for h in (heads, heads // grouped, heads // grouped, heads))
    allowed = jnp.tril(jnp.ones((2, 1, 5, 5), bool)).at[1, 0, 2].set(False)
    if queries == "padded":
        allowed = jnp.asarray(rng.random((2, 1, 1, 5)) < 0.5).at[1].set(False)

    def both(fn):
        y, back = jax.vjp(fn, q, k, v)
        return [y, *back(g)]

    theirs = both(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, mask=allowed))
    for mine, other in zip(both(lambda q, k, v: attention._ordered(q, k, v, allowed)), theirs, strict=True):
        assert mine.dtype == other.dtype == dtype
        np.testing.assert_allclose(np.asarray(mine, np.float32), np.asarray(other, np.float32), atol=close * float(jnp.abs(other).max()))


@pytest.mark.parametrize("grouped", [1, 2])
def test_attention_with_dropout_is_attention(grouped):
    """The path that drops weights, with nothing dropped, against the library's attention."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 6, h, 8)), jnp.float32) for h in (4, 4 // grouped, 4 // grouped))
    allowed = jnp.tril(jnp.ones((2, 1, 6, 6), bool))
    plain, key = attend(q, k, v, allowed), jax.random.key(0)
    np.testing.assert_allclose(attend(q, k, v, allowed, 1e-9, key), plain, atol=1e-6)
    many = jnp.stack([attend(q, k, v, allowed, 0.3, jax.random.fold_in(key, i)) for i in range(200)])
    assert np.abs(many.mean(0) - plain).mean() < 4 * np.abs(many - plain).mean() / np.sqrt(200)


def test_dropout_scales_what_it_keeps():
    x, key = jnp.ones((100, 100)), jax.random.key(0)
    y = L.dropout(x, 0.25, key)
    assert set(np.unique(y).round(6)) == {0.0, np.float32(1 / 0.75).round(6)}
    assert abs(float((y == 0).mean()) - 0.25) < 4 * np.sqrt(0.25 * 0.75 / x.size)
    assert L.dropout(x, 0.25, None) is x and L.dropout(x, 0.0, key) is x


def test_dropout_draws_anew_for_every_layer_and_key():
    """Attention replaced by a large constant: LN(x + dropout(100)) is positive just where it was kept."""
    model = make_model("bert", "none", hidden_dropout_prob=0.5)
    params, batch = make_params(model), inputs(make_batch(model, padded=False))
    layers = params["layers"]
    layers["attn"]["out"] = {"kernel": jnp.zeros((3, 32, 32)), "bias": jnp.full((3, 32), 100.0)}
    layers["attn_norm"] = {"scale": jnp.ones((3, 32)), "bias": jnp.zeros((3, 32))}
    run = jax.jit(lambda seed: model.apply(params, batch, jax.random.key(seed), capture=("ffn_in",))[1]["ffn_in"] > 0)
    first, other = run(0), run(1)
    np.testing.assert_array_equal(first, run(0))
    for kept in (first, other):
        assert abs(float(kept.mean()) - 0.5) < 4 * 0.5 / np.sqrt(kept.size)
    for a, b in ((first[0], first[1]), (first[1], first[2]), (first[0], other[0])):
        assert 0.4 < float((a == b).mean()) < 0.6, "independent draws agree on half"


BAD = [
    ("bert", {"model_type": "gpt2"}, ["model_type 'gpt2' is not supported", "supported: bert, roberta, llama"]),
    ("bert", {"model_type": None}, ["model_type None is not supported", "llama"]),
    ("bert", {"hidden_act": "gelu_neww"}, ["hidden_act 'gelu_neww' is not supported", "nearest: 'gelu_new'"]),
    ("bert", {"position_embedding_type": "relative_key"}, ["'relative_key' is not supported", "supported: absolute"]),
    ("bert", {"num_attention_heads": 5}, ["hidden_size 32 is not a multiple of 5 heads"]),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["rope type 'dynamic'", "supported: default"]),
    ("llama", {"hidden_size": ...}, ["key 'hidden_size' is missing", "llama"]),
    ("roberta", {"max_position_embeddings": ...}, ["key 'max_position_embeddings' is missing"]),
]


@pytest.mark.parametrize("family, change, words", BAD, ids=lambda x: str(x)[:30])
def test_an_unsupported_config_is_one_line_that_lists_what_is_supported(family, change, words):
    raw = {k: v for k, v in {**CONFIGS[family], **change}.items() if v is not ...}
    with pytest.raises(UserError) as error:
        models.config_from_hf(raw)
    assert all(w in str(error.value) for w in words) and "\n" not in str(error.value), str(error.value)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: make_model("bert", "lm"), ["a bert model has no head 'lm'"]),
        (lambda: make_model("llama", "classifcation"), ["no head 'classifcation'", "nearest: 'classification'"]),
        (lambda: make_model("bert", dtype="bfloat"), ["dtype 'bfloat' is not supported", "nearest: 'bfloat16'"]),
        (lambda: make_model("bert", remat="ful"), ["remat 'ful' is not supported", "nearest: 'full'"]),
    ],
)
def test_an_unknown_head_or_precision_names_the_nearest(make, words):
    with pytest.raises(UserError) as error:
        make()
    assert all(w in str(error.value) for w in words)


@pytest.mark.parametrize(
    "architectures, head",
    [(["BertForMaskedLM"], "mlm"), (["BertForSequenceClassification"], "classification"), (["BertModel"], "none"),
     (["BertForQuestionAnswering"], "none"), (None, "none")],
)  # fmt: skip
def test_the_head_follows_the_architecture(architectures, head):
    assert models.config_from_hf({**CONFIGS["bert"], "architectures": architectures}).head == head
    assert models.config_from_hf({**CONFIGS["llama"]}).head == "lm"


def test_mean_pool_is_the_normalised_mean_of_real_tokens():
    rng = np.random.default_rng(0)
    x, mask = rng.standard_normal((3, 5, 4)).astype(np.float32), np.asarray([[1] * 5, [1, 1, 0, 0, 0], [0] * 5])
    pooled = L.mean_pool(jnp.asarray(x), jnp.asarray(mask) > 0)
    for row, own, real in zip(pooled, x, mask, strict=True):
        mean = own[real > 0].mean(0) if real.any() else np.zeros(4)
        np.testing.assert_allclose(row, mean / max(np.linalg.norm(mean), 1e-12), atol=1e-6)
