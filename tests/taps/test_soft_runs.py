"""Runs with prompts and prefixes by name: they learn, resume as recipes, and say before compute what does not fit."""

import importlib
import json

import numpy as np
import pytest

from ft_jax import train, tree
from ft_jax.errors import UserError
from ft_jax.io import files, peft, runs
from tests import folders

configs = importlib.import_module("configs.train")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FT_JAX_CACHE", str(home / "cache"))
        folders.make_model_folder(home / "bert")
        folders.make_model_folder(home / "llama", "llama")
        folders.write_rows(home / "reviews.jsonl", folders.reviews(np.random.default_rng(0), 80))
        folders.write_rows(home / "recited.jsonl", folders.recited(np.random.default_rng(0), 40))
        yield home


def config(home, method, family="bert", **data):
    objective, source = ("classification", "reviews") if family == "bert" else ("causal_lm", "recited")
    cfg = configs.get_config(f"model={home / family},data={home / source}.jsonl,method={method},objective={objective}")
    cfg.update({"steps": 60, "batch_size": 16, "save": {"every": 30}, "log": {"every": 1, "tensorboard": False}, "eval": {"every": 0},
                "mesh": {"data": 1}, "optimizer": {"learning_rate": 5e-3 if family == "bert" else 0.03}})  # fmt: skip
    cfg.data.update({"num_labels": 2, "max_length": 16, **data})
    return cfg


def losses(workdir):
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [row["train/loss"] for row in rows if "train/loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize("family, method, data", [
    ("bert", "lora(rank=2)+prompt_tuning(length=3, classifier=prompt)", {}),
    ("llama", "prefix_tuning(length=3, hidden=8)", {"packing": True}),
])  # fmt: skip
def test_a_run_learns_and_is_rebuilt_from_its_recipe(family, method, data, home, tmp_path):
    train.train(config(home, method, family, **data), tmp_path / "run")
    seen = losses(tmp_path / "run")
    assert np.mean(seen[-5:]) < 0.9 * np.mean(seen[:5]), seen
    model, params, recipe = runs.load_run(tmp_path / "run", "last")
    site = "prompt" if family == "bert" else "prefix"
    assert recipe["method"]["taps"] == [[site, method.split("+")[-1]]] and set(params["taps"]) == {site}
    trained = {p.split("/")[0] for p in tree.flatten(params) if p.startswith("taps")}
    assert trained == {"taps"} and ("layers/attn/q/kernel/a" in tree.flatten(params)) == (family == "bert")
    if family == "llama":
        peft.save_adapter(tmp_path / "adapter", model, params, str(home / family))
        assert files.read_json(tmp_path / "adapter" / "adapter_config.json")["peft_type"] == "PREFIX_TUNING"
        with pytest.raises(UserError, match="taps"):
            importlib.import_module("ft_jax.io.hf").save(tmp_path / "merged", model, params)


def test_a_text_to_start_from_becomes_the_bases_tokens(home):
    cfg = train.ready(config(home, "prompt_tuning(length=4, text='the film was good')", "llama"))
    ids = [folders.WORDS.index(w) for w in ("<s>", "the", "film", "was", "good")]
    assert cfg["method"]["taps"] == [["prompt", f"prompt_tuning(length=4, init='tokens', ids='{' '.join(map(str, ids))}')"]]
    assert train.ready(cfg) == cfg
    model, params, _, _ = train.recipe.build(train.recipe.of_config(cfg))
    np.testing.assert_array_equal(params["taps"]["prompt"].vectors, params["embed"]["tokens"]["embedding"][np.asarray(ids[:4])])


def test_rows_must_leave_room(home, tmp_path):
    with pytest.raises(UserError, match="data.max_length 16 is beyond the 14 positions that .* has for tokens"):
        train.train(config(home, "prompt_tuning(length=50)"), tmp_path / "run")
    with pytest.raises(UserError, match="its A B is for 8 tokens, the batch has 1[0-9]; give the method tokens="):
        train.train(config(home, "dept(length=2, rank=2, tokens=8)", "llama"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method, words", [
    ("prompt_tuning+p_tuning", "'prompt_tuning' and 'p_tuning' both take the site 'prompt'"),
    ("prefix_tuning+p_tuning_v2(length=3)", "'prefix_tuning' and 'p_tuning_v2' both take the site 'prefix'"),
    ("promt_tuning", "no method called 'promt_tuning'; nearest: 'prompt_tuning'"),
])  # fmt: skip
def test_names_that_do_not_go_together(method, words):
    with pytest.raises(UserError, match=words):
        configs.method(method)


def test_all_that_go_together():
    assert configs.method("lora+prompt_tuning(length=5)+prefix_tuning+l2m")[0]["taps"] == (
        ("prompt", "prompt_tuning(length=5)"), ("prefix", "prefix_tuning"), ("pool", "l2m"))  # fmt: skip
