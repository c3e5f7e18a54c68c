"""The intruder study end to end on tiny models; its claims and rules on numbers made up for them."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import study as house
from experiments.intruder_dimensions import analyse, claims, editing, measuring, settings, sweep
from experiments.intruder_dimensions.settings import Grid, Group, Setting, Variant, full, lora
from experiments.intruder_dimensions.study import STUDY
from ft_jax import population, tree
from ft_jax.analysis import spectral
from ft_jax.data.splits import fraction
from ft_jax.errors import UserError
from ft_jax.io import tokenizer
from tests import folders


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A setting of both grids on tiny models, and how it is measured."""
    rng = np.random.default_rng(0)
    encoder = str(folders.make_model_folder(tmp_path / "encoder", "bert", "none"))
    decoder = str(folders.make_model_folder(tmp_path / "decoder", "llama", "lm"))

    def written(name, rows):
        return str(folders.write_rows(tmp_path / f"{name}.jsonl", rows))

    reviews, texts = (written(n, folders.reviews(rng, k)) for n, k in (("reviews", 120), ("texts", 60)))
    spoken, asked = written("spoken", folders.alphabets(rng, 96)), []
    for row in folders.alphabets(rng, 16):
        asked.append({"prompt": row["prompt"], "completions": [f" {row['completion']}", " the film was a"], "gold": 0})
    asked = written("asked", asked)
    data = {"source": reviews, "splits": {"validation": texts, "test": texts}, "max_length": 8, "num_labels": 2, "limit": 96}
    spread = {"full": Group({"full": full()}, (0, 1)), "low": Group({"r1": lora(1), "r2": lora(2), "r2_a8": lora(2, alpha=8.0)}, (0, 1))}
    grid = Grid(model=encoder, objective="classification", data=data, steps=30, batch_size=8, lr_scale=200.0, groups=spread, eval_batch=20)
    small = dataclasses.replace(
        grid, model=decoder, objective="causal_lm", steps=20,
        data={"source": spoken, "splits": {"validation": spoken}, "max_length": 16, "limit": 96, "append_eos": False},
        groups={"full": Group({"full": full()}, (0,)), "low": Group({"r1": lora(1)}, (0, 1))})  # fmt: skip
    passages = {"source": texts, "split": "train"}
    fit = {"texts": 40, "steps": 30, "batch_size": 8, "learning_rate": 1e-2, "max_length": 8}
    edits = measuring.Edits(variants={"r1": 0.9}, factors=(0.0, 0.3, 0.7), controls=(0.3, 0.7), k=5)
    how = measuring.Measuring(
        edits=edits, test=("test", 40), ood={**data, "eval_limit": 20}, passages=passages, k=10, drawn=("full", "r1"),
        contrastive={"texts": 12, "words": 8, "batch": 12, "length": 8}, pseudo={"texts": 12, "length": 8, "batch": 12, "fit": fit})  # fmt: skip
    question = {"source": asked, "split": "train", "limit": 16, "batch": 8, "length": 16}
    spoken_how = measuring.Measuring(
        edits=dataclasses.replace(edits, measures=("winogrande", "novels")), test=("validation", 20), passages=passages, k=10, drawn=("full", "r1"),
        novels={"texts": 12, "length": 8}, questions={"winogrande": question})  # fmt: skip
    monkeypatch.setattr(analyse, "WIDTH", 256)
    monkeypatch.setitem(measuring.SCALES, "tiny", {"encoder": how, "decoder": spoken_how})
    return Setting("tiny", grid, small)


def test_a_sample_of_the_passages_is_measured_whole(tiny, tmp_path):
    """The sample is a prefix by hash, which a split by hash would take out of the train split altogether."""
    how, tok = measuring.how(tiny, "decoder"), tokenizer.load(tiny.decoder.model)
    assert all(fraction(text) < 0.1 for text in measuring.held_out(how)[:3])
    context = house.Context(tiny, tmp_path / "work")
    batches = measuring._passages(context, how, tok, "causal_lm", 512, {"texts": 3, "length": 8, "batch": 2})
    assert [int((b["weight"] > 0).sum()) for b in batches] == [2, 1]


@pytest.mark.slow
def test_study_of_a_decoder(tiny, tmp_path):
    tiny = dataclasses.replace(tiny, encoder=None)
    study, context = dataclasses.replace(STUDY, scales={"tiny": tiny}), house.Context(tiny, tmp_path / "work")
    assert house.run(study, "tiny", tmp_path / "work", only="decoder_(base|train_full|measure_full)") == []
    assert any("not both measured" in row["why"] for row in claims.claims(context)), "a page can be drawn of a part of the grid"
    assert house.run(study, "tiny", tmp_path / "work") == []
    rows, base = analyse.rows(context, "decoder"), context.value("decoder_base")
    assert [r["run"] for r in rows] == ["full-s0", "r1-s0", "r1-s1"]
    assert all(r["loss"] < base["test"]["loss"] - 0.3 for r in rows)
    assert len({r["forgotten"]["novels"] for r in rows}) == 3
    assert "Language model: intruders" in (tmp_path / "work" / "report.html").read_text()


@pytest.mark.slow
def test_study(tiny, tmp_path, monkeypatch):
    tiny = dataclasses.replace(tiny, decoder=None)
    study = dataclasses.replace(STUDY, scales={"tiny": tiny})
    work = tmp_path / "work"
    assert house.run(study, "tiny", work) == []
    context = house.Context(tiny, work)
    summary = json.loads((work / "summary.json").read_text())
    assert summary["made"]["missing"] == []

    base, rows = context.value("encoder_base"), analyse.rows(context, "encoder")
    assert len(rows) == 8 and {r["variant"] for r in rows} == {"full", "r1", "r2", "r2_a8"}
    assert np.mean([r["accuracy"] for r in rows if r["variant"] == "full"]) > base["test"]["accuracy"] + 0.05
    for r in rows:
        got = r["spectra"]
        assert got["effective_rank"] > 4 if r["variant"] == "full" else got["effective_rank"] <= r["rank"] + 1e-3
        assert got["matrices"] == 18 and len(got["counts"]) == 10 and got["counts"][-1][-1] <= 10 * 18
        assert (np.diff(got["counts"], axis=0) >= 0).all() and (np.diff(got["counts"], axis=1) >= 0).all()
    assert len({r["loss"] for r in rows}) == len(rows), "two runs with identical numbers"
    assert base["pseudo"]["loss"] < np.log(len(folders.WORDS)), "the fitted head knows less than nothing"
    head = context.value("encoder_head")
    assert head["fitted"] and all(np.isfinite(loss) for _, loss in head["losses"])

    texts = [json.loads(line)["text"] for line in (work / "passages" / "fit.jsonl").read_text().splitlines()]
    held = [json.loads(line)["text"] for line in (work / "passages" / "mlm.jsonl").read_text().splitlines()]
    assert len(texts) == 40 and held and not set(texts) & set(held)

    cells = claims.edits(context, "encoder", "pseudo")["r1"]
    assert set(cells) >= {("none", "top", 0.7), ("neighbour", "top", 0.7), ("shrink", "top", 0.7), ("none", "all", editing.PEFT)}
    edited = [r for r in context.value("encoder_edit_r1").values() if r["rows"]]
    assert edited, "no intruder to edit"
    change = {(x["control"], x["which"], x["factor"]): x["change"] for x in edited[0]["rows"]}
    assert change["none", "top", 0.3] == pytest.approx(7 / 3 * change["none", "top", 0.7], rel=1e-4)
    assert change["shrink", "top", 0.7] <= change["none", "top", 0.7] * (1 + 1e-4)

    page = (work / "report.html").read_text()
    assert f"{base['test']['loss']:.3f}" in page and "Encoder: the intervention" in page
    assert {c["verdict"] for c in summary["claims"]} <= {claims.HOLDS, claims.FAILS, claims.OPEN}
    sane = next(c for c in summary["claims"] if c["claim"].startswith("Sanity"))
    assert sane["verdict"] == claims.HOLDS

    monkeypatch.setattr(population, "train", lambda *a, **k: pytest.fail("a finished study trains again"))
    before = (work / "summary.json").read_bytes()
    assert house.run(study, "tiny", work) == [] and (work / "summary.json").read_bytes() == before


def test_counts_are_those_of_the_exact_engine():
    rng = np.random.default_rng(0)
    base = {"layers": {"attn": {"q": {"kernel": rng.standard_normal((2, 24, 16)).astype(np.float32)}}}}
    tuned = tree.map_with_path(lambda p, x: x + 2 * rng.standard_normal((2, 24, 1)) @ rng.standard_normal((2, 1, 16)), base)
    tuned = tree.map_with_path(lambda p, x: x.astype(np.float32), tuned)
    found = measuring.spectra(base, tuned, 5)
    w, t = (x["layers"]["attn"]["q"]["kernel"] for x in (base, tuned))
    cosine = spectral.intruder_dimensions(w, t, k=5)["max_cosine"]
    for k in (1, 5):
        for eps in (0.5, 0.9):
            assert found["counts"][k - 1][measuring.EPS.index(eps)] == (cosine[:, :k] < eps).sum()
    assert found["effective_rank"] == pytest.approx(1, abs=1e-3)
    assert found["delta_norm"] == pytest.approx(np.linalg.norm(t - w), rel=1e-5)


def test_learning_rates_keep_the_papers_ratio():
    grid = settings.MINILM
    assert len(grid.runs) == sum(len(g.variants) * len(g.seeds) for g in grid.groups.values()) == 126
    for name, v in grid.variants.items():
        if v.kernel and v.update == "adamw":
            assert v.learning_rate * v.alpha == pytest.approx(2.4e-3 * v.rate), name
    plus = grid.variants["plus8"]
    assert plus.learning_rate * settings.PLUS_RATIO**0.5 == pytest.approx(lora(8).learning_rate)
    half = grid.variants["r8_data0.5"]
    cfg = sweep.config(grid, "m", half, 1)
    assert (cfg["steps"], cfg["data"]["limit"], cfg["seed"]) == (grid.steps // 2, grid.data["limit"] // 2, 1)


def test_every_scale_lists_its_parts():
    for name in settings.SCALES:
        parts = STUDY.parts(STUDY.setting(name))
        assert "sanity" in parts and any("_measure_" in p for p in parts), name
    with pytest.raises(UserError, match="cpu"):
        measuring.how(Setting("cpus", None, None), "encoder")


# Rules of claims on made-up runs


def run(variant, name, *, counts=0.0, accuracy=0.8, rise=0.0, seed=0, erank=1.0, loss=3.0):
    grid = [[float(counts)] * len(measuring.EPS)] * 10
    return {"run": f"{name}-s{seed}", "variant": name, "label": variant.label, "kernel": variant.kernel, "rank": variant.rank, "alpha": variant.alpha,
            "update": variant.update, "rate": variant.rate, "share": variant.share, "seed": seed, "accuracy": accuracy,
            "scores": {"contrastive": {"loss": loss}}, "forgotten": {"pseudo": rise},
            "spectra": {"counts": grid, "effective_rank": erank, "matrices": 36}}  # fmt: skip


def table(*rows):
    t = claims.Table.__new__(claims.Table)
    t.context = house.Context(settings.SCALES["cpu"], None)
    t.which, t.found, t.by = "encoder", list(rows), analyse.by_variant(rows)
    return t


def ladder(**counts):
    return [run(full(), "full"), *(run(lora(int(n[1:])), n, counts=c) for n, c in counts.items())]


@pytest.mark.parametrize(("counts", "verdict"), [
    ({"r1": 20, "r16": 3, "r64": 0}, claims.HOLDS), ({"r1": 20, "r16": 0, "r64": 0}, claims.FAILS), ({"r1": 20, "r16": 9, "r64": 4}, claims.FAILS),
])  # fmt: skip
def test_up_to_rank_16(counts, verdict):
    assert claims._up_to(table(*ladder(**counts)))["verdict"] == verdict


def test_full_has_none():
    assert claims._full_has_none(table(run(full(), "full", counts=3)), 360)["verdict"] == claims.HOLDS
    assert claims._full_has_none(table(run(full(), "full", counts=4)), 360)["verdict"] == claims.FAILS


@pytest.mark.parametrize(("b", "verdict"), [(2, claims.HOLDS), (12, claims.FAILS)])
def test_b_alone(b, verdict):
    rows = [*ladder(r1=20, r8=4), *(run(Variant("lora_b", r, 2.0 * r), f"b{r}", counts=b) for r in (1, 8))]
    got = claims._variant(table(*rows), "b", "c", "p", lambda ours, theirs: ours <= theirs / 2, "")
    assert got["verdict"] == verdict
    rows[-2]["scores"]["contrastive"]["loss"] = float(np.log(measuring.ENCODER.contrastive["batch"]))
    alone = claims._variant(table(*rows), "b", "c", "p", lambda ours, theirs: ours > 100 or theirs < 5, "")
    assert alone["verdict"] == claims.HOLDS and "B alone r = 1 collapsed" in alone["why"]  # r = 8 alone is judged
    assert claims._variant(table(*ladder(r1=1)), "b", "c", "p", None, "")["verdict"] == claims.OPEN


@pytest.mark.parametrize(("r8", "verdict"), [((0, 2, 5, 20), claims.HOLDS), ((9, 7, 6, 6), claims.FAILS), ((0, 0, 0, 0), claims.OPEN)])
def test_growth_with_data(r8, verdict):
    names = ("_data0.25", "_data0.5", "", "_data2")
    rows = [run(lora(r), f"r{r}{n}", counts=c) for r, series in ((1, (10, 18, 20, 21)), (8, r8)) for n, c in zip(names, series)]
    assert claims._data(table(*rows))["verdict"] == verdict


def test_seeds_matter_little():
    still = [run(lora(r), f"r{r}", counts=c + s, seed=s) for r, c in ((1, 50), (2, 30), (8, 5)) for s in (0, 1, 2)]
    assert claims._seeds(table(*still))["verdict"] == claims.HOLDS
    noisy = [run(lora(r), f"r{r}", counts=20 * s, seed=s) for r in (1, 2, 8) for s in (0, 1, 2)]
    assert claims._seeds(table(*noisy))["verdict"] == claims.FAILS


def test_effective_rank_order():
    rows = [run(full(), "full", erank=200), run(lora(384), "r384", erank=60), run(lora(384, alpha=8.0), "r384_a8", erank=20)]
    assert claims._effective_rank(table(*rows))["verdict"] == claims.HOLDS
    rows[2]["spectra"]["effective_rank"] = 70
    assert claims._effective_rank(table(*rows))["verdict"] == claims.FAILS


def test_less_forgetting_at_equal_accuracy():
    rows = [run(full(), "full", rise=0.5), run(lora(1), "r1", rise=2.0, accuracy=0.7), run(lora(8), "r8", rise=0.2)]
    assert claims._less_and_more(table(*rows), "pseudo")[0]["verdict"] == claims.HOLDS  # r = 1 is not at equal accuracy
    rows[1]["accuracy"] = 0.8
    assert claims._less_and_more(table(*rows), "pseudo")[0]["verdict"] == claims.FAILS
