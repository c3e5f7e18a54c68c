"""Several label words for a class, and their weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ft_jax import masks, models, taps, train, tree
from ft_jax.data import prompts
from ft_jax.errors import UserError
from ft_jax.io import hf, runs, tokenizer
from tests import folders
from tests.helpers import MASK, make_model, make_params
from tests.models.test_label_words import prompted

IDS = ((9, 31, 12), (6,), (20, 7))


@functools.cache
def setting(family):
    """(model with six words for three classes, the one with a class for each word, params, batch)."""
    base = make_model(family, {"bert": "mlm"}.get(family, "lm"))
    words, flat = (base.with_head("label_words", label_ids=ids, mask_id=MASK) for ids in (IDS, sum(IDS, ())))
    return words, flat, make_params(base), prompted(base)


@pytest.mark.parametrize("family", ["bert", "llama", "qwen2"])
def test_class_logits_are_weighted_means_of_the_words(family):
    words, flat, params, batch = setting(family)
    each = np.asarray(jax.jit(flat.apply)(params, batch), np.float64)
    plain = jax.jit(words.apply)(params, batch)
    mean = np.stack([each[:, :3].mean(1), each[:, 3], each[:, 4:].mean(1)], 1)
    assert words.config.num_labels == 3 and plain.shape == (4, 3)
    np.testing.assert_allclose(plain, mean, atol=1e-5)
    made = taps.attach(words, params, [("logits", "sciprompt")], jax.random.key(0))
    np.testing.assert_allclose(jax.jit(words.apply)(made, batch), plain, atol=1e-6)
    made = taps.attach(words, params, [("logits", "sciprompt(scores=1:0.5:2/0.8/3:1)")], jax.random.key(0))
    scored = each * [1, 0.5, 2, 0.8, 3, 1]
    expected = np.stack([scored[:, :3].mean(1), scored[:, 3], scored[:, 4:].mean(1)], 1)
    np.testing.assert_allclose(jax.jit(words.apply)(made, batch), expected, atol=1e-5)


def test_the_scores_alone_train_and_get_the_gradient_of_the_formula():
    words, flat, params, batch = setting("bert")
    made = taps.attach(words, params, [("logits", "sciprompt")], jax.random.key(0))
    trainable, frozen = tree.split(made, masks.declared(made, 0))
    assert {p: x.shape for p, x in tree.flatten(trainable).items()} == {"taps/logits/scores": (6,)}
    grad = jax.jit(jax.grad(lambda t: words.apply(tree.join(t, frozen), batch).sum()))(trainable)
    each = np.asarray(jax.jit(flat.apply)(params, batch)).sum(0)
    np.testing.assert_allclose(grad["taps"]["logits"].scores, each / [3, 3, 3, 1, 2, 2], atol=1e-5)


def test_a_config_with_several_words_survives_saving(tmp_path):
    words, _, params, batch = setting("bert")
    assert models.config_from_hf(models.config_to_hf(words.config)) == words.config
    folders.make_model_folder(tmp_path / "mlm", head="mlm")
    model, _ = hf.load(str(tmp_path / "mlm"), head="label_words", label_ids=[[7, 8], [9]])
    assert model.config.label_ids == ((7, 8), (9,)) and hash(model.config) is not None


@pytest.mark.parametrize(
    "site, text, words",
    [
        ("side", "sciprompt", "label words are weighed at the site 'logits', not at 'side'"),
        ("logits", "sciprompt(scores=1:2/3)", r"scores for \(2, 1\) words, the classes have \(3, 1, 2\)"),
        ("logits", "sciprompt(scores=a:b)", "cannot read the scores 'a:b'"),
    ],
)
def test_an_unfit_rule_is_one_line(site, text, words):
    model, _, params, _ = setting("bert")
    with pytest.raises(UserError, match=words):
        taps.attach(model, params, [(site, text)], jax.random.key(0))


def test_without_label_words_there_is_nothing_to_weigh():
    model = make_model("bert")
    with pytest.raises(UserError, match="it needs model.head 'label_words', not 'classification'"):
        taps.attach(model, make_params(model), [("logits", "sciprompt")], jax.random.key(0))
    for ids, words in ((((9, 6), (6,)), "class 1 has the same token 6 as class 0"), (((9, 9), 6), "class 0 has the same token 9"),
                       (((), (6,)), "class 0 has no token")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            make_model("bert", "mlm").with_head("label_words", label_ids=ids, mask_id=MASK)


@pytest.mark.slow
def test_a_run_with_several_words_a_class(tmp_path, monkeypatch):
    monkeypatch.setenv("FT_JAX_CACHE", str(tmp_path / "cache"))
    folders.make_model_folder(tmp_path / "mlm", head="mlm", seed=3)
    folders.write_rows(tmp_path / "reviews.jsonl", folders.reviews(np.random.default_rng(0), 80))
    words = [list(folders.BAD[:3]), list(folders.GOOD[:2])]
    data = {"source": str(tmp_path / "reviews.jsonl"), "num_labels": 2, "max_length": 16, "template": "{text} It was [MASK]",
            "label_words": words}  # fmt: skip
    cfg = {
        "steps": 20, "batch_size": 8, "model": {"path": str(tmp_path / "mlm"), "head": "label_words"}, "data": data,
        "method": {"taps": (("logits", "sciprompt"), ("ffn_out", "parallel_adapter(size=8)"))},
        "optimizer": {"learning_rate": 1e-2}, "eval": {"every": 0, "metric": "accuracy"}, "save": {"every": 20},
        "log": {"every": 1, "tensorboard": False}, "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
    }  # fmt: skip
    ready = train.ready(cfg)
    tok = tokenizer.load(hf.resolve(str(tmp_path / "mlm")))
    assert ready["model"]["label_ids"] == [tuple(folders.WORDS.index(w) for w in own) for own in words]
    with pytest.raises(UserError, match="label words 'bad' and 'bad' are the same token"):
        prompts.label_ids(tok, "encoder", {**ready["data"], "label_words": [["bad", "bad"], "good"]})
    with pytest.raises(UserError, match=r"the word of class 0 is \[\]"):
        prompts.label_ids(tok, "encoder", {**ready["data"], "label_words": [[], "good"]})
    summary = train.train(cfg, tmp_path / "run")
    model, params, _ = runs.load_run(tmp_path / "run", "last")
    assert [len(w) for w in model.config.words] == [3, 2] and summary["trainable_parameters"] == 5 + 3 * (2 * 32 * 8 + 8 + 32)
    assert np.abs(params["taps"]["logits"].scores - 1).max() > 1e-3
    lines = [float(line.split('"train/loss": ')[1].split(",")[0]) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
             if "train/loss" in line]  # fmt: skip
    assert np.mean(lines[-4:]) < np.mean(lines[:4])
    assert jnp.isfinite(params["taps"]["logits"].scores).all()
