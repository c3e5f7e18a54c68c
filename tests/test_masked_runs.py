"""Runs under gates, scores for masks, and layers drawn anew: what the engine, the recipe and the command line make of them."""

import json
import sys

import jax
import numpy as np
import pytest

from ft_jax import importance, registry, train, tree
from ft_jax.data import pipeline
from ft_jax.errors import UserError
from ft_jax.io import runs, safetensors
from tests import folders


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    with folders.small_home(tmp_path_factory, 60) as home:
        yield home


def config(home, mask, **groups):
    cfg = {
        "steps": 9, "batch_size": 8, "model": {"path": str(home / "bert"), "head": "classification"},
        "method": {"mask": mask}, "data": {"source": str(home / "reviews.jsonl"), "num_labels": 2, "max_length": 16},
        "optimizer": {"learning_rate": 3e-3, "hp": {"weight_decay": 0.1}}, "eval": {"every": 0, "metric": "accuracy"},
        "save": {"every": 4}, "log": {"every": 1, "tensorboard": False}, "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
    }  # fmt: skip
    return {**cfg, **groups}


def last(workdir):
    model, params, _ = runs.load_run(workdir, "last")
    return tree.flatten(params)


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["lisa(n=1,period=3)", "hft(period=3)+random(share=0.5)"])
def test_a_run_stopped_inside_a_period_resumes_bit_for_bit(mask, home, monkeypatch):
    name = mask.split("(")[0]
    train.train(config(home, mask), home / name)

    def crash(run, step, metrics, log=runs.Run.log):
        log(run, step, metrics)
        if step == 7:
            raise RuntimeError("stopped here")

    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "log", crash)
        with pytest.raises(RuntimeError, match="stopped here"):
            train.train(config(home, mask), home / f"{name}2")
    traces, made = [], train.make_step
    monkeypatch.setattr(train, "make_step", lambda *a: lambda *xs: traces.append(1) or made(*a)(*xs))
    train.train(config(home, mask), home / f"{name}2")
    assert len(traces) == 1, "one program for all rounds"
    first, second = last(home / name), last(home / f"{name}2")
    for path, x in first.items():
        np.testing.assert_array_equal(x, second[path], err_msg=path)
    rows = [(home / n / "metrics.jsonl").read_text() for n in (name, f"{name}2")]
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_layers_that_no_round_drew_are_those_of_the_base(home):
    """Four steps of one round: the layers drawn for it move, the others are bit for bit the start."""
    summary = train.train(config(home, "lisa(n=1,period=20)", steps=4), home / "one_round")
    _, start, _, _ = train.recipe.build(json.loads(json.dumps(train.recipe.of_config(train.complete(config(home, "rules"))))))
    on = np.asarray(registry.call("mask", "lisa", start, 0, n=1, period=20)["layers"]["attn"]["q"]["kernel"])
    after, before = last(home / "one_round"), tree.flatten(start)
    for path, x in before.items():
        same = np.asarray(x == after[path])
        if path.startswith("layers/"):
            assert same[~on].all() and not same[on].all(), path
    assert on.sum() == 1 and summary["steps"] == 4


@pytest.mark.slow
def test_top_layers_are_drawn_anew_and_rebuilt_alike(home):
    """N(0, 0.02) matrices, norms of scale 1 and bias 0 in the top layers; the others as the base has them."""
    spec = train.recipe.of_config(train.complete(config(home, "rules")))
    made = {n: train.recipe.build({**spec, "method": {**spec["method"], "reinit_layers": n}})[1]["layers"] for n in (0, 2)}
    again = train.recipe.build({**spec, "method": {**spec["method"], "reinit_layers": 2}})[1]["layers"]
    for (path, old), new, same in zip(tree.flatten(made[0]).items(), *map(jax.tree.leaves, (made[2], again)), strict=True):
        np.testing.assert_array_equal(old[:1], new[:1])
        np.testing.assert_array_equal(new, same)
        if path.endswith(("/scale", "/bias")):
            assert (np.asarray(new[1:]) == path.endswith("/scale")).all()
        else:
            assert 0.015 < float(new[1:].std()) < 0.025 and not (old[1:] == new[1:]).any()
    with pytest.raises(UserError, match="reinit_layers is 4, and the model has 3 layers"):
        train.recipe.build({**spec, "method": {**spec["method"], "reinit_layers": 4}})


@pytest.mark.parametrize("method", [
    {"kernels": (("layers/attn/q/kernel", "lora(rank=2)"),), "mask": "bitfit"},
    {"taps": (("heads", "affine"),), "trainable": (("head/.*", True),)},
])  # fmt: skip
def test_a_mask_that_freezes_all_that_a_kernel_adds_is_refused(method, home):
    cfg = train.complete(config(home, "rules", method=method))
    with pytest.raises(UserError, match="nothing of the method's kernels and taps trains.*two methods want the same leaves"):
        train.recipe.build(train.recipe.of_config(cfg))


@pytest.mark.slow
def test_lt_sft_is_two_runs_and_differences_add_up(home, tmp_path):
    """Phase one as it is, its largest changes as a mask, phase two from the base again: elsewhere the base bit for bit."""
    first = config(home, "rules", method={"trainable": (("(layers|head|pooler)/.*", True),)})
    train.train(first, tmp_path / "full")
    out = tmp_path / "scores"
    importance.main(["--kind=change", f"--run={tmp_path / 'full'}", f"--out={out}"])
    mask = f"lt_sft(share=0.1,scores={out})"
    train.train(config(home, mask, method={**first["method"], "mask": mask}), tmp_path / "sparse")
    _, start, _, _ = train.recipe.build(train.recipe.of_config(train.complete(first)))
    base, full, sparse = tree.flatten(start), last(tmp_path / "full"), last(tmp_path / "sparse")
    moved = {p: np.asarray(base[p] != sparse[p]) for p in base if not p.startswith(("head/", "pooler/"))}
    change = {p: np.abs(np.asarray(full[p] - base[p])) for p in base if p.startswith("layers/")}
    count = round(0.1 * sum(x.size for x in change.values()))
    assert 0.95 * count < sum(m.sum() for m in moved.values()) <= count
    least = np.sort(np.concatenate([x.ravel() for x in change.values()]))[-count]
    assert all((change[p][m] >= least).all() for p, m in moved.items() if m.any())
    both = importance.compose(base, [full, sparse])
    for path, x in both.items():
        np.testing.assert_allclose(x, np.asarray(full[path]) + np.asarray(sparse[path]) - np.asarray(base[path]), atol=1e-6)


@pytest.mark.slow
def test_a_soft_mask_from_the_command_line_to_a_run(home, tmp_path, capsys, monkeypatch):
    """Scores of a config's examples, an update by them: a unit that two passes disagree by moves less than another."""
    text = f"configs/train.py:model={home / 'bert'},data={home / 'reviews.jsonl'}"
    monkeypatch.setattr(sys, "argv", ["importance", "--kind=disagreement", f"--config={text}", "--config.data.max_length=16",
                                      "--config.batch_size=8", "--examples=16", f"--out={tmp_path / 'scores'}"])  # fmt: skip
    importance.main()
    assert "disagreement of 240 units" in capsys.readouterr().out, "3 layers of 48 hidden units and 32 outputs"
    hp = {"scores": str(tmp_path / "scores"), "eps": 1e3}  # so large that Adam moves a weight by its gradient
    rules = {"trainable": (("layers/.*", True), ("(head|pooler)/.*", True))}
    cfg = config(home, "rules", steps=1, method=rules, optimizer={"name": "cofitune_soft", "hp": hp, "learning_rate": 1e3, "clip": 0.0, "warmup": 0.0})
    train.train(cfg, tmp_path / "soft")
    train.train({**cfg, "optimizer": {**cfg["optimizer"], "name": "adamw", "hp": {"eps": 1e3}}}, tmp_path / "plain")
    _, start, _, _ = train.recipe.build(train.recipe.of_config(train.complete(cfg)))
    start, soft, plain = tree.flatten(start), last(tmp_path / "soft"), last(tmp_path / "plain")
    slope = dict(safetensors.Checkpoint(tmp_path / "scores").items())
    for path in ("layers/mlp/up/kernel", "layers/mlp/down/kernel", "layers/mlp/up/bias"):
        far = slope[path.replace("bias", "kernel")]
        free = 1 - np.abs(np.tanh((far - far.mean(-1, keepdims=True)) / far.std(-1, ddof=1, keepdims=True)))
        whole = np.asarray(plain[path] - start[path])
        assert np.abs(whole).max() > 1e-4
        np.testing.assert_allclose(soft[path] - start[path], whole * (free if whole.ndim == 2 else free[:, None]), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_scores_are_means_over_examples_in_numpy(home):
    """One gradient an example; the Fisher scores its squares' mean, the gradient scores its mean."""
    cfg = train.ready(config(home, "rules", model={"path": str(home / "bert"), "head": "classification", "dropout": True}))
    parts = train.prepare(cfg)
    trainable, frozen = tree.split(parts["params"], parts["mask"])
    batch = next(iter(pipeline.batches(parts["data"]["train"], 8, cfg["seed"])))
    one = jax.jit(lambda row: jax.grad(lambda t: parts["objective"](tree.join(t, frozen), row, None)[0])(trainable))
    single = [tree.flatten(one({k: v[i : i + 1] for k, v in batch.items()})) for i in range(8)]
    found = {kind: importance.of_config(cfg, kind, 8) for kind in ("gradient", "fisher")}
    for path in single[0]:
        values = np.stack([np.asarray(g[path], np.float64) for g in single])
        np.testing.assert_allclose(found["gradient"][path], values.mean(0), rtol=0, atol=1e-6, err_msg=path)
        np.testing.assert_allclose(found["fisher"][path], (values**2).mean(0), rtol=1e-3, atol=1e-9, err_msg=path)


@pytest.mark.parametrize(
    "args, words",
    [
        (["--kind=fihser", "--out=x"], ["give --kind (gradient, fisher, change, disagreement)"]),
        (["--kind=change", "--out=x"], ["needs --run"]),
        (["--kind=fisher", "--out=x"], ["needs --config"]),
        (["--kind=change", "--run=nowhere", "--out=x"], ["nowhere holds no run"]),
        (["--examples=many"], ["examples"]),
    ],
)
def test_importance_says_what_is_missing(args, words, capsys):
    with pytest.raises(SystemExit) as stop:
        importance.main(args)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and all(w in lines[0] for w in words), lines
