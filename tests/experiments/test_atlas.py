"""The atlas end to end on a tiny model: every part, the table, the page; that no registered method is missing from it."""

import dataclasses
import json
import re

import numpy as np
import pytest

from configs.train import method
from experiments import study as shared
from experiments.atlas import report, running, settings
from experiments.atlas.study import STUDY, costed, found, parts
from ft_jax import registry
from ft_jax.masks import split_outside
from tests import folders

TRIED = ("full", "LoRA r=1", "LoRAMoE", "LT-SFT", "full, SGD")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """``(setting, Context)`` of the finished study."""
    folder = tmp_path_factory.mktemp("atlas")
    rng = np.random.default_rng(0)
    train, held = (str(folders.write_rows(folder / f"{name}.jsonl", folders.reviews(rng, n))) for name, n in (("train", 200), ("held", 60)))
    data = {"source": train, "num_labels": 2, "max_length": 8, "splits": {"validation": held, "test": held}}
    task = settings.Task(
        model=str(folders.make_model_folder(folder / "bert")), objective="classification", data=data, methods=TRIED, steps=30,
        batch_size=8, seeds=(0, 1), line="tiny", test=("test", 40), forgetting={"source": held, "texts": 24, "words": 6, "batch": 12, "length": 6},
        eval_batch=20, scored=16, rates=(3e-4, 3e-3, 1e30))  # fmt: skip
    setting = settings.Setting({"tiny": task})
    failed = shared.run(dataclasses.replace(STUDY, scales={"tiny": setting}), "tiny", folder / "work")
    assert failed == []
    return setting, shared.Context(setting, folder / "work")


@pytest.mark.slow
def test_rows_and_page(done):
    setting, context = done
    base = context.value("tiny_base")
    table = {r["method"]: r for r in report.rows(base, found(context)["tiny"])}
    assert set(table) == set(TRIED)
    assert table["full"]["key"] < base["task"]["loss"]  # it learns
    assert table["full"]["trained"] > table["LoRA r=1"]["trained"] and table["full"]["changed"] > table["LT-SFT"]["changed"] > 0
    assert table["LoRA r=1"]["flops"] < 0.9 and table["full"]["flops"] == pytest.approx(1)
    assert table["LoRAMoE"]["changed"] == 0 and table["LoRAMoE"]["erank"] is None and table["LoRAMoE"]["key"] < base["task"]["loss"]  # a mixture is no matrix
    assert table["LoRA r=1"]["erank"] == pytest.approx(1, abs=0.01) and table["full"]["erank"] > 2
    value = found(context)["tiny"]["full"]
    assert [t["loss"] is None for t in value["tried"]] == [False, False, True]  # 1e30 diverges and loses nothing else
    assert not (context.workdir / "runs" / "tiny-full").exists()
    page = (context.workdir / "report.html").read_text()
    assert "table class=sortable" in page and "aria-sort" in page
    kept = json.loads((context.workdir / "summary.json").read_text())
    assert set(kept["parts"]) == set(parts(setting))


def test_every_registered_method_has_a_row_or_a_reason():
    """A new method shows up here: it is in the table, or the table says why not."""
    rows = set()
    for _, text in settings.METHODS.values():
        for part in split_outside(text, "+"):
            rows |= {re.match(r"\s*([\w]+)", name)[1] for name in part.split("@")}
    registered = {(m.kind, m.name) for kind in ("kernel", "tap", "mask", "update") for m in registry.methods(kind)}
    missing = {f"{kind} {name}" for kind, name in registered if name not in rows and (kind, name) not in settings.LEFT_OUT}
    assert not missing
    assert set(settings.LEFT_OUT) <= registered


@pytest.mark.parametrize("name", settings.METHODS)
def test_every_row_is_a_method(name):
    text = settings.METHODS[name][1]
    group, _ = method(text)
    assert group["name"] == text
    assert settings.METHODS[name][0]


def test_parts_have_names_of_their_own():
    for setting in settings.SCALES.values():
        wanted = sum((1 + (costed(setting, n) == n)) * len(t.rows) + 1 + any("scores=" in settings.METHODS[m][1] for m in t.rows) for n, t in setting.tasks.items())
        assert len(parts(setting)) == wanted
    assert {n: costed(settings.SCALES["cpu"], n) for n in settings.SCALES["cpu"].tasks} == {"imdb": "imdb", "subjects": "imdb", "sentences": "sentences"}


def test_rows_with_larger_rates_are_rows():
    assert set(settings.FASTER) <= set(settings.METHODS)
    task = settings.SCALES["cpu"].tasks["imdb"]
    assert running.rates(task, "C3A") == tuple(36 * r for r in running.rates(task, "full"))


def test_spectra_of_an_unchanged_tree():
    w = {"layers/attn/q/kernel": np.ones((2, 8, 8), np.float32)}
    assert running.spectra(w, w) == {"matrices": 2, "intruders": None, "effective_rank": None, "delta_norm": 0.0}
