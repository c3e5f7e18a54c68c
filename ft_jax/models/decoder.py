"""Causal decoders of the Llama family: Llama 2/3, Mistral, Qwen2/2.5/3, SmolLM2."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ft_jax.kernels.base import dot
from ft_jax.models import extend, scored
from ft_jax.models import layers as L
from ft_jax.models.attention import attend
from ft_jax.models.config import ModelConfig


def names(config):
    """``{our path: checkpoint name}`` for this family and head; one table, read both ways."""
    layer = "model.layers.{i}."
    out = {
        "embed/tokens/embedding": "model.embed_tokens.weight",
        "norm/scale": "model.norm.weight",
        "layers/attn_norm/scale": layer + "input_layernorm.weight",
        "layers/mlp_norm/scale": layer + "post_attention_layernorm.weight",
    }
    matrices = {
        "attn/q": ("self_attn.q_proj", config.qkv_bias), "attn/k": ("self_attn.k_proj", config.qkv_bias),
        "attn/v": ("self_attn.v_proj", config.qkv_bias), "attn/out": ("self_attn.o_proj", config.out_bias),
        "mlp/gate": ("mlp.gate_proj", config.mlp_bias), "mlp/up": ("mlp.up_proj", config.mlp_bias),
        "mlp/down": ("mlp.down_proj", config.mlp_bias),
    }  # fmt: skip
    for path, (name, bias) in matrices.items():
        out[f"layers/{path}/kernel"] = f"{layer}{name}.weight"
        if bias:
            out[f"layers/{path}/bias"] = f"{layer}{name}.bias"
    if config.qk_norm:
        out |= {f"layers/attn/{n}_norm/scale": f"{layer}self_attn.{n}_norm.weight" for n in "qk"}
    if config.weights_head == "lm" and not config.tie_embeddings:
        out["head/kernel"] = "lm_head.weight"
    if config.head == "classification":
        out["head/kernel"] = "score.weight"
    if config.head == "prototype":
        out |= {"head/kernel": "prototype.weight", "head/bias": "prototype.bias"}
    return out


class Layer(nn.Module):
    """Pre-norm transformer block: x ← x + attention(RMS(x)); x ← x + MLP(RMS(x))."""

    config: ModelConfig
    capture: tuple[str, ...] = ()
    skip: int = 0
    mesh: Any = None  # what activations are spread over

    @nn.compact
    def __call__(self, x, context, per_layer, rng):
        c, (allowed, distance, cos, sin), ((window, held), given) = self.config, context, per_layer
        given = given or {}
        tap, prefix = L.Tapped(L.taps_of(self), self.capture, self.skip, given.get("pool")), given.get("prefix")
        if window is not None:
            allowed = allowed & ((window == 0) | (distance < window))
        y = tap("attn_in", L.RMSNorm(c.norm_eps, name="attn_norm")(x))
        x = self.joined("attn_out", x, Attention(c, self.mesh, name="attn")(y, allowed, cos, sin, prefix, held, tap, rng), tap)
        y = GatedMLP(c, name="mlp")(tap("ffn_in", L.RMSNorm(c.norm_eps, name="mlp_norm")(x)), tap)
        if c.hidden_dropout and rng is not None:  # no published model has it: `importance.disagreement` asks for it
            y = L.dropout(y, c.hidden_dropout, jax.random.fold_in(rng, 1))
        x = self.joined("ffn_out", x, y, tap)
        return tap("block_out", x), tap.seen

    def joined(self, site, x, y, tap):
        """x + y of the residual stream and a sub-layer's output."""
        return x + tap(site, y, lambda y: x + y)


class Attention(nn.Module):
    config: ModelConfig
    mesh: Any = None

    @nn.compact
    def __call__(self, x, allowed, cos, sin, prefix, held, tap, rng):
        c = self.config
        heads = {"q": c.num_heads, "k": c.num_kv_heads, "v": c.num_kv_heads}
        q, k, v = (
            tap(n, L.Dense(count * c.head_dim, c.qkv_bias, name=n)(x)).reshape(*x.shape[:2], count, c.head_dim)
            for n, count in heads.items()
        )
        if c.qk_norm:
            q, k = (L.RMSNorm(c.norm_eps, name=f"{n}_norm")(y) for n, y in (("q", q), ("k", k)))
        k = L.rotate(k, cos, sin)
        if held is not None:  # keys and values of the tokens before, [b,s,kv heads,h] each
            tap.seen["cache"] = k, v
            k, v = (jnp.concatenate(pair, axis=1) for pair in zip(held, (k, v), strict=True))
        k, v, allowed = extend.before_tokens(prefix, k, v, allowed)
        y = attend(L.rotate(q, cos, sin), k, v, allowed, c.attention_dropout, rng, self.mesh)
        return L.Dense(c.hidden_size, c.out_bias, name="out")(tap("heads", y.reshape(*x.shape[:2], -1)))


class GatedMLP(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x, tap):
        c = self.config
        gate = L.Dense(c.intermediate_size, c.mlp_bias, name="gate")(x)
        up = L.Dense(c.intermediate_size, c.mlp_bias, name="up")(x)
        y = tap("ffn_hidden", L.kept_inputs(lambda gate, up: L.ACTIVATION_FNS[c.activation](gate) * up, gate, up))
        return L.Dense(c.hidden_size, c.mlp_bias, name="down")(y)


class Embeddings(nn.Module):
    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self, ids):
        c = self.config
        return L.Embed(c.vocab_size, c.hidden_size, name="tokens")(ids, self.dtype)


def lm_logits(head, x):
    """Logits of the vocabulary from the tied ``table`` [V, D] of tokens or the ``kernel`` [D, V] of a head."""
    y = x @ head["table"].T.astype(x.dtype) if "table" in head else dot(head["kernel"], x)
    return y.astype(jnp.float32)


class Decoder(nn.Module):
    """Logits, embeddings or hidden states of a batch, by ``config.head``; its score against ``targets`` where they are given.

    With a ``cache`` (`sampling.empty`) the tokens follow those that it holds: the logits of the last one, and the cache with them.
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    capture: tuple[str, ...] = ()
    mesh: Any = None

    @nn.compact
    def __call__(self, inputs, rng=None, targets=None, cache=None):
        c, taps, ids = self.config, L.taps_of(self), inputs["input_ids"]
        skip = extend.lengths(taps)[0]
        tap, last = L.Tapped(taps, self.capture, skip), L.Tapped(taps, self.capture)
        n = ids.shape[1]
        real = L.real_tokens(inputs)
        allowed = real[:, None, None, :] & jnp.tril(jnp.ones((n, n), bool))
        if "segment_ids" in inputs:
            segments = inputs["segment_ids"]
            allowed = allowed & (segments[:, None, :, None] == segments[:, None, None, :])
        positions = extend.numbered(taps, inputs.get("positions", jnp.broadcast_to(jnp.arange(n), ids.shape)))
        x = extend.prompted(taps, Embeddings(c, self.dtype, name="embed")(ids), inputs)
        x = tap("embed", x)
        given = extend.for_layers(taps, x[:, skip:], real)
        windows = jnp.asarray(c.windows, jnp.int32) if any(c.windows) else None
        distance = None if windows is None else extend.distance(taps, positions, "segment_ids" in inputs)
        if cache is not None:
            allowed, distance = self.after(cache, allowed, distance, extend.lengths(taps)[1])
        context = (extend.visible(taps, allowed, real, True), distance, *L.rope_tables(c, positions))
        layer = Layer(c, tap.capture, skip, self.mesh, parent=None)
        first = None if windows is None else windows[0]
        stacks = L.stacked_params(self, layer, c.num_layers, x, context, ((first, None), None), None)
        each = windows, None if cache is None else (cache["k"], cache["v"])
        x, seen = L.run_layers(layer, L.unfolded(stacks, taps), x, context, each, rng, self.remat, given, self.mesh)
        if cache is not None:
            return self.following(L.RMSNorm(c.norm_eps, name="norm")(x[:, -1:]), seen["cache"], real, cache)
        x = last.side(L.RMSNorm(c.norm_eps, name="norm")(x[:, skip:]), {**seen, **tap.seen}, allowed)
        if targets is not None and not last.wants("logits"):
            return scored.cross_entropy(lm_logits, self.lm_head(), x, *targets, c.vocab_size, self.mesh), last.noted
        y = last("logits", L.by_class(c, self.head(x, real), last))
        return (y if targets is None else scored.sums(y, *targets)), last.noted

    def after(self, cache, allowed, distance, prefix):
        """Who is seen, [B,1,n,s+n], and how far off it is, where s tokens of the cache come before the n of the batch."""
        n, size = allowed.shape[-1], cache["real"].shape[1]
        old = jnp.broadcast_to(cache["real"][:, None, None, :], (*allowed.shape[:3], size))
        if distance is not None:
            own = cache["at"] + jnp.arange(n)
            distance = own[:, None] - jnp.concatenate([jnp.arange(prefix) - prefix, jnp.arange(size), own])
        return jnp.concatenate([old, allowed], axis=3), distance

    def following(self, x, new, real, cache):
        """(logits [B,V] of the last token, the cache with the keys and values of the batch's)."""
        at, logits = cache["at"], self.head(x, None)[:, 0]
        k, v = (jax.lax.dynamic_update_slice_in_dim(cache[name], one, at, axis=2) for name, one in zip("kv", new, strict=True))
        return logits, {"k": k, "v": v, "real": jax.lax.dynamic_update_slice_in_dim(cache["real"], real, at, axis=1), "at": at + real.shape[1]}

    def lm_head(self):
        params = self.variables["params"]
        return {"table": params["embed"]["tokens"]["embedding"]} if self.config.tie_embeddings else {"kernel": params["head"]["kernel"]}

    def head(self, x, real):
        c = self.config
        if c.head == "none":
            return x
        if c.head in ("pooled", "prototype"):
            y = L.mean_pool(x, real)
            return y if c.head == "pooled" else L.Dense(c.num_labels, name="head")(y)
        if c.head == "classification":  # read off the last real token, as transformers does
            return L.Dense(c.num_labels, False, name="head")(L.at(x, L.last_real(real))).astype(jnp.float32)
        table = self.lm_head()["table"] if c.tie_embeddings else None
        if c.head == "label_words":  # the next token after the prompt
            x = L.at(x, L.last_real(real))
            if table is None:
                return L.Columns(c.vocab_size, sum(c.words, ()), name="head")(x).astype(jnp.float32)
            table = table[jnp.asarray(sum(c.words, ()))]
        if table is not None:
            return lm_logits({"table": table}, x)
        return L.Dense(c.vocab_size, False, name="head")(x).astype(jnp.float32)
