"""The engine on tiny models: it learns, resumes bit for bit after any stop, and keeps what it says it keeps."""

import json
import os
import pathlib
import signal
import struct
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from ft_jax import train, tree
from ft_jax.data import pipeline
from ft_jax.io import hf, runs, tokenizer
from tests import folders

LINEAR = r"layers/(attn|mlp)/\w+/kernel"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FT_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Models bert, masked (BERT with MLM head) and llama; data reviews.jsonl, few.jsonl and letters.jsonl."""
    home = tmp_path_factory.mktemp("home")
    folders.make_model_folder(home / "bert")
    folders.make_model_folder(home / "masked", head="mlm")
    folders.make_model_folder(home / "llama", "llama", "lm")
    rng = np.random.default_rng(0)
    folders.write_rows(home / "reviews.jsonl", folders.reviews(rng, 200))
    folders.write_rows(home / "few.jsonl", folders.reviews(rng, 25))
    folders.write_rows(home / "letters.jsonl", folders.alphabets(rng, 150))
    folders.write_rows(home / "recited.jsonl", folders.recited(rng, 150))
    return home


def config(home, **groups):
    """A classification run; every keyword is a group or key of the config, groups are merged."""
    cfg = {
        "steps": 60, "batch_size": 16, "model": {"path": str(home / "bert"), "head": "classification"},
        "data": {"source": str(home / "reviews.jsonl"), "num_labels": 2, "max_length": 16},
        "optimizer": {"learning_rate": 3e-3}, "eval": {"every": 20, "metric": "accuracy"}, "save": {"every": 20},
        "log": {"tensorboard": False}, "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
    }  # fmt: skip
    for key, value in groups.items():
        cfg[key] = {**cfg.get(key, {}), **value} if isinstance(value, dict) else value
    return cfg


def letters(home, data, **groups):
    return config(home, objective="causal_lm", data={"source": str(home / "letters.jsonl"), "max_length": 32, **data},
                  model={"path": str(home / "llama"), "head": "lm"}, **{"eval": {"metric": "loss"}, **groups})  # fmt: skip


def lora(rank):
    return {"name": "lora", "kernels": ((LINEAR, f"lora(rank={rank}, alpha={2 * rank})"),)}


def rows_of(workdir, prefix=""):
    rows = [json.loads(line) for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if any(key.startswith(prefix) for key in row)]


def assert_learns(workdir, share):
    """The last validation loss is under a share of the loss of the first batches."""
    first, last = rows_of(workdir, "train/")[0]["train/loss"], rows_of(workdir, "validation/")[-1]["validation/loss"]
    assert last < share * first, (first, last)


def held(workdir, name="checkpoints"):
    """({path: array} of every item, meta) of the newest checkpoint, read without a template."""
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(pathlib.Path(workdir) / name) as manager:
        step = manager.latest_step()
        items = {p.name: ocp.args.StandardRestore() for p in (pathlib.Path(workdir) / name / str(step)).iterdir()
                 if p.is_dir() and p.name != "meta"}  # fmt: skip
        found = manager.restore(step, args=ocp.args.Composite(**items, meta=ocp.args.JsonRestore()))
    return {f"{item}:{path}": np.asarray(x) for item in items for path, x in found[item].items()}, found["meta"]


def assert_same_run(first, second):
    """Equal bit for bit: checkpoints, best, metrics rows, and what DONE says of the result."""
    for name in ("checkpoints", "best"):
        (one, meta), (two, other) = held(first, name), held(second, name)
        assert list(one) == list(two) and meta == other
        for path, value in one.items():
            np.testing.assert_array_equal(value, two[path], err_msg=path)
    assert rows_of(first) == rows_of(second)
    keys = ("steps", "best_step", "best_accuracy", "validation", "trainable_parameters", "total_parameters")
    one, two = (json.loads((pathlib.Path(w) / "DONE").read_text()) for w in (first, second))
    assert {k: one[k] for k in keys} == {k: two[k] for k in keys}


@pytest.fixture(scope="module")
def sentiment(home):
    """A finished classification run with TensorBoard files: (workdir, config, summary)."""
    cfg = config(home, log={"tensorboard": True})
    return home / "sentiment", cfg, train.train(cfg, home / "sentiment")


# What it learns


def test_learns_classification(sentiment):
    workdir, _, summary = sentiment
    assert_learns(workdir, 0.5)
    assert summary["best_accuracy"] >= 0.95


@pytest.mark.slow
def test_learns_prompted_lm_with_lora(home):
    """Loss on completions alone falls; the checkpoint holds the adapters alone, as many numbers as the formula says."""
    workdir = home / "prompted"
    cfg = letters(home, {"prompt_field": "prompt", "completion_field": "completion"}, method=lora(4),
                  optimizer={"learning_rate": 2e-2})  # fmt: skip
    summary = train.train(cfg, workdir)
    assert_learns(workdir, 0.5)
    c = hf.read_config(home / "llama")
    d, kv, hidden = c.hidden_size, c.num_kv_heads * c.head_dim, c.intermediate_size
    sides = [(d, d), (d, kv), (d, kv), (d, d), (d, hidden), (d, hidden), (hidden, d)]  # q k v out gate up down
    assert summary["trainable_parameters"] == c.num_layers * sum(4 * (i + o) for i, o in sides)
    saved, _ = held(workdir)
    weights = {p.removeprefix("trainable:"): x for p, x in saved.items() if p.startswith("trainable:")}
    assert sorted(weights) == sorted(f"layers/{m}/kernel/{f}" for f in "ab" for m in (
        "attn/q", "attn/k", "attn/v", "attn/out", "mlp/gate", "mlp/up", "mlp/down"))  # fmt: skip
    assert sum(x.size for x in weights.values()) == summary["trainable_parameters"]
    assert not any("/base" in path or "embed" in path for path in saved)
    assert summary["total_parameters"] > tree.count(hf.load(home / "llama")[1])
    mean = [p for p in saved if p.startswith("opt_state:") and "/mu/" in p]
    assert len(mean) == len(weights)


@pytest.mark.slow
def test_learns_packed_lm(home):
    train.train(letters(home, {"packing": True}, steps=50, log={"every": 1}), home / "packed")
    assert_learns(home / "packed", 0.5)


@pytest.mark.slow
def test_learns_masked_words(home):
    cfg = config(home, objective="mlm", model={"path": str(home / "masked"), "head": "mlm"},
                 data={"source": str(home / "recited.jsonl"), "num_labels": 0}, eval={"metric": "loss"}, log={"every": 1})  # fmt: skip
    train.train(cfg, home / "mlm")
    assert_learns(home / "mlm", 0.5)


@pytest.mark.slow
def test_bfloat16_computes_in_16_bits_and_keeps_32(home):
    cfg = config(home, model={"dtype": "bfloat16"}, optimizer={"name": "adamw"})
    train.train(cfg, home / "bf16")
    saved, _ = held(home / "bf16")
    assert {str(x.dtype) for x in saved.values() if x.ndim} == {"float32"}
    assert_learns(home / "bf16", 0.5)
    parts = train.prepare(train.complete(cfg))
    batch = parts["data"]["train"].gather(np.arange(4))
    graph = str(jax.make_jaxpr(lambda p: parts["objective"](p, batch, None)[0])(parts["params"]))
    products = [line for line in graph.splitlines() if "dot_general" in line]
    assert products and sum(":bf16" in line for line in products) > len(products) / 2


@pytest.mark.slow
def test_remat_changes_memory_and_no_loss(home):
    found, counts = {}, {}
    for remat in ("none", "dots", "full"):
        parts = train.prepare(train.complete(config(home, model={"remat": remat})))
        batch = parts["data"]["train"].gather(np.arange(8))

        def loss(params, parts=parts, batch=batch):
            return parts["objective"](params, batch, jax.random.key(3))[0]

        graph = str(jax.make_jaxpr(loss)(parts["params"]))  # norms, activations and attention are made again in any case
        counts[remat] = graph.count("prevent_cse=")
        found[remat] = jax.jit(jax.value_and_grad(loss))(parts["params"])
    assert counts["dots"] == counts["full"] == counts["none"] + 1 > 1, "the whole layer besides"
    for remat in ("dots", "full"):
        for path, grad in tree.flatten(found[remat]).items():
            np.testing.assert_allclose(grad, tree.flatten(found["none"])[path], rtol=1e-4, atol=1e-6, err_msg=path)


@pytest.mark.slow
def test_frozen_layers_stay_and_the_rest_joins(home):
    cfg = config(home, method={"freeze_layers": 1}, steps=5)
    summary = train.train(cfg, home / "frozen")
    model, params, _ = runs.load_run(home / "frozen", "last")
    hf.save(home / "frozen_out", model, params, home / "bert")
    after_model, after = hf.load(home / "frozen_out")
    _, before = hf.load(home / "bert", head="classification", rng=jax.random.key(9))
    assert after_model.config.head == "classification"
    for path, leaf in tree.flatten(before["layers"]).items():
        new = tree.flatten(after["layers"])[path]
        np.testing.assert_array_equal(new[0], leaf[0])
        if path.endswith("mlp/up/kernel"):
            assert not np.array_equal(new[1], leaf[1]) and not np.array_equal(new[2], leaf[2])
    np.testing.assert_array_equal(before["embed"]["tokens"]["embedding"], after["embed"]["tokens"]["embedding"])
    layer = tree.count(before["layers"]) // 3
    assert summary["trainable_parameters"] == tree.count(after) - layer - tree.count(before["embed"])
    ids = {"input_ids": jnp.arange(5, 17).reshape(2, 6)}
    np.testing.assert_allclose(model.apply(params, ids), after_model.apply(after, ids), atol=1e-6)


# What stays on disk


def test_metrics_and_tensorboard_agree(sentiment):
    workdir, _, _ = sentiment
    rows = rows_of(workdir)
    assert [r["step"] for r in rows if "lr" in r] == list(range(10, 61, 10))
    assert [r["step"] for r in rows if "lr" not in r] == [20, 40, 60]
    (file,) = (workdir / "tensorboard").iterdir()
    data, at, seen = file.read_bytes(), 0, {}
    while at < len(data):  # a TFRecord: length, its checksum, the event, its checksum
        (size,) = struct.unpack_from("<Q", data, at)
        event = Event.FromString(data[at + 12 : at + 12 + size])
        seen |= {(event.step, v.tag): v.simple_value for v in event.summary.value}
        at += 16 + size
    expected = {(r["step"], k): v for r in rows for k, v in r.items() if k != "step"}
    assert seen.keys() == expected.keys()
    np.testing.assert_allclose([seen[k] for k in expected], list(expected.values()), rtol=1e-6)


@pytest.mark.parametrize("which", ["best", "last"])
def test_loaded_run_scores_as_logged(sentiment, which):
    workdir, cfg, summary = sentiment
    step = summary["best_step"] if which == "best" else summary["steps"]
    logged = next(r for r in rows_of(workdir, "validation/") if r["step"] == step)
    model, params, _ = runs.load_run(workdir, which)
    tok = tokenizer.load(hf.resolve(cfg["model"]["path"]))
    full = train.complete({**cfg, "model": {**cfg["model"], "num_labels": 2}})
    data = pipeline.build(full["data"], "validation", tok, "classification", model.config.vocab_size)
    evaluate = train.make_eval(train.make_objective(full, model, tok))
    found = evaluate(params, jax.tree.map(lambda _: None, params), pipeline.eval_batches(data, 32))
    for key, value in found.items():
        np.testing.assert_allclose(value, logged[f"validation/{key}"], rtol=1e-6)


def test_finished_run_returns_at_once(sentiment, monkeypatch):
    workdir, cfg, summary = sentiment
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}
    monkeypatch.setattr(train, "prepare", lambda cfg: pytest.fail("a finished run was prepared again"))
    assert train.train(cfg, workdir) == json.loads(json.dumps(summary))
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*")} == before


@pytest.fixture(scope="module")
def straight(home):
    """12 steps over 3-step epochs without a stop, dropout on, two micro-batches a step."""
    cfg = config(home, steps=12, batch_size=8, accumulate=2, data={"source": str(home / "few.jsonl")},
                 eval={"every": 3}, save={"every": 4}, log={"every": 1})  # fmt: skip
    train.train(cfg, home / "straight")
    assert len(rows_of(home / "straight", "train/")) == 12
    return home / "straight", cfg


@pytest.mark.parametrize("crash_at", [pytest.param(2, marks=pytest.mark.slow), 6, pytest.param(8, marks=pytest.mark.slow)])
def test_resumes_bit_for_bit(straight, home, monkeypatch, crash_at):
    """Stopped before the first checkpoint, between two, and right after one."""
    reference, cfg = straight
    workdir, make_step, traces = home / f"crashed{crash_at}", train.make_step, []

    def counted(*args):
        step = make_step(*args)
        return lambda *a: traces.append(1) or step(*a)

    def crash(run, step, metrics, log=runs.Run.log):
        log(run, step, metrics)
        if step == crash_at and "validation/loss" not in metrics:
            raise RuntimeError("stopped here")

    monkeypatch.setattr(train, "make_step", counted)
    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "log", crash)
        with pytest.raises(RuntimeError, match="stopped here"):
            train.train(cfg, workdir)
    assert not (workdir / "DONE").exists() and rows_of(workdir)[-1]["step"] == crash_at
    train.train(cfg, workdir)
    assert_same_run(reference, workdir)
    assert len(traces) == 2, "the step was compiled more than once in a process"


@pytest.mark.slow
def test_resumes_bit_for_bit_after_kill(home, tmp_path):
    """SIGKILL from outside, at whatever the process is doing after its second checkpoint."""
    workdir = tmp_path / "killed"
    options = {"steps": 120, "batch_size": 8, "accumulate": 2, "data.max_length": 16, "eval.every": 15, "save.every": 10,
               "log.every": 1, "log.tensorboard": False, "optimizer.learning_rate": 1e-3, "mesh.data": 1}  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "scripts/train.py", f"--workdir={workdir}",
         f"--config=configs/train.py:model={home / 'bert'},data={home / 'few.jsonl'},method=lora(rank=2)",
         *(f"--config.{k}={v}" for k, v in options.items())],
        cwd=folders.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)  # fmt: skip
    end = time.monotonic() + 120
    while not (workdir / "checkpoints" / "20").exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    errors = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, errors
    assert not (workdir / "DONE").exists()
    cfg = json.loads((workdir / "config.json").read_text())
    assert train.train(cfg, workdir)["steps"] == 120
    train.train(cfg, tmp_path / "straight")
    assert_same_run(tmp_path / "straight", workdir)


@pytest.mark.slow
def test_best_and_patience(home, monkeypatch):
    """Scripted accuracies: the best of step 4 is kept, two evaluations without a better one end the run."""
    accuracies = {2: 0.5, 4: 0.7, 6: 0.7, 8: 0.6, 10: 0.9}
    seen = []

    def scripted(objective):
        def evaluate(trainable, frozen, batches):
            seen.append(np.asarray(trainable["head"]["kernel"]))
            return {"accuracy": accuracies[2 * len(seen)], "loss": 1.0}

        return evaluate

    monkeypatch.setattr(train, "make_eval", scripted)
    cfg = config(home, steps=30, eval={"every": 2, "patience": 2}, save={"every": 100})
    summary = train.train(cfg, home / "patient")
    assert (summary["steps"], summary["best_step"], summary["best_accuracy"]) == (8, 4, 0.7)
    saved, meta = held(home / "patient", "best")
    assert [p.name for p in (home / "patient" / "best").iterdir()] == ["4"]
    np.testing.assert_array_equal(saved["trainable:head/kernel"], seen[1])
    assert not np.array_equal(seen[1], seen[3]) and meta["meta"]["validation"]["accuracy"] == 0.7
    # Killed after its last checkpoint and before DONE: nothing is left to do.
    (home / "patient" / "DONE").unlink()
    monkeypatch.setattr(train, "make_step", lambda *a: lambda *b: pytest.fail("trained on after patience ran out"))
    assert train.train(cfg, home / "patient")["best_step"] == 4
