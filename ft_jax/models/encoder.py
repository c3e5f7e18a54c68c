"""Bidirectional encoders: BERT, RoBERTa, MiniLM."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ft_jax.models import extend, scored
from ft_jax.models import layers as L
from ft_jax.models.attention import attend
from ft_jax.models.config import ModelConfig

_LAYER = {
    "layers/attn/q": "encoder.layer.{i}.attention.self.query",
    "layers/attn/k": "encoder.layer.{i}.attention.self.key",
    "layers/attn/v": "encoder.layer.{i}.attention.self.value",
    "layers/attn/out": "encoder.layer.{i}.attention.output.dense",
    "layers/attn_norm": "encoder.layer.{i}.attention.output.LayerNorm",
    "layers/mlp/up": "encoder.layer.{i}.intermediate.dense",
    "layers/mlp/down": "encoder.layer.{i}.output.dense",
    "layers/mlp_norm": "encoder.layer.{i}.output.LayerNorm",
    "embed/norm": "embeddings.LayerNorm",
}
_EMBED = {
    "embed/tokens/embedding": "embeddings.word_embeddings.weight",
    "embed/positions/embedding": "embeddings.position_embeddings.weight",
    "embed/types/embedding": "embeddings.token_type_embeddings.weight",
}
_HEADS = {
    "bert": {
        "classification": {"pooler": "bert.pooler.dense", "head": "classifier"},
        "mlm": {"mlm/dense": "cls.predictions.transform.dense", "mlm/norm": "cls.predictions.transform.LayerNorm",
                "mlm/bias": "cls.predictions.bias"},
    },
    "roberta": {
        "classification": {"pooler": "classifier.dense", "head": "classifier.out_proj"},
        "mlm": {"mlm/dense": "lm_head.dense", "mlm/norm": "lm_head.layer_norm", "mlm/bias": "lm_head.bias"},
    },
}  # fmt: skip
_PROTOTYPE = {"head": "prototype"}


def names(config):
    """``{our path: checkpoint name}`` for this family and head; one table, read both ways."""
    prefix = config.family + "."
    modules = {path: prefix + name for path, name in _LAYER.items()}
    modules |= _PROTOTYPE if config.head == "prototype" else _HEADS[config.family].get(config.weights_head, {})
    out = {path: prefix + name for path, name in _EMBED.items()}
    for path, name in modules.items():
        if path == "mlm/bias":
            out[path] = name
            continue
        leaf = "scale" if path.endswith("norm") else "kernel"
        out |= {f"{path}/{leaf}": f"{name}.weight", f"{path}/bias": f"{name}.bias"}
    return out


class Layer(nn.Module):
    """Post-norm transformer block: x ← LN(x + attention(x)); x ← LN(x + MLP(x))."""

    config: ModelConfig
    capture: tuple[str, ...] = ()
    skip: int = 0
    mesh: Any = None  # what activations are spread over

    @nn.compact
    def __call__(self, x, context, per_layer, rng):
        c, given = self.config, per_layer[1] or {}
        tap = L.Tapped(L.taps_of(self), self.capture, self.skip, given.get("pool"))
        rngs = (None,) * 3 if rng is None else jax.random.split(rng, 3)
        x = tap("attn_in", x)
        heads = Attention(c, self.mesh, name="attn")(x, context, given.get("prefix"), tap, rngs[0])
        x = self.joined("attn_out", "attn_norm", x, heads, tap, rngs[1])
        x = tap("ffn_in", x)
        x = self.joined("ffn_out", "mlp_norm", x, MLP(c, name="mlp")(x, tap), tap, rngs[2])
        return tap("block_out", x), tap.seen

    def joined(self, site, norm, x, y, tap, rng):
        """LN(x + y) of a sub-layer's input and output."""
        norm = L.LayerNorm(self.config.norm_eps, name=norm)

        def after(y):
            return norm(x + L.dropout(y, self.config.hidden_dropout, rng))

        return after(tap(site, y, after))


class Attention(nn.Module):
    config: ModelConfig
    mesh: Any = None

    @nn.compact
    def __call__(self, x, allowed, prefix, tap, rng):
        c = self.config
        shape = (*x.shape[:2], c.num_heads, c.head_dim)
        q, k, v = (tap(n, L.Dense(c.num_heads * c.head_dim, name=n)(x)).reshape(shape) for n in "qkv")
        k, v, allowed = extend.before_tokens(prefix, k, v, allowed)
        y = attend(q, k, v, allowed, c.attention_dropout, rng, self.mesh)
        return L.Dense(c.hidden_size, name="out")(tap("heads", y.reshape(*x.shape[:2], -1)))


class MLP(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x, tap):
        c = self.config
        y = L.kept_inputs(L.ACTIVATION_FNS[c.activation], L.Dense(c.intermediate_size, name="up")(x))
        return L.Dense(c.hidden_size, name="down")(tap("ffn_hidden", y))


class Embeddings(nn.Module):
    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self, inputs, taps):
        c, ids = self.config, inputs["input_ids"]
        positions, roberta = inputs.get("positions"), c.family == "roberta"
        if positions is None:
            if roberta:  # counts real tokens from pad_token_id + 1, pads stay at pad_token_id
                real = (ids != c.pad_token_id).astype(jnp.int32)
                positions = jnp.cumsum(real, 1) * real + c.pad_token_id
            else:
                positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        positions = extend.numbered(taps, positions, roberta * (1 + (c.pad_token_id or 0)))
        types = inputs.get("token_type_ids", jnp.zeros_like(ids))
        if prompt := extend.lengths(taps)[0]:
            types = jnp.pad(types, ((0, 0), (prompt, 0)))
        x = L.Embed(c.vocab_size, c.hidden_size, name="tokens")(ids, self.dtype)
        x = extend.prompted(taps, x, inputs)
        x = x + L.Embed(c.max_positions, c.hidden_size, name="positions")(positions, self.dtype)
        x = x + L.Embed(c.type_vocab_size, c.hidden_size, name="types")(types, self.dtype)
        return L.LayerNorm(c.norm_eps, name="norm")(x)


class Encoder(nn.Module):
    """Logits, embeddings or hidden states of a batch, by ``config.head``."""

    config: ModelConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    capture: tuple[str, ...] = ()
    mesh: Any = None

    @nn.compact
    def __call__(self, inputs, rng=None, targets=None):
        c, taps = self.config, L.taps_of(self)
        extend.check(c, taps, inputs)
        skip = extend.lengths(taps)[0]
        tap, last = L.Tapped(taps, self.capture, skip), L.Tapped(taps, self.capture)
        rng_embed, rng_layers, rng_head = (None,) * 3 if rng is None else jax.random.split(rng, 3)
        real = L.real_tokens(inputs)
        allowed = jnp.broadcast_to(real[:, None, None, :], (*real.shape[:1], 1, real.shape[1], real.shape[1]))
        if "segment_ids" in inputs:
            segments = inputs["segment_ids"]
            allowed = allowed & (segments[:, None, :, None] == segments[:, None, None, :])
        visible = extend.visible(taps, allowed, real, False)
        embed = Embeddings(c, self.dtype, name="embed")
        x = tap("embed", L.dropout(embed(inputs, taps), c.hidden_dropout, rng_embed))
        given = extend.for_layers(taps, x[:, skip:], real)
        layer = Layer(c, tap.capture, skip, self.mesh, parent=None)
        stacks = L.stacked_params(self, layer, c.num_layers, x, visible, ((), None), None)
        x, seen = L.run_layers(layer, L.unfolded(stacks, taps), x, visible, (), rng_layers, self.remat, given, self.mesh)
        own = last.side(x[:, skip:], {**seen, **tap.seen}, allowed)
        if targets is not None and not last.wants("logits"):
            params = self.variables["params"]
            head = {"mlm": params["mlm"], "table": params["embed"]["tokens"]["embedding"]}
            return scored.cross_entropy(functools.partial(mlm_logits, c), head, own, *targets, c.vocab_size, self.mesh), last.noted
        y = last("logits", L.by_class(c, self.head(own, extend.first(taps, x, own), inputs["input_ids"], real, rng_head), last))
        return (y if targets is None else scored.sums(y, *targets)), last.noted

    def head(self, x, first, ids, real, rng):
        c = self.config
        if c.head == "none":
            return x
        if c.head in ("pooled", "prototype"):
            y = L.mean_pool(x, real)
            return y if c.head == "pooled" else L.Dense(c.num_labels, name="head")(y)
        if c.head == "classification":
            y = L.dropout(first, c.hidden_dropout, rng)
            y = jnp.tanh(L.Dense(c.hidden_size, name="pooler")(y))
            return L.Dense(c.num_labels, name="head")(L.dropout(y, c.hidden_dropout, rng)).astype(jnp.float32)
        table = self.variables["params"]["embed"]["tokens"]["embedding"]
        if c.head == "label_words":
            x = L.at(x, jnp.argmax((ids == c.mask_id) & real, axis=1))
        return MaskedLM(c, name="mlm")(x, table).astype(jnp.float32)


class MaskedLM(nn.Module):
    """LN(activation(x W + b)) E^T + bias over the vocabulary, or over the label words alone."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x, table):
        c = self.config
        y = L.ACTIVATION_FNS[c.activation](L.Dense(c.hidden_size, name="dense")(x))
        y = L.LayerNorm(c.norm_eps, name="norm")(y)
        bias = L.weight(self, "bias", nn.initializers.zeros, (c.vocab_size,))
        if c.head == "label_words":
            table, bias = (w[jnp.asarray(sum(c.words, ()))] for w in (table, bias))
        return y @ table.T.astype(y.dtype) + bias


def mlm_logits(config, head, x):
    """Logits of the vocabulary from the weights of `MaskedLM` and the ``table`` [V, D] of tokens."""
    return MaskedLM(config, parent=None).apply({"params": head["mlm"]}, x, head["table"]).astype(jnp.float32)
