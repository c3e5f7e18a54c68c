"""Tiny random models of every family, their batches, and counts of compiled work."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from ft_jax import flops, models, train, tree
from ft_jax.models.config import ARCHITECTURES

VOCAB, PAD, MASK = 64, 0, 4  # ids below FIRST are special, as in BERT's vocabularies
FIRST = 5
_SHAPE = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 48,
          "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": PAD}  # fmt: skip
_ENCODER = {**_SHAPE, "hidden_act": "gelu", "type_vocab_size": 2,
            "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}  # fmt: skip
_DECODER = {**_SHAPE, "hidden_act": "silu", "num_key_value_heads": 2, "rope_theta": 10000.0, "rms_norm_eps": 1e-5}

# family -> config.json
CONFIGS = {
    "bert": {**_ENCODER, "model_type": "bert"},
    "roberta": {**_ENCODER, "model_type": "roberta", "type_vocab_size": 1, "pad_token_id": 1},
    "llama": {**_DECODER, "model_type": "llama", "tie_word_embeddings": True},
    "mistral": {**_DECODER, "model_type": "mistral", "sliding_window": 5},
    "qwen2": {**_DECODER, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4,
              "max_window_layers": 1},
    "qwen3": {**_DECODER, "model_type": "qwen3", "head_dim": 16},
}  # fmt: skip
FAMILIES = tuple(ARCHITECTURES)
TASK_HEADS = {"encoder": "classification", "decoder": "lm"}


def make_model(family="bert", head=None, num_labels=2, dtype="float32", remat="none", **changes):
    """A tiny Model; ``changes`` are keys of its config.json, head defaults to the family's task head."""
    config = models.config_from_hf({**CONFIGS[family], **changes}, head="none")
    words = {"label_ids": tuple(range(FIRST, FIRST + num_labels)), "mask_id": MASK} if head == "label_words" else {}
    config = config.with_head(head or TASK_HEADS[config.kind], num_labels, **words)
    return models.Model(config, dtype=dtype, remat=remat)


def make_params(model, seed=0, spread=0.15):
    """Random float32 weights, norms and biases included, large enough that every part shows in the logits."""
    leaves, structure = jax.tree.flatten(model.shapes())
    rng = np.random.default_rng(seed)
    fresh = [jnp.asarray(spread * rng.standard_normal(x.shape), jnp.float32) for x in leaves]
    moved = jax.tree.unflatten(structure, fresh)
    return tree.map_with_path(lambda p, x: x + 1 if p.endswith("/scale") else x, moved)


def make_batch(model, rows=4, length=8, seed=0, padded=True):
    """Inputs plus everything the objectives ask for, as numpy; rows end in padding of several lengths."""
    rng, pad = np.random.default_rng(seed), model.config.pad_token_id
    ids = rng.integers(FIRST, model.config.vocab_size, (rows, length)).astype(np.int32)
    lengths = np.asarray([length - (i % 3 if padded else 0) for i in range(rows)])
    mask = (np.arange(length) < lengths[:, None]).astype(np.int32)
    special = np.zeros_like(ids)
    special[:, 0] = 1
    prompt = np.arange(length) < 2 + np.arange(rows)[:, None] % 3
    other = np.where(prompt, np.roll(ids, 1, 0), ids)
    return {"input_ids": np.where(mask, ids, pad), "attention_mask": mask, "paraphrase_input_ids": np.where(mask, other, pad),
            "paraphrase_attention_mask": mask, "paraphrase_loss_mask": mask * ~prompt,
            "label": rng.integers(0, model.config.num_labels, rows).astype(np.int32),
            "loss_mask": mask * ~prompt, "special_tokens_mask": special | (1 - mask)}  # fmt: skip


def make_objective(name, model, dropout=False):
    """``(params, batch, rng) -> (loss, metrics)`` as a training run makes it."""
    cfg = {"objective": name, "model": {"dropout": dropout}, "data": {"num_labels": model.config.num_labels}}
    return train.make_objective(cfg, model, SimpleNamespace(mask_id=MASK))


def nudged(x, size, rng):
    """x plus normal numbers of that size; in numpy where it can be, which compiles nothing."""
    by = (size * rng.standard_normal(x.shape)).astype(x.dtype)
    return x + by if isinstance(x, jax.core.Tracer) else jnp.asarray(np.asarray(x) + by)


def inputs(batch):
    return {k: batch[k] for k in ("input_ids", "attention_mask")}


def step_flops(loss, params, mask, *args, compiled=True):
    """FLOPs of value and gradient of ``loss(params, *args)`` over the leaves that ``mask`` marks.

    XLA's own count, in which the body of a scan counts once; of the compiled program, or of what goes into XLA.
    """
    lowered = jax.jit(_step(loss)).lower(*tree.split(params, mask), *args)
    return (lowered.compile() if compiled else lowered).cost_analysis()["flops"]


def product_flops(loss, params, mask, *args):
    """What `step_flops` counts, of matrix products alone and with a loop as often as it runs."""
    return flops.count(_step(loss), *tree.split(params, mask), *args)


def _step(loss):
    return jax.value_and_grad(lambda trainable, frozen, *xs: loss(tree.join(trainable, frozen), *xs))


def assert_trees_close(first, second, **tolerance):
    """Same paths, same values within ``tolerance`` (rtol, atol of numpy)."""
    first, second = tree.flatten(first), tree.flatten(second)
    assert list(first) == list(second)
    for path, leaf in first.items():
        np.testing.assert_allclose(leaf, second[path], err_msg=path, **tolerance)
