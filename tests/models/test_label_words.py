"""The head label_words: rows of the language model's output at one place, trained, saved, loaded, grafted and exported."""

import json
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ft_jax import train, tree
from ft_jax.analysis import predictions
from ft_jax.data import pipeline, prompts
from ft_jax.errors import UserError
from ft_jax.io import hf, runs, tokenizer
from ft_jax.kernels import LowRank
from ft_jax.models.config import LANGUAGE_HEADS
from ft_jax.objectives import inputs_of
from tests import folders
from tests.helpers import MASK, inputs, make_batch, make_model, make_params

IDS = (9, 31, 6)


def prompted(model, rows=4, length=9, seed=0):
    """Inputs with one mask token a row, at different places, among the real ones."""
    batch = inputs(make_batch(model, rows, length, seed))
    for row, real in enumerate(batch["attention_mask"].sum(1)):
        batch["input_ids"][row, 1 + row % (real - 1)] = MASK
    return batch


def gathered(model, params, batch):
    """The language model's logits at the place that label words are read from."""
    logits = model.with_head(LANGUAGE_HEADS[model.config.kind]).apply(params, batch)
    if model.config.kind == "encoder":
        places = (batch["input_ids"] == MASK).argmax(1)
    else:
        places = batch["attention_mask"].shape[1] - 1 - batch["attention_mask"][:, ::-1].argmax(1)
    return np.asarray(logits)[np.arange(len(places)), places][:, IDS]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "roberta", "llama", "qwen2"])
def test_logits_are_those_of_the_language_model(family):
    model = make_model(family, LANGUAGE_HEADS[make_model(family).config.kind])
    params, batch, pad = make_params(model), prompted(model), model.config.pad_token_id
    words = model.with_head("label_words", label_ids=IDS, mask_id=MASK)
    assert words.config.num_labels == 3 and tree.flatten(words.shapes()).keys() == tree.flatten(params).keys()
    run = jax.jit(words.apply)
    found = run(params, batch)
    assert found.shape == (4, 3) and found.dtype == jnp.float32 and np.std(found) > 1e-2
    np.testing.assert_allclose(found, gathered(model, params, batch), atol=1e-5)
    left = {k: np.pad(v, ((0, 0), (3, 0)), constant_values=pad * (k == "input_ids")) for k, v in batch.items()}
    np.testing.assert_allclose(run(params, left), gathered(model, params, left), atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "llama", "qwen2"])
def test_only_the_rows_of_the_words_are_computed(family):
    """Against the language model's head over 64 tokens x a vocabulary of 5,000, by XLA's own count."""
    model = make_model(family, LANGUAGE_HEADS[make_model(family).config.kind], vocab_size=5000)
    batch, params = prompted(model, rows=4, length=16), model.shapes()
    words = model.with_head("label_words", label_ids=IDS, mask_id=MASK)
    counts = [jax.jit(m.apply).lower(params, batch).cost_analysis()["flops"] for m in (words, model)]
    assert counts[0] < counts[1] - 2 * 4 * 16 * 5000 * 32 * 0.95


def test_a_head_with_an_adapter_is_read_too():
    model = make_model("qwen2", "lm")
    params, batch, rng = make_params(model), prompted(model), np.random.default_rng(0)
    words = model.with_head("label_words", label_ids=IDS)
    a, b = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((32, 2), (2, 64)))
    params["head"]["kernel"] = LowRank(params["head"]["kernel"], a, b, jnp.float32(0.5))
    np.testing.assert_allclose(words.apply(params, batch), gathered(model, params, batch), atol=1e-4)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"label_ids": ()}, ["needs label_ids"]),
        ({"label_ids": (3, 64)}, ["token 64 of class 1 is outside the vocabulary of 64"]),
        ({"label_ids": (3, 5, 3)}, ["class 2 has the same token 3 as class 0"]),
        ({"label_ids": (3, 5), "mask_id": None}, ["needs mask_id"]),
        ({"label_ids": (3, 5), "num_labels": 3}, ["num_labels is 3 but label_ids names 2 tokens"]),
    ],
)
def test_label_ids_that_cannot_be_are_one_line(change, words):
    with pytest.raises(UserError) as error:
        make_model("bert", "mlm").with_head("label_words", **{"mask_id": MASK, **change})
    assert all(w in str(error.value) for w in words)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A BERT with an MLM head, one without, a Llama, and labelled sentences."""
    home = tmp_path_factory.mktemp("words")
    folders.make_model_folder(home / "masked", head="mlm")
    folders.make_model_folder(home / "bare")
    folders.make_model_folder(home / "llama", "llama", "lm")
    folders.write_rows(home / "reviews.jsonl", folders.reviews(np.random.default_rng(0), 200))
    return home


TEMPLATES = {"masked": "{text} it was [MASK]", "llama": "{text} it was"}


def config(home, name, **model):
    return {
        "steps": 90, "batch_size": 16, "model": {"path": str(home / name), "head": "label_words", **model},
        "data": {"source": str(home / "reviews.jsonl"), "num_labels": 2, "max_length": 16, "validation_fraction": 0.3,
                 "template": TEMPLATES.get(name, TEMPLATES["masked"]), "label_words": ("awful", "superb")},
        "optimizer": {"learning_rate": 5e-3}, "eval": {"every": 30, "metric": "accuracy"}, "save": {"every": 30},
        "method": {"trainable": (("layers/.*", True),)}, "log": {"tensorboard": False},
        "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
    }  # fmt: skip


def script(name, *args):
    """``main(args)`` of a script, in this process."""
    runpy.run_path(str(folders.ROOT / "scripts" / name))["main"](list(args))


@pytest.fixture(scope="module", params=[n if n == "llama" else pytest.param(n, marks=pytest.mark.slow) for n in TEMPLATES])
def run(home, request, tmp_path_factory):
    """A finished run: (its config, its folder, its summary)."""
    cfg, folder = config(home, request.param), tmp_path_factory.mktemp("run") / request.param
    return cfg, folder, train.train(cfg, folder)


def test_a_run_learns_and_is_loaded_again(run, tmp_path):
    cfg, folder, summary = run
    assert summary["validation"]["accuracy"] > 0.9
    assert train.train(cfg, folder) == summary  # the second call finds the same config
    model, params, recipe = runs.load_run(folder, which="last")
    ids = tuple(folders.WORDS.index(w) for w in ("awful", "superb"))
    assert model.config.head == "label_words" and model.config.label_ids == ids == tuple(recipe["model"]["label_ids"])
    assert model.config.mask_id == (folders.WORDS.index("[MASK]") if model.config.kind == "encoder" else None)

    tok = tokenizer.load(cfg["model"]["path"])
    data = pipeline.build(cfg["data"], "validation", tok, "classification", model.config.vocab_size, tmp_path / "tokens")
    predict = predictions.predictor(lambda p, batch: model.apply(p, inputs_of(batch)), "classification")
    found = predict(params, pipeline.eval_batches(data, 16))
    assert found["correct"].mean() == pytest.approx(summary["validation"]["accuracy"])

    hf.save(tmp_path / "saved", model, params, source=cfg["model"]["path"])
    again, same = hf.load(tmp_path / "saved")
    assert again.config == model.config
    for path, leaf in tree.flatten(params).items():
        np.testing.assert_array_equal(leaf, tree.flatten(same)[path], err_msg=path)
    language = hf.load(tmp_path / "saved", head=LANGUAGE_HEADS[model.config.kind])[0]
    assert language.config.label_ids == () and language.config.mask_id is None
    raw = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert raw["architectures"] == [{"encoder": "BertForMaskedLM", "decoder": "LlamaForCausalLM"}[model.config.kind]]


@pytest.mark.slow
@pytest.mark.parametrize("run", ["masked"], indirect=True)
def test_a_run_is_exported_and_grafted(run, tmp_path):
    cfg, folder, _ = run
    script("export.py", f"--workdir={folder}", f"--out={tmp_path / 'merged'}")
    assert hf.load(tmp_path / "merged")[0].config == runs.load_run(folder)[0].config
    script("graft.py", f"--workdir={folder}", f"--out={tmp_path / 'graft'}", "--sparsity=0.5", "--steps=1",
           "--examples=32", "--micro=16")  # fmt: skip
    report = json.loads((tmp_path / "graft" / "graft.json").read_text())
    assert report["tuned"]["accuracy"] > 0.9 > report["base"]["accuracy"]


def test_what_has_no_label_words_says_so(home, tmp_path):
    with pytest.raises(UserError, match="no masked-LM head for label words"):
        train.train(config(home, "bare"), tmp_path / "run")
    with pytest.raises(UserError, match="label_words is for model.head 'label_words', not for 'prototype'"):
        train.train(config(home, "masked", head="prototype"), tmp_path / "run")
    cfg = config(home, "masked")
    cfg["data"] |= {"template": "", "label_words": ()}
    with pytest.raises(UserError, match="needs data.template and data.label_words"):
        train.train(cfg, tmp_path / "run")
    with pytest.raises(UserError, match="needs label_ids"):
        hf.load(home / "masked", head="label_words")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("run", ["masked"], indirect=True)
def test_the_folders_own_words_are_the_default(run, home, tmp_path):
    """A saved label-word model needs no head named; the words in its config give way to the data's."""
    cfg, folder, _ = run
    model, params, _ = runs.load_run(folder)
    hf.save(tmp_path / "saved", model, params, source=cfg["model"]["path"])
    filled = {"model": {"path": str(tmp_path / "saved"), "head": "", "label_ids": ()}, "method": {"taps": ()},
              "data": pipeline.settings({**cfg["data"], "label_words": ("dull", "great")})}  # fmt: skip
    prompts.fill(filled)
    assert filled["model"]["label_ids"] == [folders.WORDS.index(w) for w in ("dull", "great")]
