"""The frame of a study: parts computed once, one failure that loses nothing else, a page from what is there."""

import dataclasses
import json

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments import run, study
from ft_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Setting:
    size: int = 3


def make(calls, broken=()):
    def part(name, needs=()):
        def fn(context):
            calls.append(name)
            if name in broken:
                raise ValueError("a bug in this part")
            return {"name": name, "of": [context.value(n)["name"] for n in needs], "size": context.setting.size}

        return fn

    return study.Study(
        name="toy", question="does the frame hold?", scales={"smoke": Setting(), "cpu": Setting(5)},
        parts=lambda setting: {"one": part("one"), "two": part("two"), "both": part("both", ("one", "two"))},
        page=lambda context: ("Toy", "a study", [("Parts", [f"one is {context.get('one')}"])]),
        claims=lambda context: [{"claim": "it holds", "paper": "1", "ours": str(context.value("both")["size"]), "verdict": "holds", "why": ""}],
    )  # fmt: skip


def test_parts_run_once_and_the_page_is_made_of_them(tmp_path):
    calls = []
    toy = make(calls)
    assert study.run(toy, "smoke", tmp_path) == []
    assert calls == ["one", "two", "both"]
    assert study.run(toy, "smoke", tmp_path) == [] and len(calls) == 3
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["parts"]["both"] == {"name": "both", "of": ["one", "two"], "size": 3}
    assert summary["claims"][0]["ours"] == "3" and summary["setting"] == {"size": 3}
    assert "it holds" in (tmp_path / "report.html").read_text()
    assert set(study.status(toy, "smoke", tmp_path).values()) == {"done"}


def test_a_part_that_fails_loses_no_other_and_is_tried_again(tmp_path, capsys):
    calls = []
    assert study.run(make(calls, broken=("one",)), "smoke", tmp_path) == ["one", "both"]
    assert "one failed: a bug in this part" in capsys.readouterr().err
    assert "ValueError" in (tmp_path / "parts" / "one.failed").read_text()
    assert study.status(make([]), "smoke", tmp_path) == {"one": "failed", "two": "done", "both": "failed"}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["made"]["missing"][:2] == ["one", "both"] and "the claims" in summary["made"]["missing"][2]
    assert summary["claims"] == [] and "Not done: one, both, the claims" in (tmp_path / "report.html").read_text()
    assert study.run(make(calls), "smoke", tmp_path) == []
    assert calls == ["one", "two", "both", "one", "both"]
    assert set(study.status(make([]), "smoke", tmp_path).values()) == {"done"}


def test_only_some_parts(tmp_path):
    calls = []
    study.run(make(calls), "smoke", tmp_path, only="t.*")
    assert calls == ["two"]
    with pytest.raises(UserError, match="matches no part of toy.*both"):
        study.run(make(calls), "smoke", tmp_path, only="bth")


def test_a_folder_holds_one_setting(tmp_path):
    study.run(make([]), "smoke", tmp_path)
    with pytest.raises(UserError, match="another setting of size"):
        study.run(make([]), "cpu", tmp_path)
    with pytest.raises(UserError, match="no scale 'smok'; nearest: 'smoke'"):
        study.run(make([]), "smok", tmp_path)


def test_publishing_wants_small_results(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "__file__", str(tmp_path / "experiments" / "study.py"))
    with pytest.raises(UserError, match="no results of toy"):
        study.publish(make([]), "smoke", tmp_path / "w")
    study.run(make([]), "smoke", tmp_path / "w")
    target = study.publish(make([]), "smoke", tmp_path / "w")
    assert (target / "summary.json").read_bytes() == (tmp_path / "w" / "summary.json").read_bytes()
    monkeypatch.setattr(study, "RESULTS_LIMIT", 10)
    with pytest.raises(UserError, match="MB"):
        study.publish(make([]), "smoke", tmp_path / "w")


def test_published_results_are_where_another_run_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "__file__", str(tmp_path / "experiments" / "study.py"))
    study.run(make([], broken=("two",)), "smoke", tmp_path / "w")
    study.publish(make([]), "smoke", tmp_path / "w")
    calls = []
    assert study.restore(make(calls), "smoke", tmp_path / "other") == ["one"]
    assert study.run(make(calls), "smoke", tmp_path / "other") == [] and calls == ["two", "both"]
    monkeypatch.setattr(study.Study, "setting", lambda self, scale: Setting(4))
    with pytest.raises(UserError, match="another setting"):
        study.restore(make([]), "smoke", tmp_path / "third")


def test_a_band_spans_the_seeds():
    ax = Figure().subplots()
    line = study.band(ax, [1, 2], [[0.0, 4.0], [2.0, np.nan]])
    assert line.get_ydata().tolist() == [1.0, 4.0]
    assert ax.collections[0].get_datalim(ax.transData).y1 == 4.0
    assert study.spread([1.0, 3.0], ".1f") == "2.0 ± 1.4" and study.spread([1.0], ".1f") == "1.0" and study.spread([None]) == "–"


def test_every_study_is_listed_with_what_is_done():
    lines = run.listing()
    for name in ("demo", *run.names()):
        assert any(line.startswith(f"{name}: ") for line in lines)
    assert sum("done" in line for line in lines) == len(lines) - 1 - len(run.names())
    with pytest.raises(UserError, match="no study called"):
        run.load("nothing_like_it")
