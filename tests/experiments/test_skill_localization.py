"""The skill localisation study end to end on tiny models: every part, every claim row, the page; what the parts promise of each other."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import study as shared
from experiments.skill_localization import claims, intruders, settings, world
from experiments.skill_localization.study import STUDY, parts
from ft_jax.errors import UserError
from ft_jax.weights import graft
from tests import folders


def letters(rng, count):
    """Another task: does the text hold a letter?"""
    rows = []
    for _ in range(count):
        label = int(rng.integers(2))
        words = [str(w) for w in rng.choice(folders.NEUTRAL, 5)]
        if label:
            words[rng.integers(5)] = str(rng.choice(folders.LETTERS))
        rows.append({"text": " ".join(words), "label": label})
    return rows


def tiny(tmp_path):
    rng = np.random.default_rng(0)
    tasks = {}
    for name, make in (("first", folders.reviews), ("second", letters)):
        held = str(folders.write_rows(tmp_path / f"{name}-held.jsonl", make(rng, 60)))
        tasks[name] = {"source": str(folders.write_rows(tmp_path / f"{name}.jsonl", make(rng, 200))), "num_labels": 2, "max_length": 8,
                       "splits": {"validation": held, "test": held}, "shots": 24}  # fmt: skip
    graft_ = settings._graft(magnitude=(1e-2, 1e-1), random=(1e-1,), learned={"sgd": (1e-4,)}, region=5e-2, steps=2, examples=16, micro=8)
    common = {"batch_size": 8, "eval_batch": 20, "test_limit": 40, "validation_limit": 20, "head_examples": 60, "graft": graft_}
    rates = {"adamw": 3e-3, "adamw_l1": 3e-3, "lora_r1": 3e-1, "sgd": 0.3}
    encoder = settings.Bench(
        name="encoder", model=str(folders.make_model_folder(tmp_path / "bert")), line="tiny", head="prototype", tasks=tasks,
        runs={"first": {"sgd": (100, 13), "adamw": (100,), "adamw_l1": (100,), "lora_r1": (100,)}, "second": {"sgd": (100,), "adamw": (100,)}},
        steps=40, rates=rates, sgd_rates=(0.01, 0.03), tune_steps=4, **common)  # fmt: skip
    prompted = {"first": {**tasks["first"], "template": "{text} was", "label_words": ("bad", "good")}}
    decoder = settings.Bench(
        name="decoder", model=str(folders.make_model_folder(tmp_path / "llama", "llama", "lm")), line="tiny", head="label_words", tasks=prompted,
        runs={"first": {"adamw": (100,)}}, steps=6, rates=rates, **common)  # fmt: skip
    return settings.Setting(
        benches=(encoder, decoder), ood={"methods": ("sgd",), "targets": ("second",)},
        lottery={"method": "sgd", "seeds": 1, "steps": 2, "shares": (0.5,)},
        multi=settings._multi(("first", "second"), (100, 13), (100,), method="adamw", steps=40, region=5e-2, purify_steps=2, subset_sizes=(2,)),
        continual={"pairs": (("first", "second"),), "method": "sgd", "seeds": (100,), "steps": 6, "rate_scale": 1.0},
        intruders={"methods": ("sgd", "lora_r1")})  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The finished study: its folder, setting and summary."""
    folder = tmp_path_factory.mktemp("skill")
    setting = tiny(folder)
    study = dataclasses.replace(STUDY, scales={"tiny": setting})
    assert shared.run(study, "tiny", folder / "work") == []
    return shared.Context(setting, folder / "work"), json.loads((folder / "work" / "summary.json").read_text()), study


@pytest.mark.slow
def test_every_part_is_done_and_on_the_page(done):
    context, summary, _ = done
    assert set(summary["parts"]) == set(parts(context.setting))
    html = (context.workdir / "report.html").read_text()
    for heading in ("Claims", "How small can a graft be?", "Calibration", "Other domains", "Lottery tickets", "Where the region sits",
                    "Several tasks in one model", "A second task after a first", "Is the region the intruder subspace?"):  # fmt: skip
        assert heading in html
    assert "nan" not in html.replace("financ", "")


@pytest.mark.slow
def test_every_claim_has_a_row_and_a_verdict(done):
    _, summary, _ = done
    rows = summary["claims"]
    said = " ".join(r["claim"] for r in rows)
    for words in ("0.01 %", "better calibrated", "other domains", "almost disjoint", "Overlap tracks", "union of regions", "nearly stops forgetting",
                  "Lottery-ticket", "biases alone", "L1 pull", "intruder dimensions"):  # fmt: skip
        assert words in said
    assert {r["verdict"] for r in rows} <= {claims.HOLDS, claims.FAILS, claims.OPEN}
    assert all(set(r) == {"claim", "paper", "ours", "verdict", "why"} for r in rows)


@pytest.mark.slow
def test_a_claim_without_a_measurement_says_so(done, tmp_path):
    context, _, _ = done
    rows = claims.rows(shared.Context(context.setting, tmp_path))
    assert {r["verdict"] for r in rows} == {claims.OPEN} and len(rows) == len(claims.MADE)


@pytest.mark.slow
def test_a_second_call_computes_nothing(done, monkeypatch):
    context, summary, study = done
    monkeypatch.setattr(world.hf, "load", lambda *a, **k: pytest.fail("a finished study loads weights"))
    assert shared.run(study, "tiny", context.workdir) == []
    assert json.loads((context.workdir / "summary.json").read_text())["parts"] == summary["parts"]


@pytest.mark.slow
def test_grafts_are_of_the_sizes_they_say_and_between_base_and_tuned(done):
    context, summary, _ = done
    value = summary["parts"]["graft_first_sgd"]
    for seed, s in value["seeds"].items():
        mask = world.region(context, context.setting.benches[0], "first", "sgd", int(seed))
        size = graft.mask_size(mask)[0]
        learnt = claims.learnt(s, 5e-2)
        assert learnt["parameters"] == size == sum(sum(x) for x in s["where"]["kinds"].values())
        assert claims.pick(s, "magnitude, as large")["parameters"] == claims.pick(s, "random, as large")["parameters"] == size
        assert sum(b[0] for b in s["tuned"]["bins"]) == 40
    learnt = summary["parts"]["graft_first_adamw"]
    assert learnt["seeds"]["100"]["tuned"]["accuracy"] > learnt["base"]["accuracy"] + 0.1
    view = world.view(context, context.setting.benches[0], "first")
    full, mask = world.tuned(context, context.setting.benches[0], "first", "sgd", 100), world.region(context, context.setting.benches[0], "first", "sgd", 100)
    again = view.accuracy(graft.apply_graft(view.base, full, mask))
    assert again == pytest.approx(claims.learnt(value["seeds"]["100"], 5e-2)["accuracy"])


@pytest.mark.slow
def test_training_outside_a_region_leaves_it_alone(done):
    _, summary, _ = done
    runs = summary["parts"]["continual_first_second"]["seeds"]["100"]["runs"]
    assert runs["outside the region"]["moved_in_region"] == 0.0 < runs["everywhere"]["moved_in_region"]
    assert runs["outside the region"]["read"] == pytest.approx(runs["from the graft, outside"]["before"])  # the region is as it was
    assert 0 < runs["outside a random region"]["moved_in_region"] < 1


@pytest.mark.slow
def test_the_multi_task_model_learns_and_its_regions_are_kept(done):
    _, summary, _ = done
    train = summary["parts"]["multi_train"]
    losses = train["seeds"]["100"]["loss"]
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
    overlap = np.asarray(summary["parts"]["multi_overlap"]["mean"])
    assert np.diag(overlap) == pytest.approx(1.0) and (overlap <= 1).all()
    both = summary["parts"]["multi_union"]["100"][0]
    sizes = [summary["parts"][f"multi_region_{t}"]["100"]["share"] for t in ("first", "second")]
    assert max(sizes) <= both["share"] <= sum(sizes) + 1e-9


@pytest.mark.slow
def test_shares_of_energy_are_shares(done):
    _, summary, _ = done
    for method in ("sgd", "lora_r1"):
        for s in summary["parts"][f"intruders_first_{method}"]["seeds"].values():
            assert s["matrices"] == 18
            for row in s["sets"].values():
                for two, one in zip(row["inside_2"].values(), row["inside_1"].values()):
                    assert 0 <= two <= one + 1e-9 <= 1 + 1e-8  # the two-sided span lies in the one-sided one
                assert row["inside_2"]["whole"] == pytest.approx(row["holds_2"]["share_of_change"], abs=1e-6)


def test_a_rank_one_change_lies_in_its_own_direction():
    """A large rank-one change of a base of clear directions is one intruder that holds all of it; the rest holds nothing."""
    rng = np.random.default_rng(0)
    first, second = (np.linalg.qr(rng.standard_normal((64, 64)))[0] for _ in range(2))
    base = ((first * 10 * 0.8 ** np.arange(64)) @ second).astype(np.float32)
    v, u = (x / np.linalg.norm(x) for x in rng.standard_normal((2, 64)))
    change = (50 * np.outer(v, u)).astype(np.float32)
    trees = [{"layers": {"mlp": {"up": {"kernel": w[None]}}}} for w in (base, base + change)]
    found = intruders.directions(*trees)
    d = found["layers/mlp/up/kernel", 0]
    assert d["sets"]["intruders"].tolist() == [0] == d["sets"]["newest"].tolist()
    delta = {"layers/mlp/up/kernel": change[None]}
    for sides in (1, 2):
        assert intruders.shares({"whole": delta}, found, "intruders", sides)["whole"] > 0.99
        assert intruders.shares({"whole": delta}, found, "control", sides)["whole"] < 0.1
        part = intruders.component(delta, found, "intruders", sides)
        np.testing.assert_allclose(part["layers/mlp/up/kernel"], delta["layers/mlp/up/kernel"], atol=2.0)


@pytest.mark.slow
def test_scales_are_whole(done):
    for scale, setting in STUDY.scales.items():
        names = parts(setting)
        bench = setting.benches[0]
        assert set(setting.multi["tasks"]) <= set(bench.tasks) and len(names) == len(set(names)), scale
        for pair in setting.continual["pairs"]:
            assert set(pair) <= set(bench.tasks)
        for method in (*setting.ood["methods"], *setting.intruders["methods"], setting.lottery["method"], setting.multi["method"]):
            assert method in bench.runs[bench.main], (scale, method)
        for seed in (*setting.multi["seeds"], *setting.multi["transfer_seeds"]):
            assert all(seed in bench.runs[t][setting.multi["method"]] for t in setting.multi["tasks"])
        assert all(seed in bench.runs[a]["sgd"] for a, _ in setting.continual["pairs"] for seed in setting.continual["seeds"])


@pytest.mark.slow
def test_a_domain_with_other_classes_is_refused(done):
    context, _, _ = done
    from experiments.skill_localization import grafts

    bench = context.setting.benches[0]
    odd = dataclasses.replace(bench, tasks={**bench.tasks, "odd": {**bench.tasks["second"], "num_labels": 3}})
    with pytest.raises(UserError, match="odd has 3 classes, first has 2"):
        grafts.other_domains(context, odd, "first", "sgd", ("odd",))
