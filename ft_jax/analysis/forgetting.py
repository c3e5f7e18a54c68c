"""What a model could do before fine-tuning, measured again after it: score base and tuned parameters alike.

Every measure takes ``apply(params, inputs)``, the parameters, and an iterable of batches, which may be padded with rows
of ``weight`` 0. One program is compiled for each ``apply`` and batch shape: pass the same ``apply`` (a method of one
model, not a new lambda) for every set of parameters.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from ft_jax.errors import UserError

_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "segment_ids", "positions")


def _inputs(batch):
    return {key: batch[key] for key in _INPUTS if key in batch}


def _row_weight(batch, rows):
    return jnp.asarray(batch["weight"], jnp.float32) if "weight" in batch else jnp.ones(rows, jnp.float32)


def _log_prob(logits, ids):
    """log p of each id, float32."""
    logits = logits.astype(jnp.float32)
    return jnp.take_along_axis(logits, ids[..., None], -1)[..., 0] - jax.nn.logsumexp(logits, -1)


def _masked_sum(values, weight, axis=None):
    """Σ values · weight, where a row of padding alone may hold NaN."""
    return (jnp.where(weight > 0, values, 0) * weight).sum(axis)


def _total(step, apply, params, batches, label):
    """Sums of the step's dict over the batches, in float64; UserError when they hold nothing to measure."""
    total = {}
    for batch in tqdm.tqdm(batches, desc=label, unit="batch", leave=False):
        for key, value in jax.device_get(step(apply, params, dict(batch))).items():
            total[key] = total.get(key, 0.0) + float(value)
    if not total.get("count"):
        raise UserError(f"{label}: nothing to measure in the batches given")
    return total


@functools.partial(jax.jit, static_argnums=0)
def _contrastive(embed, params, batch, scale):
    first, second = (embed(params, batch[key]).astype(jnp.float32) for key in ("first", "second"))
    first, second = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (first, second))
    weight = _row_weight(batch, first.shape[0])
    scores = jnp.matmul(first, second.T, precision="highest") * scale

    def direction(scores):
        scores = jnp.where(weight[None, :] > 0, scores, -jnp.inf)  # padding is nobody's negative
        loss = jnp.where(weight > 0, jax.nn.logsumexp(scores, -1) - jnp.diagonal(scores), 0)
        return (loss * weight).sum(), ((scores.argmax(-1) == jnp.arange(scores.shape[0])) * weight).sum()

    (loss, hits), (back, back_hits) = direction(scores), direction(scores.T)
    return {"loss": (loss + back) / 2, "hits": (hits + back_hits) / 2, "count": weight.sum()}


def contrastive_loss(embed, params, batches, *, scale=20.0, label="contrastive"):
    """Symmetric InfoNCE with in-batch negatives at temperature 1/scale, and retrieval accuracy@1, of sentence pairs.

    L = ½ [CE(scale · cos(A, B)) + CE(its transpose)]: what all-MiniLM was pretrained to minimise (arXiv:1908.10084,
    1807.03748). Batches: ``first`` and ``second``, each the inputs of ``embed(params, inputs) -> [B, D]``. Both numbers
    depend on how many candidates a batch holds: compare models on equal batches.
    Returns ``{loss (nats), accuracy, pairs}``, means over pairs and directions.
    """

    def step(embed, params, batch):
        return _contrastive(embed, params, batch, scale)

    t = _total(step, embed, params, batches, label)
    return {"loss": t["loss"] / t["count"], "accuracy": t["hits"] / t["count"], "pairs": int(t["count"])}


@functools.partial(jax.jit, static_argnums=0)
def _pseudo(apply, params, batch, mask_id):
    ids = batch["input_ids"]
    target = (batch["attention_mask"] > 0) & (batch["special_tokens_mask"] == 0)
    weight = target * _row_weight(batch, ids.shape[0])[:, None]

    def at(position):
        masked = ids.at[:, position].set(mask_id)
        logits = apply(params, {**_inputs(batch), "input_ids": masked})[:, position]
        return _masked_sum(_log_prob(logits, ids[:, position]), weight[:, position])

    return {"nll": -jax.lax.map(at, jnp.arange(ids.shape[1])).sum(), "count": weight.sum()}


def pseudo_loss(apply, params, batches, *, mask_id, label="pseudo-loss"):
    """Masked pseudo-loss: mean over tokens of −log p(token | all others), each token masked in turn (arXiv:1910.14659).

    ``apply`` gives masked-LM logits ``[B, T, V]``. Batches: input_ids, attention_mask, special_tokens_mask (1 = never
    a target). One forward pass a position. Returns ``{loss (nats a token), pseudo_perplexity, tokens}``.
    """

    def step(apply, params, batch):
        return _pseudo(apply, params, batch, mask_id)

    t = _total(step, apply, params, batches, label)
    loss = t["nll"] / t["count"]
    return {"loss": loss, "pseudo_perplexity": _exp(loss), "tokens": int(t["count"])}


def _exp(x):
    return math.exp(x) if x < 700 else math.inf


def _next_token(apply, params, batch):
    """``(log p [B, T-1], target mask [B, T-1])`` of every token but the first, given those before it."""
    ids = batch["input_ids"]
    mask = batch["loss_mask"] if "loss_mask" in batch else jnp.ones_like(ids)
    if "segment_ids" in batch:  # a segment's first token has no context of its own
        segment = batch["segment_ids"]
        mask = mask.at[:, 1:].multiply((segment[:, 1:] == segment[:, :-1]) & (segment[:, 1:] > 0))
    elif "attention_mask" in batch:
        mask = mask * batch["attention_mask"]
        mask = mask.at[:, 1:].multiply(batch["attention_mask"][:, :-1])
    log_prob = _log_prob(apply(params, _inputs(batch))[:, :-1], ids[:, 1:])
    return log_prob, mask[:, 1:].astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def _perplexity(apply, params, batch):
    log_prob, mask = _next_token(apply, params, batch)
    mask = mask * _row_weight(batch, mask.shape[0])[:, None]
    return {"nll": -_masked_sum(log_prob, mask), "count": mask.sum()}


def perplexity(apply, params, batches, *, label="perplexity"):
    """Perplexity exp(mean −log p(token | those before it)), every target token of all batches weighing the same.

    ``apply`` gives next-token logits ``[B, T, V]``. Batches: input_ids, optional attention_mask or segment_ids,
    optional ``loss_mask`` (1 where the token itself is a target), optional weight.
    Returns ``{loss (nats a token), perplexity, tokens}``.
    """
    t = _total(_perplexity, apply, params, batches, label)
    loss = t["nll"] / t["count"]
    return {"loss": loss, "perplexity": _exp(loss), "tokens": int(t["count"])}


@functools.partial(jax.jit, static_argnums=0)
def _multiple_choice(apply, params, batch):
    questions, choices, length = batch["input_ids"].shape
    flat = {k: v.reshape(questions * choices, length) for k, v in batch.items() if k in (*_INPUTS, "loss_mask")}
    log_prob, mask = _next_token(apply, params, flat)
    score = _masked_sum(log_prob, mask, axis=-1).reshape(questions, choices)
    size = batch["length"] if "length" in batch else mask.sum(-1).reshape(questions, choices)
    real = batch["choice_mask"] > 0
    weight = _row_weight(batch, questions)

    def hits(score):
        return ((jnp.where(real, score, -jnp.inf).argmax(-1) == batch["label"]) * weight).sum()

    return {"hits": hits(score), "hits_norm": hits(score / jnp.maximum(size, 1)), "count": weight.sum()}


def multiple_choice_accuracy(apply, params, batches, *, label="multiple choice"):
    """Share of questions whose right choice has the largest log p(choice | context), summed and per unit of length.

    Batches as `choice_batches` makes them: input_ids, attention_mask, loss_mask ``[N, C, T]`` (loss_mask marks the
    choice's tokens), choice_mask ``[N, C]``, label ``[N]``, optional ``length [N, C]`` (characters or bytes, for the
    normalised score; tokens without it), optional weight.
    Returns ``{accuracy, accuracy_norm, questions}``.
    """
    t = _total(_multiple_choice, apply, params, batches, label)
    n = t["count"]
    return {"accuracy": t["hits"] / n, "accuracy_norm": t["hits_norm"] / n, "questions": int(n)}


def _padded(rows, length, pad_id):
    """Token id lists as ``input_ids`` and ``attention_mask``, int32 ``[len(rows), length]``, cut on the right."""
    ids, mask = np.full((len(rows), length), pad_id, np.int32), np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        n = min(len(row), length)
        ids[i, :n], mask[i, :n] = row[:n], 1
    return {"input_ids": ids, "attention_mask": mask}


def halves(text):
    """The two halves of a text by words; the first holds the odd one."""
    words = text.split()
    middle = (len(words) + 1) // 2
    return " ".join(words[:middle]), " ".join(words[middle:])


def pair_batches(texts, encode, *, batch_size, length, pad_id=0):
    """Batches for `contrastive_loss` from the two halves of each text; texts of one word are an error.

    ``encode(list of str) -> list of id lists``. Only whole batches: every pair meets equally many negatives.
    """
    for i, text in enumerate(texts):
        if len(text.split()) < 2:
            raise UserError(f"text {i} has no two halves: {text[:40]!r}")
    if len(texts) < batch_size:
        raise UserError(f"{len(texts)} texts do not fill one batch of {batch_size}")
    first, second = (encode(list(part)) for part in zip(*map(halves, texts)))
    return [
        {"first": _padded(first[i : i + batch_size], length, pad_id),
         "second": _padded(second[i : i + batch_size], length, pad_id)}
        for i in range(0, len(texts) - batch_size + 1, batch_size)
    ]  # fmt: skip


def choice_batches(questions, *, batch_size, length, pad_id=0):
    """Batches for `multiple_choice_accuracy`, the last one padded.

    questions: ``{"choices": [(ids, start of the choice), …], "label": int, optional "lengths": [number, …]}``.
    UserError names the question whose ids are longer than ``length`` or whose label is not one of its choices.
    """
    widest = max((len(q["choices"]) for q in questions), default=0)
    for i, q in enumerate(questions):
        if not 0 <= q["label"] < len(q["choices"]):
            raise UserError(f"question {i}: label {q['label']} is not one of {len(q['choices'])} choices")
        for ids, start in q["choices"]:
            if not 1 <= start < len(ids) <= length:
                raise UserError(f"question {i}: a choice of {len(ids)} tokens from {start} on does not fit {length}")
    return [_choice_batch(questions[i : i + batch_size], batch_size, widest, length, pad_id)
            for i in range(0, len(questions), batch_size)]  # fmt: skip


def _choice_batch(questions, rows, widest, length, pad_id):
    flat = [c for q in questions for c in q["choices"] + [([], 0)] * (widest - len(q["choices"]))]
    flat += [([], 0)] * (rows * widest - len(flat))
    out = _padded([ids for ids, _ in flat], length, pad_id)
    where, start = np.arange(length), np.array([s for _, s in flat])
    out["loss_mask"] = (out["attention_mask"] * (where >= start[:, None])).astype(np.int32)
    out = {key: value.reshape(rows, widest, length) for key, value in out.items()}
    padding = rows - len(questions)
    out["choice_mask"] = np.array([[i < len(q["choices"]) for i in range(widest)] for q in questions]
                                  + [[True] * widest] * padding, np.int32)  # fmt: skip
    out["label"] = np.array([q["label"] for q in questions] + [0] * padding, np.int32)
    out["weight"] = np.array([1] * len(questions) + [0] * padding, np.float32)
    if all("lengths" in q for q in questions):
        sizes = [[*q["lengths"], *[1] * (widest - len(q["lengths"]))] for q in questions] + [[1] * widest] * padding
        out["length"] = np.array(sizes, np.float32)
    return out
