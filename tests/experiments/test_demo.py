"""The demo study end to end on tiny models: every number on the page comes from the summary, a second call computes nothing."""

import json

import numpy as np
import pytest

from experiments.demo import __main__ as demo
from experiments.demo import report, settings
from ft_jax import train
from ft_jax.errors import UserError
from tests import folders


def tiny(tmp_path, objective):
    rng = np.random.default_rng(0)
    encoder = objective == "classification"
    model = folders.make_model_folder(tmp_path / "model", "bert" if encoder else "llama", "none" if encoder else "lm")
    make = folders.reviews if encoder else folders.alphabets
    files = {name: str(folders.write_rows(tmp_path / f"{name}.jsonl", make(rng, n))) for name, n in (("a", 96), ("b", 40))}
    data = {"source": files["a"], "splits": {"validation": files["b"], "test": files["b"]}, "max_length": 16, "num_labels": 2}
    books = {"source": files["b"], "splits": {"test": files["b"]}, "max_length": 16, "append_eos": False}
    common = {"steps": 80, "batch_size": 8, "lr_scale": 150.0, "eval_batch": 16, "test_limit": 40, "splits": ("validation", "test"),
              "line": "a tiny model", "subtitle": "tiny", "ranks": (1, 2, 4)}  # fmt: skip
    graft = {"sparsities": (1e-2, 1e-1), "random": (1e-1,), "learned": (1e-2,), "steps": 2, "examples": 16, "micro": 8, "learning_rate": 1e7}
    words = {"metric": "accuracy", "unit": "rows", "test_name": "held-out rows"}
    if encoder:
        return settings.Setting(
            model=str(model), objective=objective, data=data, ood=data, choice=None, graft=graft, words={**words, "ood_name": "others"},
            forgetting={"source": files["b"], "texts": 16, "batch": 8, "words": 8, "max_length": 16}, **common)  # fmt: skip
    return settings.Setting(model=str(model), objective=objective, data=data, ood=None, choice=None, graft=graft, words=words,
                            forgetting={"books": books, "choice": None}, **common)  # fmt: skip


@pytest.mark.slow
def test_encoder_study(tmp_path, monkeypatch):
    s = tiny(tmp_path, "classification")
    monkeypatch.setattr(report, "LABELS", {n: n for n in ("base", *s.runs)})
    work = tmp_path / "demo"
    work.mkdir()
    summary = demo.study(s, work)
    assert set(summary["runs"]) == {"full", "lora_r1", "lora_r2", "lora_r4"}
    for name, (_, rate) in s.runs.items():
        assert summary["runs"][name]["learning_rate"] == pytest.approx(rate)
        rank = summary["spectra"][name]["total"]["effective_rank"]
        assert rank > 4.5 if name == "full" else rank <= int(name.removeprefix("lora_r")) + 1e-3
    full = summary["graft"]
    assert [p["parameters"] for p in full["points"] if p["mask"] == "magnitude"] == [round(f * full["eligible"]) for f in (1e-2, 1e-1)]
    assert summary["forgetting"]["scores"]["base"] != summary["forgetting"]["scores"]["full"]
    assert summary["scores"]["full"]["test"]["accuracy"] > 0.8

    html = report.build(summary)
    for shown in (f"{summary['scores']['full']['test']['loss']:.3f}", f"{summary['forgetting']['scores']['base']['loss']:.3f}"):
        assert shown in html
    assert "http" not in html.replace("http://www.w3.org", "")
    assert json.loads((work / "summary.json").read_text()) == summary

    monkeypatch.setattr(train, "prepare", lambda cfg: pytest.fail("a finished study trains again"))
    monkeypatch.setattr(demo.hf, "load", lambda *a, **k: pytest.fail("a finished study loads weights"))
    assert demo.study(s, work) == summary


@pytest.mark.slow
def test_decoder_study_up_to_the_questions(tmp_path):
    """What of the decoder's study needs no bundled questions: runs, spectra, grafts, perplexity."""
    s = tiny(tmp_path, "causal_lm")
    folder = demo.sweep.base(s, tmp_path)
    assert folder == s.model
    runs = demo.sweep.run_all(s, folder, tmp_path)
    model, base = demo.hf.load(folder)
    data = demo.measure.datasets(s, folder, model.config.vocab_size)
    trees = {"base": base, **{n: demo.shared.tuned(tmp_path / "runs" / n) for n in runs}}
    scores = demo.analyse.all_scores(s, model, folder, trees, data)
    assert scores["full"]["test"]["loss"] < scores["base"]["test"]["loss"] - 0.5
    novels = demo.measure.books(model, trees, s, folder)
    assert novels["full"]["loss"] != novels["base"]["loss"]
    graft = demo.analyse.grafts(s, model, base, trees["full"], data)
    assert graft["tuned"]["accuracy"] == scores["full"]["test"]["accuracy"]


def test_unknown_model_names_the_nearest():
    with pytest.raises(UserError, match="minilm"):
        settings.setting("minlm")
