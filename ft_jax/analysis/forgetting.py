"""What a model has lost of its pre-training, always against the base model, by measures that are handed an ``apply``.

``apply(params, inputs)`` gives logits (or embeddings); batches are dicts of numpy arrays, a ``weight`` [B] of 0
marks the padding rows of the last one.
"""

import jax
import jax.numpy as jnp
import numpy as np

INPUTS = ("input_ids", "attention_mask", "token_type_ids", "segment_ids", "positions")


def _inputs(batch):
    return {k: batch[k] for k in INPUTS if k in batch}


def embeddings(apply, params, batches):
    """All embeddings ``[N, D]`` of the rows with weight 1."""
    run = jax.jit(lambda p, b: apply(p, b))
    parts = [np.asarray(run(params, _inputs(b)))[np.asarray(b.get("weight", np.ones(len(b["input_ids"])))) > 0] for b in batches]
    return np.concatenate(parts)


def contrastive(first, second, scale=20.0):
    """InfoNCE of matching pairs against all others, L = −mean log softmax(scale · F Sᵀ)_ii, both ways; and accuracy@1.

    ``first``, ``second``: L2-normalised embeddings ``[N, D]`` of the two halves of N texts. This is the objective that
    sentence encoders such as all-MiniLM were pre-trained with (arXiv:1908.10084, in-batch negatives, scale 20).
    """
    scores = scale * np.asarray(first, np.float64) @ np.asarray(second, np.float64).T
    loss = 0.0
    for s in (scores, scores.T):
        top = s.max(1, keepdims=True)
        loss += float((np.log(np.exp(s - top).sum(1)) + top[:, 0] - np.diag(s)).mean()) / 2
    hits = [float((s.argmax(1) == np.arange(len(s))).mean()) for s in (scores, scores.T)]
    return {"contrastive_loss": loss, "retrieval_accuracy": sum(hits) / 2}


def token_nll(apply):
    """jit of ``(params, batch) -> (nll [B,T-1], mask [B,T-1])`` of the next token where ``loss_mask`` marks it."""

    def run(params, batch):
        logits = apply(params, _inputs(batch))[:, :-1].astype(jnp.float32)
        targets = batch["input_ids"][:, 1:]
        nll = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        mask = batch["loss_mask"][:, 1:].astype(jnp.float32)
        return nll, mask * batch["weight"][:, None] if "weight" in batch else mask

    return jax.jit(run)


def perplexity(run, params, batches):
    """exp of the mean NLL over all target tokens, weighted by token; ``run`` is a `token_nll`. Also nll and tokens."""
    total = tokens = 0.0
    for batch in batches:
        nll, mask = run(params, batch)
        total, tokens = total + float((nll * mask).sum()), tokens + float(mask.sum())
    nll = total / max(tokens, 1.0)
    return {"perplexity": float(np.exp(nll)), "nll": nll, "tokens": int(tokens)}


def choice_scores(run, params, batches):
    """Log-probability of every row's completion ``[N]`` and its length in tokens ``[N]``, in row order."""
    logps, lengths = [], []
    for batch in batches:
        nll, mask = (np.asarray(x) for x in run(params, batch))
        keep = np.asarray(batch.get("weight", np.ones(len(nll)))) > 0
        logps.append(-(nll * mask).sum(1)[keep])
        lengths.append(mask.sum(1)[keep])
    return np.concatenate(logps), np.concatenate(lengths)


def multiple_choice(logps, sizes, counts, gold):
    """Accuracy of the choice with the highest log-probability, and per unit of ``sizes`` (tokens or characters).

    logps, sizes ``[Σ counts]``: one entry a choice, the choices of one question together; gold ``[questions]``.
    """
    ends = np.cumsum(counts)
    picks = {"accuracy": [], "accuracy_normalised": []}
    for start, end in zip(ends - counts, ends, strict=True):
        picks["accuracy"].append(int(np.argmax(logps[start:end])))
        picks["accuracy_normalised"].append(int(np.argmax(logps[start:end] / np.maximum(sizes[start:end], 1))))
    return {k: float((np.array(v) == np.asarray(gold)).mean()) for k, v in picks.items()}


def pseudo_loss(apply, params, batches, mask_token_id):
    """Masked pseudo-loss of an encoder with an MLM head: every real token masked in turn, mean NLL (arXiv:1910.14659).

    Batches: input_ids, attention_mask, special_tokens_mask ``[B,T]``; all T positions run under one compiled scan.
    """

    @jax.jit
    def run(params, batch):
        ids, real = batch["input_ids"], (batch["attention_mask"] > 0) & (batch["special_tokens_mask"] == 0)
        real = real & (batch["weight"][:, None] > 0) if "weight" in batch else real

        def one(total, t):
            masked = ids.at[:, t].set(jnp.where(real[:, t], mask_token_id, ids[:, t]))
            logits = apply(params, _inputs({**batch, "input_ids": masked}))[:, t].astype(jnp.float32)
            nll = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, ids[:, t, None], -1)[:, 0]
            return total + (nll * real[:, t]).sum(), None

        total, _ = jax.lax.scan(one, jnp.zeros(()), jnp.arange(ids.shape[1]))
        return total, real.sum()

    sums = [tuple(float(x) for x in run(params, {k: jnp.asarray(v) for k, v in b.items()})) for b in batches]
    return {"pseudo_loss": sum(s for s, _ in sums) / max(sum(n for _, n in sums), 1.0), "tokens": int(sum(n for _, n in sums))}
