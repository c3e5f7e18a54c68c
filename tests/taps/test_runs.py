"""Taps by name through the engine: the loss falls, what a run saves is what it trained, and LoFiT's two stages."""

import importlib
import json
import re

import jax
import numpy as np
import pytest

from ft_jax import masks, train, tree
from ft_jax.errors import UserError
from ft_jax.io import runs
from ft_jax.taps import heads
from tests import folders

METHODS = {
    "houlsby(size=8)": {"layers/taps/attn_out", "layers/taps/ffn_out"},
    "lora(rank=2)+pfeiffer(size=8)": {"layers/taps/ffn_out"},
    "mam_adapter(size=8)": {"layers/taps/ffn_out"},
    "polyhistor(size=8,factor=2)": {"taps/ffn_out"},
    "lofit(heads=0:1/2:3)": {"taps/heads"},
    "unipt(size=8)": {"taps/side"},
    "lst(reduction=4)": {"taps/side"},
    "nf4+qst(reduction=4,rank=4)": {"taps/side"},
    "levi(size=8)": {"taps/side"},
}
FAST = ("houlsby(size=8)",)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    with folders.small_home(tmp_path_factory, 80) as home:
        yield home


def config(home, text, **groups):
    method, optimizer = importlib.import_module("configs.train").method(text)
    cfg = {
        "steps": 80, "batch_size": 16, "model": {"path": str(home / "bert"), "head": "classification", "dropout": False},
        "method": method, "data": {"source": str(home / "reviews.jsonl"), "num_labels": 2, "max_length": 16},
        "optimizer": {"learning_rate": 1e-2, **optimizer}, "eval": {"every": 0, "metric": "accuracy"},
        "save": {"every": 80}, "log": {"every": 1, "tensorboard": False}, "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
    }  # fmt: skip
    return {**cfg, **groups}


@pytest.mark.slow
@pytest.mark.parametrize("text", [m if m in FAST else pytest.param(m, marks=pytest.mark.slow) for m in METHODS])
def test_the_loss_falls_and_the_run_is_read_back(text, home, tmp_path):
    train.train(config(home, text), tmp_path / "run")
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    rows = [row["train/loss"] for row in map(json.loads, lines) if "train/loss" in row]
    assert np.mean(rows[-10:]) < 0.9 * np.mean(rows[:10]), rows
    model, params, recipe = runs.load_run(tmp_path / "run", "last")
    fresh = train.recipe.build(recipe)[1]
    changed = {p for (p, x), y in zip(tree.flatten(params).items(), jax.tree.leaves(fresh), strict=True) if not np.array_equal(x, y)}
    assert {re.match(".*taps/[^/]+", p)[0] for p in changed if "taps/" in p} == METHODS[text]
    own = {p for p, on in tree.flatten(masks.rules(params, 0)).items() if on}
    assert changed <= own and all(p.split("/")[0] in ("head", "pooler", "taps", "layers") for p in changed)


@pytest.mark.slow
def test_lofit_is_two_runs(home, tmp_path, capsys):
    """A learnt under an L1 pull, the heads it names offset in a second run, from the base again."""
    train.train(config(home, "lofit_scale+adamw_l1(l1=0.0005)"), tmp_path / "scale")
    _, params, _ = runs.load_run(tmp_path / "scale", "last")
    a = np.abs(np.asarray(params["layers"]["taps"]["heads"].a))
    assert a.max() > 1e-3
    heads.main([str(tmp_path / "scale"), "--count", "2"])
    text = capsys.readouterr().out.strip()
    assert text.startswith("lofit(heads=") and text.count(":") == 2
    train.train(config(home, text), tmp_path / "offsets")
    _, params, _ = runs.load_run(tmp_path / "offsets", "last")
    assert params["taps"]["heads"].v.shape == (2, 8) and np.abs(params["taps"]["heads"].v).max() > 1e-3


@pytest.mark.parametrize(
    "text, words",
    [
        ("unipt(size=8)+lora(rank=2)", "layers/attn/k/kernel/a trains below the side network at taps/side"),
        ("unipt(size=8)+houlsby(size=8)", "layers/taps/attn_out/down trains below the side network"),
        ("unipt(size=8)+lst", "both take the site 'side'"),
        ("houlsby(size=8)+pfeiffer(size=8)", "both take the site 'ffn_out'"),
        ("polyhistor(size=8,factor=2)+compacter(size=8,factor=2)", "both take the site 'ffn_out'"),
        ("houlsby(size=80)", "houlsby: size 80 does not fit a layer of 32 features"),
    ],
)
def test_methods_that_do_not_go_together(text, words, home, tmp_path):
    with pytest.raises(UserError, match=words):
        train.train(config(home, text), tmp_path / "run")
    assert not (tmp_path / "run").exists()
