"""Models as pure functions of their weights."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ft_jax.errors import UserError, nearest
from ft_jax.kernels.mixture import route
from ft_jax.models import decoder, encoder, extend
from ft_jax.models.config import ModelConfig, config_from_hf, config_to_hf
from ft_jax.models.layers import REMAT

__all__ = ["SITES", "Model", "ModelConfig", "config_from_hf", "config_to_hf", "names"]

LAYER_SITES = ("attn_in", "q", "k", "v", "heads", "attn_out", "ffn_in", "ffn_hidden", "ffn_out", "block_out")
SITES = ("embed", *LAYER_SITES, "side", "logits")  # side: between the last layer (and final norm) and the head
KEPT = "ffn_out/after"  # what would follow ffn_out without its tap: captured where a loss term compares it with what follows
EXTENSIONS = extend.SITES
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_KINDS = {"encoder": (encoder.Encoder, encoder.names), "decoder": (decoder.Decoder, decoder.names)}


def names(config):
    """``{our path: checkpoint name}``, ``{i}`` for the layer; ``…/kernel`` is transposed against the checkpoint."""
    return _KINDS[config.kind][1](config)


@dataclasses.dataclass(frozen=True)
class Model:
    """A pure function ``apply(params, inputs)`` and what decides its maths.

    ``dtype`` is what activations and matrix products use (weights stay as they are stored);
    ``remat`` is one of none, dots, full: what the backward pass recomputes; ``mesh`` is what activations are
    laid out over.
    """

    config: ModelConfig
    dtype: str = "float32"
    remat: str = "none"
    mesh: Mesh | None = None

    def __post_init__(self):
        for key, table in (("dtype", DTYPES), ("remat", REMAT)):
            if getattr(self, key) not in table:
                raise UserError(f"{key} {getattr(self, key)!r} is not supported{nearest(getattr(self, key), table)}")
        self.config.check()

    def _module(self, capture=()):
        for site in capture:
            if site not in (*SITES, KEPT):
                raise UserError(f"no tap site {site!r}{nearest(site, SITES)}")
        return _KINDS[self.config.kind][0](self.config, DTYPES[self.dtype], self.remat, tuple(capture), self.mesh)

    def apply(self, params, inputs, rng=None, capture=(), targets=None):
        """Logits (embeddings, hidden states) by ``config.head``; dropout only with an rng.

        Args:
          inputs: input_ids int32 [B,T], optional attention_mask, token_type_ids, positions, segment_ids (all [B,T]),
            and tasks int32 [B], which kernels that hold several tasks go by.
          capture: tap sites to return too; layer sites come stacked as [layers, B, T, …].
          targets: ``(ids int32 [B,T], weights [B,T])`` of a language-model head, for a score instead of the logits.
        Returns:
          the output, or ``(output, {site: array})`` with capture; with targets it is `scored.cross_entropy`'s sums.
        Raises:
          UserError that names the leaf for a kernel of several tasks when neither ``inputs`` nor `route` say which.
        """
        params = route(params, inputs.get("tasks"))
        if targets is not None and self.config.head not in ("lm", "mlm"):
            raise ValueError(f"targets are for a language-model head, and this model has {self.config.head!r}")
        out, seen = self._module(capture).apply({"params": params}, inputs, rng, targets)
        return (out, seen) if capture else out

    def follow(self, params, inputs, cache):
        """``(logits [B,V] of each row's last token, cache)`` of a language model whose tokens follow those that the cache holds.

        Raises UserError for taps that read or extend the whole sequence, which a cache does not keep.
        """
        if odd := sorted({"prompt", "pool", "side"} & set(params.get("taps", {}))):
            raise UserError(f"taps at {', '.join(odd)} work on a whole sequence, and generation with a cache goes token by token")
        if self.config.head != "lm":
            raise UserError(f"generation needs a decoder with head 'lm', and this {self.config.family} model has {self.config.head!r}")
        return self._module().apply({"params": route(params, inputs.get("tasks"))}, inputs, cache=cache)

    def with_head(self, head, num_labels=None, label_ids=None, mask_id=None):
        return dataclasses.replace(self, config=self.config.with_head(head, num_labels, label_ids, mask_id))

    def init(self, rng):
        """Random float32 parameters of this shape."""
        dummy = {"input_ids": jnp.zeros((1, 2), jnp.int32)}
        return self._module().init(rng, dummy)["params"]

    def shapes(self):
        """The parameter tree as ``jax.ShapeDtypeStruct``s."""
        return jax.eval_shape(self.init, jax.random.key(0))
