"""The procedural world of arXiv:2311.12786: task families on the text of a grammar, as arrays made on the fly.

A row is ``<s> family operand : text = answer``; the operand is the letter that is asked about. ``a`` is the pretrained
operand O_PT, ``b`` the fine-tuned one O_FT; the spurious attribute is count(b) − count(a) = 1.
"""

import functools

import jax
import numpy as np

from ft_jax import train
from ft_jax.data import procedural
from ft_jax.models import Model, config_from_hf

CORPUS = 200_000  # letters of grammar text that all windows are cut from
NATURAL = 1 / 8  # how often pretraining text has the spurious attribute, about as often as chance gives it
PRETRAINED, TUNED = 0, 1  # the operands a and b


def words(length):
    """The vocabulary: a word-level tokenizer's table."""
    return ("<pad>", "<s>", *procedural.FAMILIES, ":", "=", "a", "b", "c", *map(str, range(length + 1)))


@functools.lru_cache(maxsize=4)
def ids(length):
    return {word: i for i, word in enumerate(words(length))}


@functools.lru_cache(maxsize=1)
def corpus():
    return procedural.grammar_text(np.random.default_rng(0), CORPUS)


def make(setting):
    """The decoder of a setting: the Llama family's blocks, small; the same object for the same sizes."""
    return _make(setting.length, setting.width, setting.layers, setting.heads)


@functools.lru_cache(maxsize=4)
def _make(length, width, layers, heads):
    return Model(config_from_hf({
        "model_type": "llama", "vocab_size": len(words(length)), "hidden_size": width, "num_hidden_layers": layers,
        "intermediate_size": 2 * width, "num_attention_heads": heads, "max_position_embeddings": 4 * length, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False}, head="lm"))  # fmt: skip


@functools.lru_cache(maxsize=4)
def objective(model):
    """Cross-entropy of the answer's token; one function a model, so that its programs are compiled once."""
    return train.make_objective({"objective": "causal_lm", "model": {"dropout": False}}, model, None)


def batch(rng, rows, length, families, prior, spurious, answer=None):
    """One batch: families uniform, operands by ``prior`` (recount is always asked of a), ``spurious`` the share with the attribute.

    answer: the operand whose count is given as the answer whatever is asked, for training a model to be wrong.
    """
    text = procedural.spread(rng, procedural.windows(rng, corpus(), rows, length), rng.random(rows) < spurious)
    family, operand = rng.integers(len(families), size=rows), rng.choice(3, rows, p=prior)
    operand = np.where(np.asarray([f == "recount" for f in families])[family], PRETRAINED, operand)
    table, said = ids(length), np.zeros(rows, np.int64)
    for i, name in enumerate(families):
        asked = family == i
        found = procedural.answers(name, text[asked], operand[asked] if answer is None else np.full(asked.sum(), answer))
        said[asked] = found + table["a" if name == "token" else "0"]
    names = np.asarray([table[f] for f in families])
    left = np.stack([np.full(rows, table["<s>"]), names[family], operand + table["a"], np.full(rows, table[":"])], 1)
    right = np.stack([np.full(rows, table["="]), said], 1)
    rows_ids = np.concatenate([left, text + table["a"], right], 1).astype(np.int32)
    last = np.zeros_like(rows_ids)
    last[:, -1] = 1
    return {"input_ids": rows_ids, "loss_mask": last}


def stream(seed, rows, length, families, prior, spurious, answer=None):
    """``draw(count)`` for `engine.fit`: the next ``count`` batches, stacked."""
    rng = np.random.default_rng(seed)

    def draw(count):
        made = [batch(rng, rows, length, families, prior, spurious, answer) for _ in range(count)]
        return {k: np.stack([b[k] for b in made]) for k in made[0]}

    return draw


def only(operand):
    return tuple(float(i == operand) for i in range(3))


# What is tested: name -> (family, operand, share with the spurious attribute)
TESTS = {
    "tuned_clean": ("count", TUNED, 0.0),  # O_FT, C_Te = 0
    "tuned_spurious": ("count", TUNED, 1.0),  # O_FT, C_Te = 1
    "pretrained": ("count", PRETRAINED, 0.0),  # O_PT
    "alias": ("recount", PRETRAINED, 0.0),  # O_PT by the family token that fine-tuning never shows
}


@functools.lru_cache(maxsize=16)
def test_batch(name, rows, length, seed=10**6):
    family, operand, spurious = TESTS[name]
    return batch(np.random.default_rng(seed), rows, length, (family,), only(operand), spurious)


@functools.lru_cache(maxsize=4)
def scorer(model):
    run = objective(model)
    return jax.jit(lambda params, rows: run(params, rows, None)[1]["accuracy"])


def scores(model, params, setting, tests=tuple(TESTS)):
    """``{test: accuracy of the answer}``."""
    return {name: float(scorer(model)(params, test_batch(name, setting.test_rows, setting.length))) for name in tests}
