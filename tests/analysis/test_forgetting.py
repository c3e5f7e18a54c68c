"""Measures of forgetting against closed forms and direct loops over tiny fake models."""

import jax.numpy as jnp
import numpy as np
import pytest

from ft_jax.analysis import forgetting
from ft_jax.errors import UserError

V, D = 11, 6
RNG = np.random.default_rng(0)
PARAMS = {name: RNG.standard_normal(s).astype(np.float32) for name, s in (("embed", (V, D)), ("out", (D, V)))}


def bidirectional(params, inputs):
    """Logits from the mean of all real tokens and the own token: masking one token changes its own prediction."""
    x = params["embed"][inputs["input_ids"]]
    mask = inputs["attention_mask"][..., None]
    return (x + (x * mask).sum(1, keepdims=True) / mask.sum(1, keepdims=True)) @ params["out"]


def causal(params, inputs):
    return jnp.cumsum(params["embed"][inputs["input_ids"]], 1) @ params["out"]


def pooled(params, inputs):
    mask = inputs["attention_mask"][..., None]
    x = params["embed"][inputs["input_ids"]]
    return (x * mask).sum(1) / jnp.maximum(mask.sum(1), 1)


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)


def test_pseudo_loss_against_a_direct_loop():
    lengths, mask_id = [5, 3, 4], 9
    ids = RNG.integers(1, 9, (3, 5)).astype(np.int32)
    attention = (np.arange(5) < np.array(lengths)[:, None]).astype(np.int32)
    special = np.zeros_like(ids)
    special[:, 0] = 1
    batch = {"input_ids": ids, "attention_mask": attention, "special_tokens_mask": special}
    total = []
    for row in range(3):
        for t in range(1, lengths[row]):
            masked = ids[row].copy()
            masked[t] = mask_id
            logits = bidirectional(PARAMS, {"input_ids": masked[None], "attention_mask": attention[row][None]})
            total.append(-log_softmax(logits)[0, t, ids[row, t]])
    out = forgetting.pseudo_loss(bidirectional, PARAMS, [batch], mask_id=mask_id)
    assert out["tokens"] == len(total) == 9
    assert out["loss"] == pytest.approx(np.mean(total), rel=1e-5)
    assert out["pseudo_perplexity"] == pytest.approx(np.exp(np.mean(total)), rel=1e-5)
    last = {k: v[[2, 2]] for k, v in batch.items()} | {"weight": np.array([1.0, 0.0], np.float32)}
    again = forgetting.pseudo_loss(
        bidirectional, PARAMS, [{k: v[:2] for k, v in batch.items()}, last], mask_id=mask_id)
    assert again["loss"] == pytest.approx(out["loss"], rel=1e-6) and again["tokens"] == 9


def test_perplexity_weighs_tokens_and_counts_targets_only():
    ids = RNG.integers(0, V, (2, 6)).astype(np.int32)
    loss_mask = np.array([[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 0]], np.int32)
    attention = np.array([[1] * 6, [1, 1, 1, 1, 1, 0]], np.int32)
    batch = {"input_ids": ids, "loss_mask": loss_mask, "attention_mask": attention}
    logp = log_softmax(causal(PARAMS, batch))
    picked = [-logp[b, t - 1, ids[b, t]] for b in range(2) for t in range(1, 6) if loss_mask[b, t] and attention[b, t]]
    whole = forgetting.perplexity(causal, PARAMS, [batch])
    assert whole["tokens"] == len(picked) == 7
    assert whole["perplexity"] == pytest.approx(np.exp(np.mean(picked)), rel=1e-5)
    rows = [{k: v[[i, i]] for k, v in batch.items()} | {"weight": np.array([1, 0], np.float32)} for i in (0, 1)]
    assert forgetting.perplexity(causal, PARAMS, rows)["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    uniform = forgetting.perplexity(lambda p, x: jnp.zeros((*x["input_ids"].shape, V)), {}, [batch])
    assert uniform["perplexity"] == pytest.approx(V, rel=1e-6)


def test_perplexity_never_predicts_across_packed_segments():
    ids = RNG.integers(0, V, (1, 6)).astype(np.int32)
    batch = {"input_ids": ids, "segment_ids": np.array([[1, 1, 2, 2, 2, 0]], np.int32)}
    logp = log_softmax(causal(PARAMS, batch))
    picked = [-logp[0, t - 1, ids[0, t]] for t in (1, 3, 4)]
    out = forgetting.perplexity(causal, PARAMS, [batch])
    assert out["tokens"] == 3 and out["loss"] == pytest.approx(np.mean(picked), rel=1e-5)


def test_left_padding_has_no_first_prediction():
    ids = RNG.integers(0, V, (1, 4)).astype(np.int32)
    batch = {"input_ids": ids, "attention_mask": np.array([[0, 1, 1, 1]], np.int32)}
    out = forgetting.perplexity(causal, PARAMS, [batch])
    assert out["tokens"] == 2


def pairs(first, second, weight=None):
    mask = np.ones((len(first), 1), np.int32)
    out = {key: {"input_ids": np.array(rows, np.int32), "attention_mask": mask}
           for key, rows in (("first", first), ("second", second))}  # fmt: skip
    return out | ({"weight": np.array(weight, np.float32)} if weight else {})


def test_contrastive_loss_closed_form_and_padding():
    first, second = [[1], [2], [3]], [[4], [2], [6]]
    unit = PARAMS["embed"] / np.linalg.norm(PARAMS["embed"], axis=1, keepdims=True)
    scores = 2 * unit[[1, 2, 3]].astype(np.float64) @ unit[[4, 2, 6]].T
    loss = -(np.diag(log_softmax(scores)) + np.diag(log_softmax(scores.T))).mean() / 2
    hits = ((scores.argmax(1) == np.arange(3)).mean() + (scores.argmax(0) == np.arange(3)).mean()) / 2
    out = forgetting.contrastive_loss(pooled, PARAMS, [pairs(first, second)], scale=2.0)
    assert loss > 0.1 and out["loss"] == pytest.approx(loss, rel=1e-4)
    assert out["accuracy"] == pytest.approx(hits) and out["pairs"] == 3
    padded = forgetting.contrastive_loss(
        pooled, PARAMS, [pairs(first + [[1]], second + [[4]], [1, 1, 1, 0])], scale=2.0)
    assert padded["loss"] == pytest.approx(out["loss"], rel=1e-5) and padded["accuracy"] == out["accuracy"]
    same = forgetting.contrastive_loss(pooled, {"embed": np.ones((V, D), np.float32)}, [pairs(first, second)])
    assert same["loss"] == pytest.approx(np.log(3), rel=1e-5)


def test_pair_batches_split_by_words_and_keep_whole_batches():
    def encode(texts):
        return [[len(w) for w in t.split()] for t in texts]

    out = forgetting.pair_batches(["a bb ccc", "dd e", "x y"], encode, batch_size=2, length=3, pad_id=7)
    assert len(out) == 1
    np.testing.assert_array_equal(out[0]["first"]["input_ids"], [[1, 2, 7], [2, 7, 7]])
    np.testing.assert_array_equal(out[0]["second"]["input_ids"], [[3, 7, 7], [1, 7, 7]])
    np.testing.assert_array_equal(out[0]["first"]["attention_mask"], [[1, 1, 0], [1, 0, 0]])
    with pytest.raises(UserError, match="text 1 has no two halves"):
        forgetting.pair_batches(["a b", "c"], encode, batch_size=1, length=3)
    with pytest.raises(UserError, match="do not fill"):
        forgetting.pair_batches(["a b"], encode, batch_size=2, length=3)


def questions():
    """Five questions with 2 to 4 choices of different lengths."""
    out = []
    for i in range(5):
        context = RNG.integers(0, V, 3).tolist()
        choices = [(context + RNG.integers(0, V, 1 + (i + c) % 3).tolist(), 3) for c in range(2 + i % 3)]
        out.append({"choices": choices, "label": i % 2})
    return out


@pytest.mark.parametrize("with_lengths", [False, True])
def test_multiple_choice_against_a_direct_loop(with_lengths):
    asked, hits, hits_norm = questions(), 0, 0
    if with_lengths:
        asked = [q | {"lengths": [1 + 7 * (i % 2) for i in range(len(q["choices"]))]} for q in asked]
    for q in asked:
        scores, norm = [], []
        for i, (ids, start) in enumerate(q["choices"]):
            logp = log_softmax(causal(PARAMS, {"input_ids": np.array([ids])}))[0]
            total = sum(logp[t - 1, ids[t]] for t in range(start, len(ids)))
            scores.append(total)
            norm.append(total / (q["lengths"][i] if with_lengths else len(ids) - start))
        hits += int(np.argmax(scores) == q["label"])
        hits_norm += int(np.argmax(norm) == q["label"])
    for batch_size in (1, 2, 5, 8):
        batches = forgetting.choice_batches(asked, batch_size=batch_size, length=7)
        out = forgetting.multiple_choice_accuracy(causal, PARAMS, batches)
        assert out == {"accuracy": hits / 5, "accuracy_norm": hits_norm / 5, "questions": 5}
    assert hits != 5 or hits_norm != 5


def test_bad_questions_and_nothing_to_measure():
    q = {"choices": [([1, 2, 3], 2)], "label": 1}
    with pytest.raises(UserError, match="question 0: label 1"):
        forgetting.choice_batches([q], batch_size=1, length=5)
    with pytest.raises(UserError, match="does not fit"):
        forgetting.choice_batches([q | {"label": 0}], batch_size=1, length=2)
    with pytest.raises(UserError, match="nothing to measure"):
        forgetting.perplexity(causal, PARAMS, [])
    nothing = {"input_ids": np.ones((1, 3), np.int32), "loss_mask": np.zeros((1, 3), np.int32)}
    with pytest.raises(UserError, match="nothing to measure"):
        forgetting.perplexity(causal, PARAMS, [nothing])
