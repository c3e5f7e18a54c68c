"""Every objective against numpy, and what all of them promise about weights, padding and repetition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ft_jax import registry
from ft_jax.models import scored
from ft_jax.objectives import inputs_of
from tests.helpers import MASK, VOCAB, assert_trees_close, make_batch, make_model

OBJECTIVES = [m.name for m in registry.methods("objective")]
# objective -> (family of the batch, hyper-parameters a run fills in from its tokenizer)
SETTINGS = {"mlm": ("bert", {"mask_token_id": MASK, "vocab_size": VOCAB}), "causal_lm": ("llama", {}),
            "instruction_alignment": ("llama", {})}  # fmt: skip


def setting(name, rows=6, length=12, seed=0):
    """(objective, apply, params, batch): a bigram table stands for the model, its mean for a classifier."""
    family, hp = SETTINGS.get(name, ("bert", {}))
    model = make_model(family)
    batch = make_batch(model, rows, length, seed)
    width = 2 if name == "classification" else VOCAB
    table = jnp.asarray(np.random.default_rng(seed).standard_normal((VOCAB, width)), jnp.float32)

    def apply(params, inputs, rng, targets=None):
        logits = params["table"][inputs["input_ids"]]
        if rng is not None:
            logits = logits * jax.random.bernoulli(rng, 0.9, logits.shape)
        if width == VOCAB:
            return logits if targets is None else scored.sums(logits, *targets)
        mask = inputs["attention_mask"][..., None]
        return (logits * mask).sum(1) / mask.sum(1)

    fn = registry.get("objective", name).fn
    return lambda p, b, rng=None, apply=apply: fn(apply, p, b, rng, **hp), apply, {"table": table}, batch


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_metrics_are_weighted_means(name):
    objective, _, params, batch = setting(name)
    loss, metrics = objective(params, batch)
    assert float(loss) == float(metrics["loss"]) > 0
    assert all(np.shape(v) == () and np.isfinite(v) for v in metrics.values())
    assert 0 < float(metrics["weight"]) <= batch["input_ids"].size
    grads = jax.grad(lambda p: objective(p, batch)[0])(params)
    assert np.isfinite(grads["table"]).all() and np.abs(grads["table"]).max() > 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_rows_of_weight_zero_and_more_padding_change_nothing(name):
    objective, _, params, batch = setting(name)
    rows = len(batch["label"])
    _, plain = objective(params, batch)
    garbage = make_batch(make_model(SETTINGS.get(name, ("bert", {}))[0]), 3, 12, seed=9)
    weight = np.concatenate([np.ones(rows), np.zeros(3)]).astype(np.float32)
    taller = {k: np.concatenate([batch[k], garbage[k]]) for k in batch} | {"weight": weight}
    assert_trees_close(objective(params, taller)[1], plain, rtol=1e-6)
    assert_trees_close(objective(params, batch | {"weight": weight[:rows]})[1], plain, rtol=1e-6)
    empty = objective(params, batch | {"weight": np.zeros(rows, np.float32)})[1]
    assert float(empty["weight"]) == float(empty["loss"]) == 0
    if name == "mlm":
        return  # which tokens are targets depends on the shape
    longer = {k: np.pad(v, ((0, 0), (0, 5))) if v.ndim == 2 else v for k, v in batch.items()}
    assert_trees_close(objective(params, longer)[1], plain, rtol=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_evaluation_repeats_itself_and_training_follows_its_key(name):
    objective, _, params, batch = setting(name)
    with_key = jax.jit(lambda seed: objective(params, batch, jax.random.key(seed))[0])
    assert float(objective(params, batch)[0]) == float(objective(params, batch)[0])
    assert float(with_key(1)) == float(with_key(1)) != float(with_key(2))
    given = []

    def apply(params, inputs, rng, **options):
        given.append(rng)
        return setting(name)[1](params, inputs, None, **options)

    objective(params, batch, None, apply)
    objective(params, batch, jax.random.key(0), apply)
    assert given[0] is None and given[1] is not None, "dropout in training alone"


@pytest.mark.parametrize("weighted", [False, True])
def test_classification_in_numpy(weighted):
    objective, apply, params, batch = setting("classification")
    weight = np.asarray([1, 0.5, 0, 2, 1, 1], np.float32) if weighted else np.ones(6, np.float32)
    logits = log_softmax(apply(params, inputs_of(batch), None))
    _, metrics = objective(params, batch | ({"weight": weight} if weighted else {}))
    own = logits[np.arange(6), batch["label"]]
    hits = logits.argmax(-1) == batch["label"]
    expected = {"loss": -own @ weight / weight.sum(), "accuracy": hits @ weight / weight.sum(), "weight": weight.sum()}
    assert {k: float(v) for k, v in metrics.items()} == pytest.approx(expected, rel=1e-5)


def test_causal_lm_in_numpy_with_the_prompt_masked():
    objective, apply, params, batch = setting("causal_lm")
    logits, ids = log_softmax(apply(params, inputs_of(batch), None)), batch["input_ids"]
    targets = [(b, t) for b in range(6) for t in range(1, 12) if batch["loss_mask"][b, t]]
    assert 0 < len(targets) < batch["attention_mask"].sum() - 6, "prompt and padding are no targets"
    losses = [-logits[b, t - 1, ids[b, t]] for b, t in targets]
    hits = [logits[b, t - 1].argmax() == ids[b, t] for b, t in targets]
    _, metrics = objective(params, batch)
    expected = {"loss": np.mean(losses), "accuracy": np.mean(hits), "weight": len(targets)}
    assert {k: float(v) for k, v in metrics.items()} == pytest.approx(expected, rel=1e-5)

    grads = jax.grad(lambda free: objective(free, batch, None, lambda p, i, r, targets: scored.sums(p, *targets))[0])(jnp.zeros((6, 12, VOCAB)))
    pulled = {(b, t + 1) for b, t in zip(*np.nonzero(np.abs(grads).sum(-1)), strict=True)}
    assert pulled == set(targets), "nothing pulls on what predicts the prompt"


def corrupted(rng, rows=64, length=128):
    """What the model was shown, the batch, and the metrics of one MLM batch."""
    objective, apply, params, batch = setting("mlm", rows, length)
    shown = []

    def spy(params, inputs, rng, targets):
        shown.append(np.asarray(inputs["input_ids"]))
        return apply(params, inputs, None, targets)

    _, metrics = objective(params, batch, rng, spy)
    return shown[0], batch, params, metrics


def test_mlm_targets_are_15_percent_of_them_80_10_10():
    shown, batch, _, metrics = corrupted(jax.random.key(5))
    ids = batch["input_ids"]
    eligible = (batch["attention_mask"] == 1) & (batch["special_tokens_mask"] == 0)
    count, n = float(metrics["weight"]), eligible.sum()
    changed = shown != ids
    assert not changed[~eligible].any(), "special tokens and padding stay"
    masked, other = (changed & (shown == MASK)).sum(), (changed & (shown != MASK)).sum()

    def near(found, p, total):
        return abs(found / total - p) < 4 * np.sqrt(p * (1 - p) / total)

    assert near(count, 0.15, n)
    random_other = 0.1 * (1 - 2 / VOCAB)  # a random token may be the old one or the mask
    assert near(masked, 0.8 + 0.1 / VOCAB, count) and near(other, random_other, count)
    replaced = shown[changed & (shown != MASK)]
    assert len(set(replaced)) > VOCAB / 2 and replaced.max() < VOCAB
    assert not np.array_equal(shown, corrupted(jax.random.key(6))[0])


def test_mlm_loss_in_numpy():
    """With every logit known, only targets count: the loss lies between the losses of its possible targets."""
    shown, batch, params, metrics = corrupted(jax.random.key(5))
    logits, ids = log_softmax(params["table"][shown]), batch["input_ids"]
    losses = -np.take_along_axis(logits, ids[..., None], -1)[..., 0]
    sure = shown != ids  # targets for certain; the ten per cent that are kept cannot be seen from outside
    total, weight = float(metrics["loss"] * metrics["weight"]), float(metrics["weight"])
    eligible = (batch["attention_mask"] == 1) & (batch["special_tokens_mask"] == 0) & ~sure
    rest, kept = total - losses[sure].sum(), weight - sure.sum()
    assert 0.05 * weight < kept < 0.15 * weight
    spread = losses[eligible].std() / np.sqrt(kept)
    assert abs(rest / kept - losses[eligible].mean()) < 4 * spread
