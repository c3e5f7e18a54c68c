"""What a run minimises: ``(apply, params, batch, rng, **hp) -> (loss, metrics)``.

``apply(params, inputs, rng)`` returns logits; with ``targets=(ids, weights)`` [B,T] it returns sums over tokens, loss and
accuracy, for which no logits of the whole batch need be held. Every metric is a mean over ``metrics["weight"]`` units
(examples or target tokens), so that micro-batches and padded batches average exactly.
"""

import jax
import jax.numpy as jnp
import optax

from ft_jax.registry import register

INPUTS = ("input_ids", "attention_mask", "token_type_ids", "segment_ids", "positions", "tasks")


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


@register("objective", "causal_lm", paper="maximum likelihood")
def causal_lm(apply, params, batch, rng):
    """Cross-entropy of the next token where ``loss_mask`` [B,T] marks the target; metrics loss, accuracy (of tokens)."""
    mask = batch["loss_mask"].astype(jnp.float32)
    if "weight" in batch:
        mask = mask * batch["weight"][:, None]
    targets = tuple(jnp.pad(x[:, 1:], ((0, 0), (0, 1))) for x in (batch["input_ids"], mask))  # the last position has none
    metrics = _means(apply(params, inputs_of(batch), rng, targets=targets), targets[1].sum())
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
