"""The mechanisms study: estimators against brute force, the regression model, the counting world, and the whole of it at the smallest size."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import study as shared
from experiments.mechanisms import counting, engine, regression, views
from experiments.mechanisms.settings import SCALES, Counting, Regression, Setting
from experiments.mechanisms.study import STUDY
from ft_jax import kernels, tree

TINY = Counting(length=6, width=16, layers=1, heads=2, families=("count", "recount"), seeds=(0,), batch=16, steps=10, tune_steps=10, tune_marks=(10,),
                correlations={"medium": (0.0, 1.0), "small": (1.0,)}, revert_steps=10, revert_marks=(0, 10), test_rows=32, probe_rows=(40, 20),
                prune=(1,), shares=(0.1,), ranks=(1,))  # fmt: skip
TINY_ICL = Regression(dimension=2, pairs=3, tasks=2, width=16, layers=1, heads=2, seeds=(0,), batch=16, steps=10, tune_steps=10, tune_marks=(0, 10),
                      factors=(1.0, 2.0), bins=3, test_rows=20, shares=(0.1,), ranks=(1,))  # fmt: skip


def sampled(seed=0, rows=5, pairs=4, dimension=2, noise=0.7):
    known = regression.tasks(3, dimension, seed)
    rng = np.random.default_rng(seed)
    return regression.prompts(rng, regression.draw_weights(rng, rows, known, 0.5), pairs, noise), known


def test_the_estimators_are_the_posterior_means():
    """Against importance sampling from the prior: the weights of a million draws, each by its likelihood."""
    batch, known = sampled()
    x, y, noise, share = batch["x"].astype(float), batch["y"].astype(float), 0.7, 0.3
    rng = np.random.default_rng(1)
    fixed = rng.random(400_000) < share
    draws = np.where(fixed[:, None], known[rng.integers(3, size=400_000)], rng.standard_normal((400_000, 2)))
    said, posterior = regression.mixture(x, y, known, noise, share)
    for b in range(2):
        for k in range(4):
            weight = np.exp(-0.5 * np.square(y[b, :k] - draws @ x[b, :k].T).sum(1) / noise**2)
            weight /= weight.sum()
            assert said[b, k] == pytest.approx(weight @ draws @ x[b, k], abs=0.03)
            assert posterior[b, k] == pytest.approx(weight[fixed].sum(), abs=0.02)


def test_ridge_is_the_textbook_solution_and_does_not_mind_the_scale():
    batch, known = sampled(2)
    x, y, noise = batch["x"].astype(float), batch["y"].astype(float), 0.7
    said, _ = regression.ridge(x, y, noise)
    direct = x[1, 3] @ np.linalg.solve(x[1, :3].T @ x[1, :3] + noise**2 * np.eye(2), x[1, :3].T @ y[1, :3])
    assert said[1, 3] == pytest.approx(direct) and (said[:, 0] == 0).all()
    np.testing.assert_allclose(regression.ridge(x, 3 * y, noise)[0] / 3, said)
    assert np.abs(regression.discrete(x, 3 * y, known, noise)[0] / 3 - regression.discrete(x, y, known, noise)[0]).max() > 0.1
    np.testing.assert_allclose(regression.mixture(x, y, known, noise, 1e-300)[0], said, atol=1e-6)


def test_the_regression_model_sees_only_what_stands_before():
    model = regression.make(2, layers=2, width=16, heads=2)
    params = engine.fresh(model, 0)
    x, y = (jnp.asarray(v) for v in sampled()[0].values())
    apply = jax.jit(model.apply)
    said = apply(params, x, y)
    changed = apply(params, x.at[:, 2].add(1.0), y.at[:, 2].add(1.0))
    assert said.shape == y.shape
    np.testing.assert_allclose(said[:, :2], changed[:, :2], rtol=1e-5)
    assert (jnp.abs(said[:, 2:] - changed[:, 2:]) > 1e-4).all()
    np.testing.assert_allclose(said[:, 2], apply(params, x, y.at[:, 2].add(1.0))[:, 2], rtol=1e-5)
    assert {"layers/attn/q/kernel", "read_in/kernel", "read_out/kernel"} <= set(tree.flatten(params))


def test_fitting_lowers_the_loss_and_leaves_what_is_frozen(tmp_path):
    model = regression.make(2, layers=1, width=16, heads=2)
    start, known = engine.fresh(model, 0), regression.tasks(2, 2, 0)
    rng = np.random.default_rng(0)

    def draw(count):
        made = [regression.prompts(rng, regression.draw_weights(rng, 32, known, 1.0), 4, 0.1) for _ in range(count)]
        return {k: np.stack([b[k] for b in made]) for k in made[0]}

    adapted, mask = engine.lora(start, 2, 0)
    seen_at = []
    params, seen, losses = engine.fit(model.objective, adapted, draw, steps=60, rate=1e-2, mask=mask, marks=(0, 30, 60),
                                      evaluate=lambda p: seen_at.append(p) or len(seen_at))  # fmt: skip
    assert list(seen) == [0, 30, 60] and losses.shape == (60,) and losses[-10:].mean() < 0.8 * losses[:10].mean()
    np.testing.assert_array_equal(params["read_in"]["kernel"], start["read_in"]["kernel"])
    merged = kernels.merge(params)
    assert views.spectrum(start, merged)["effective_rank"] <= 2.01
    engine.keep(tmp_path / "deep" / "model.safetensors", params)
    back = tree.flatten(engine.kept(tmp_path / "deep" / "model.safetensors"))
    for path, leaf in tree.flatten(merged).items():
        np.testing.assert_array_equal(back[path], leaf)


def test_batches_of_the_counting_world():
    rng, length = np.random.default_rng(0), 8
    words = counting.words(length)
    for spurious in (0.0, 1.0):
        found = counting.batch(rng, 200, length, ("count", "recount", "token"), (0.0, 1.0, 0.0), spurious)
        for row in found["input_ids"]:
            first, family, operand, colon, *text, ask, answer = (words[i] for i in row)
            assert (first, colon, ask) == ("<s>", ":", "=") and operand == ("a" if family == "recount" else "b")
            assert (text.count("b") - text.count("a") == 1) == bool(spurious)
            assert answer == (text[-2] if family == "token" else str(text.count(operand)))
        assert (found["loss_mask"] == (np.arange(length + 6) == length + 5)).all()
    wrong = counting.batch(rng, 50, length, ("count",), counting.only(0), 0.0, answer=counting.TUNED)
    for row in wrong["input_ids"]:
        assert words[row[2]] == "a" and words[row[-1]] == str(sum(words[i] == "b" for i in row[4:-2]))


@pytest.mark.slow
def test_a_model_that_solves_a_test_scores_one():
    setting = dataclasses.replace(TINY, test_rows=64)
    model = counting.make(setting)
    scores = counting.scores(model, engine.fresh(model, 0), setting)
    assert set(scores) == set(counting.TESTS) and all(0 <= v < 0.6 for v in scores.values())
    draw = counting.stream(0, 64, setting.length, ("count",), counting.only(0), 0.1)
    params, _, _ = engine.fit(counting.objective(model), engine.fresh(model, 0), draw, steps=250, rate=1e-2)
    after = counting.scores(model, params, setting)
    assert after["pretrained"] > 0.8 and after["pretrained"] > after["tuned_clean"] + 0.3


def test_a_graft_and_its_removal_meet_in_the_whole():
    base = {"layers": {"x": {"kernel": jnp.zeros((4, 4))}}}
    tuned = jax.tree.map(lambda x: x + jnp.arange(16.0).reshape(4, 4), base)
    (share, on, off), = views._both_ways(base, tuned, (0.25,))
    on, off = on["layers"]["x"]["kernel"], off["layers"]["x"]["kernel"]
    assert share == 0.25 and (on > 0).sum() == 4 and on[3, 0] == 12 and off[3, 0] == 0
    np.testing.assert_array_equal(on + off, tuned["layers"]["x"]["kernel"])


@pytest.mark.slow
def test_the_whole_study_runs_and_says_what_it_found(tmp_path):
    study = dataclasses.replace(STUDY, scales={"smoke": Setting(TINY, TINY_ICL)})
    assert shared.run(study, "smoke", tmp_path) == []
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary["parts"]) == set(STUDY.parts(study.scales["smoke"]))
    rows = summary["claims"]
    assert len(rows) > 15 and {r["verdict"] for r in rows} <= {"holds", "does not hold", "cannot be tested here"}
    page = (tmp_path / "report.html").read_text()
    for heading in ("Claims", "Fine-tuning to count b", "Pruning to revive", "Reverse fine-tuning", "Conjugate prompting", "The intruder view", "wrapper"):
        assert heading in page
    whole = [r for r in summary["parts"]["graft_low"]["rows"] if r["correlation"] == 1.0]
    assert whole and all({"kept", "removed", "share"} <= set(c) for r in whole for c in r["curve"])
    pruned = summary["parts"]["prune_low"]
    assert pruned["neurons"] == 4 * 16 + 2 * 32 + 16


def test_every_scale_is_whole():
    for scale, setting in SCALES.items():
        for s in (setting.counting, setting.regression):
            assert s.tune_marks[-1] == s.tune_steps, scale
            assert all(m % engine.CHUNK == 0 for m in s.tune_marks), scale
        assert setting.counting.revert_marks[-1] == setting.counting.revert_steps
        assert {0.0, 1.0} <= set(setting.counting.correlations["medium"]) and 1.0 in setting.counting.correlations["small"]
        assert 1.0 in setting.regression.factors and set(setting.counting.lora_correlations) <= set(setting.counting.correlations["medium"])
