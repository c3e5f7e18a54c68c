"""What a run minimises: ``(apply, params, batch, rng, **hp) -> (loss, metrics)``; in a config ``name`` or ``name(hp)``.

``apply(params, inputs, rng)`` returns logits; with ``targets=(ids, weights)`` [B,T] it returns sums over tokens, loss and
accuracy, for which no logits of the whole batch need be held. Every metric is a mean over ``metrics["weight"]`` units
(examples or target tokens), so that micro-batches and padded batches average exactly.
"""

import jax
import jax.numpy as jnp
import optax

from ft_jax import registry
from ft_jax.errors import UserError
from ft_jax.kernels import parse_rule
from ft_jax.models import scored
from ft_jax.registry import register

INPUTS = ("input_ids", "attention_mask", "token_type_ids", "segment_ids", "positions", "tasks")


def data_of(text):
    """As what the examples of a config's objective are encoded: a key of `data.pipeline.OBJECTIVES`."""
    name, _ = parse_rule(text)
    return registry.get("objective", name).traits["data"] or name


def inputs_of(batch):
    return {k: batch[k] for k in INPUTS if k in batch}


def _means(sums, total):
    return {k: v / jnp.maximum(total, 1e-9) for k, v in sums.items()} | {"weight": total}


@register("objective", "classification", paper="maximum likelihood")
def classification(apply, params, batch, rng):
    """Cross-entropy of the label; metrics loss, accuracy. Batch: inputs and ``label`` [B], optional ``weight`` [B]."""
    logits = apply(params, inputs_of(batch), rng).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    hits = (logits.argmax(-1) == batch["label"]).astype(jnp.float32)
    weights = batch.get("weight", jnp.ones_like(losses)).astype(jnp.float32)
    metrics = _means({"loss": (losses * weights).sum(), "accuracy": (hits * weights).sum()}, weights.sum())
    return metrics["loss"], metrics


def _targets(batch):
    """``(ids, weights)`` [B, T] of what every position is to predict; the last one predicts nothing."""
    mask = batch["loss_mask"].astype(jnp.float32)
    mask = mask * batch["weight"][:, None] if "weight" in batch else mask
    return tuple(jnp.pad(x[:, 1:], ((0, 0), (0, 1))) for x in (batch["input_ids"], mask))


@register("objective", "causal_lm", paper="maximum likelihood")
def causal_lm(apply, params, batch, rng):
    """Cross-entropy of the next token where ``loss_mask`` [B,T] marks the target; metrics loss, accuracy (of tokens)."""
    targets = _targets(batch)
    metrics = _means(apply(params, inputs_of(batch), rng, targets=targets), targets[1].sum())
    return metrics["loss"], metrics


@register("objective", "instruction_alignment", paper="arXiv:2306.11270", data="causal_lm", needs=("paraphrases",))
def instruction_alignment(apply, params, batch, rng, *, weight=0.5):
    """Instruction alignment: cross-entropy + weight · KL(p ‖ q), p and q of the answer after an instruction and a paraphrase.

    The paper aligns what equivalent instructions make of an input, with a soft prompt (here any method, as
    ``prompt_tuning``). Of its training no code is published: the constant first side of the KL, its mean over the answer's
    tokens and the default weight are ours. Batch: as causal_lm's, and ``paraphrase_input_ids``, ``_attention_mask`` and
    ``_loss_mask`` [B,T] of the same answers, as long. Metrics loss (the sum), accuracy, divergence (KL, nats a token).
    """
    if weight < 0:
        raise UserError(f"objective 'instruction_alignment': weight is {weight}; it cannot be negative")
    both = {k: jnp.concatenate([v, batch.get(f"paraphrase_{k}", v)]) for k, v in inputs_of(batch).items()}
    logits, other = jnp.split(apply(params, both, rng).astype(jnp.float32), 2)
    targets, mask = _targets(batch)
    starts = [(m[:, 1:] > 0).argmax(-1) for m in (batch["loss_mask"], batch["paraphrase_loss_mask"])]
    places = jnp.arange(mask.shape[1]) + (starts[1] - starts[0])[:, None]
    other = jnp.take_along_axis(other, jnp.clip(places, 0, mask.shape[1] - 1)[..., None], axis=1)
    log_p = jax.lax.stop_gradient(jax.nn.log_softmax(logits))
    divergence = (jnp.exp(log_p) * (log_p - jax.nn.log_softmax(other))).sum(-1)
    metrics = _means(scored.sums(logits, targets, mask) | {"divergence": (divergence * mask).sum()}, mask.sum())
    metrics["loss"] += weight * metrics["divergence"]
    return metrics["loss"], metrics


@register("objective", "mlm", paper="arXiv:1810.04805")
def mlm(apply, params, batch, rng, *, mask_token_id=103, vocab_size=30522, rate=0.15):
    """Masked language modelling: 15 % of the tokens are targets, of them 80 % masked, 10 % random, 10 % kept."""
    ids = batch["input_ids"]
    key = jax.random.key(0) if rng is None else rng  # evaluation masks the same tokens each time
    pick, how, random_key, drop = jax.random.split(key, 4)
    eligible = (batch["attention_mask"] > 0) & (batch["special_tokens_mask"] == 0)
    target = eligible & jax.random.bernoulli(pick, rate, ids.shape)
    u = jax.random.uniform(how, ids.shape)
    random_ids = jax.random.randint(random_key, ids.shape, 0, vocab_size, ids.dtype)
    corrupted = jnp.where(target & (u < 0.8), mask_token_id, jnp.where(target & (u >= 0.9), random_ids, ids))
    weights = target.astype(jnp.float32)
    if "weight" in batch:
        weights = weights * batch["weight"][:, None]
    found = apply(params, {**inputs_of(batch), "input_ids": corrupted}, None if rng is None else drop, targets=(ids, weights))
    metrics = _means(found, weights.sum())
    return metrics["loss"], metrics
