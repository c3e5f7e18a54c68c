"""The report of two checkpoints: pairing, streaming, resuming, and what is refused before any compute."""

import json
import os
import pathlib
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import save_file

from ft_jax.analysis import compare, spectral, spectral_page
from ft_jax.errors import UserError

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "analyse.py"


def write(folder, tensors, model_type="bert", **config):
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.ascontiguousarray(x, np.float32) for name, x in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, **config}))
    return folder


def weights(layers=2, d=24, seed=0, prefix=""):
    rng = np.random.default_rng(seed)
    out = {f"{prefix}embeddings.word_embeddings.weight": rng.standard_normal((50, d))}
    for i in range(layers):
        at = f"{prefix}encoder.layer.{i}."
        out[at + "attention.self.query.weight"] = rng.standard_normal((d, d))
        out[at + "attention.self.query.bias"] = rng.standard_normal(d)
        out[at + "intermediate.dense.weight"] = rng.standard_normal((2 * d, d))
    return out


def intrude(w, size=3.0, seed=9):
    rng = np.random.default_rng(seed)
    u, v = (rng.standard_normal(n) for n in w.shape)
    return w + size * np.linalg.norm(w, 2) * np.outer(u / np.linalg.norm(u), v / np.linalg.norm(v))


def run(folder_a, folder_b, out, **options):
    return compare.compare(folder_a, folder_b, out, progress=False, **options)


def test_report_against_the_measures_themselves(tmp_path):
    base = weights()
    name = "encoder.layer.1.intermediate.dense.weight"
    tuned = base | {name: intrude(base[name])}
    report = run(write(tmp_path / "a", base), write(tmp_path / "b", tuned), tmp_path / "out", k=4)
    assert report == json.loads((tmp_path / "out" / "spectral.json").read_text())
    assert [m["name"] for m in report["matrices"]] == sorted(n for n in base if "layer" in n and "weight" in n)
    assert report["total_intruders"] == 1 and report["total_directions"] == 16
    for m in report["matrices"]:
        w0, w = base[m["name"]].astype(np.float32), tuned[m["name"]].astype(np.float32)
        direct = spectral.spectral(w0.T, w.T, k=4)
        assert m["shape"] == list(w.shape) and m["intruders"] == direct["intruders"]
        for key in ("effective_rank", "stable_rank", "delta_norm"):
            assert m[key] == pytest.approx(float(direct[key]), rel=1e-6)
    assert {s["why"] for s in report["skipped"]} == {"embedding or head", "not a matrix"}
    sweep = {s["eps"]: s["total_intruders"] for s in report["eps_sweep"]}
    assert sweep[0.5] == 1 and sweep == dict(sorted(sweep.items())) and max(sweep.values()) == list(sweep.values())[-1]
    page = spectral_page.render(report)
    assert "1 of the 16 leading directions" in page and "http" not in page


@pytest.mark.parametrize("bare_is_base", [True, False])
def test_wrapper_prefix_and_task_head(tmp_path, bare_is_base):
    bare, task = write(tmp_path / "bare", weights()), weights(prefix="bert.") | {"classifier.weight": np.ones((3, 24))}
    task = write(tmp_path / "task", task)
    report = run(*((bare, task) if bare_is_base else (task, bare)), tmp_path / "out")
    assert report["total_intruders"] == 0 and len(report["matrices"]) == 4
    row = report["matrices"][0]
    assert row["name"].startswith("bert." if bare_is_base else "encoder.") and row["delta_norm"] == 0
    assert row["base_name"].startswith("encoder." if bare_is_base else "bert.")


def test_conv1d_is_read_in_out(tmp_path):
    """A new direction on the output side only is an intruder; config.json decides which side that is."""
    d = 16
    base = np.zeros((d, d))
    base[:8, :8] = np.diag(np.linspace(2, 1, 8))
    tuned = base.copy()
    tuned[0] += 50 * np.linspace(-1, 1, d)  # row 0 is an old direction, the columns' pattern is new
    for kind, expected in (("gpt2", 1), ("bert", 0)):
        a = write(tmp_path / f"{kind}a", {"h.0.mlp.c_fc.weight": base}, kind)
        b = write(tmp_path / f"{kind}b", {"h.0.mlp.c_fc.weight": tuned}, kind)
        assert run(a, b, tmp_path / f"{kind}out", k=1, eps=0.8)["total_intruders"] == expected


def test_stacked_experts_are_a_batch(tmp_path):
    rng = np.random.default_rng(0)
    base = {"model.layers.0.mlp.experts.gate_up_proj": rng.standard_normal((2, 20, 12)),  # [expert, out, in]
            "model.layers.0.mlp.experts.down_proj": rng.standard_normal((2, 10, 12)),  # [expert, in, out]
            "model.layers.1.mlp.experts.down_proj": rng.standard_normal((2, 12, 12))}
    tuned = dict(base)
    tuned["model.layers.0.mlp.experts.down_proj"] = base["model.layers.0.mlp.experts.down_proj"].copy()
    tuned["model.layers.0.mlp.experts.down_proj"][1] = intrude(base["model.layers.0.mlp.experts.down_proj"][1], 9)
    a, b = (write(tmp_path / name, w, "moe", hidden_size=12) for name, w in (("a", base), ("b", tuned)))
    report = run(a, b, tmp_path / "out", k=3)
    rows = {m["name"]: m for m in report["matrices"]}
    assert list(rows) == [f"model.layers.0.mlp.experts.{n}[{i}]" for n in ("down_proj", "gate_up_proj") for i in (0, 1)]
    name = "model.layers.0.mlp.experts.down_proj"
    direct = spectral.spectral(base[name][1].astype(np.float32), tuned[name][1].astype(np.float32), k=3)
    np.testing.assert_allclose(rows[f"{name}[1]"]["max_cosine"], direct["max_cosine"], atol=1e-6)
    assert [s["name"] for s in report["skipped"]] == ["model.layers.1.mlp.experts.down_proj"]
    assert run(a, b, tmp_path / "out", k=3) == report


def test_include_and_exclude(tmp_path):
    a, b = write(tmp_path / "a", weights()), write(tmp_path / "b", weights(seed=1))
    assert len(run(a, b, tmp_path / "o1", include="query")["matrices"]) == 2
    assert len(run(a, b, tmp_path / "o2", exclude="query")["matrices"]) == 3  # the embedding is in
    with pytest.raises(UserError, match="not a regular expression"):
        run(a, b, tmp_path / "o3", include="(")
    with pytest.raises(UserError, match="no matrix is left"):
        run(a, b, tmp_path / "o3", include="value")
    assert not (tmp_path / "o3").exists()


def test_resumes_where_it_stopped_and_begins_anew_when_a_checkpoint_changes(tmp_path, monkeypatch):
    a, b, out = write(tmp_path / "a", weights()), write(tmp_path / "b", weights(seed=1)), tmp_path / "out"
    seen, compute = [], spectral.spectral

    def counted(base, tuned, **hp):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(base.shape)
        return compute(base, tuned, **hp)

    monkeypatch.setattr(spectral, "spectral", counted)
    with pytest.raises(KeyboardInterrupt):
        run(a, b, out)
    journal = out / "spectral.jsonl"
    journal.write_text(journal.read_text() + '{"name": "encoder.layer.1.att')  # the line a crash cut off
    calls = []
    monkeypatch.setattr(spectral, "spectral", lambda *x, **hp: calls.append(1) or compute(*x, **hp))
    whole = run(a, b, out)
    assert len(calls) == 2
    assert run(a, b, out, eps=0.9)["total_intruders"] >= whole["total_intruders"] and len(calls) == 2
    assert whole == run(a, b, tmp_path / "fresh") and len(calls) == 6
    run(a, b, out, k=3)
    assert len(calls) == 10
    stamp = (b / "model.safetensors").stat()
    write(b, weights(seed=2))
    os.utime(b / "model.safetensors", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # same size, same time, other content
    changed = run(a, b, out, k=3)
    assert len(calls) == 14 and changed["matrices"] != whole["matrices"]


def test_memory_is_that_of_one_pair(tmp_path, monkeypatch):
    d, many = 192, 30
    rng = np.random.default_rng(0)
    tensors = {f"layer.{i}.dense.weight": rng.standard_normal((d, d)) for i in range(many)}
    a, b = write(tmp_path / "a", tensors), write(tmp_path / "b", {n: x * 1.1 for n, x in tensors.items()})
    del tensors
    opened = []
    monkeypatch.setattr(compare, "_REOPEN", 4 * d * d * 4)
    monkeypatch.setattr(compare, "Checkpoint", lambda p, real=compare.Checkpoint: opened.append(p) or real(p))
    pairs, _ = compare.plan(a, b)
    tracemalloc.start()
    compare.stream(a, b, pairs, tmp_path / "j.jsonl", progress=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    pair, total = 2 * d * d * 4, 2 * many * d * d * 4
    assert peak < 5 * pair < total / 4
    assert len(opened) > many / 2  # maps are dropped, so that file pages do not pile up either


def other(name, value):
    return lambda w: w | {name: value}


QUERY = "encoder.layer.1.attention.self.query.weight"


@pytest.mark.parametrize("change,config,message", [
    (lambda w: {n: x for n, x in w.items() if n != QUERY}, {}, f"no tensor '{QUERY}'"),
    (other(QUERY, np.ones((24, 25))), {}, f"{QUERY}: shape .24, 24. in .* but .24, 25. in"),
    (other("encoder.layer.2.output.dense.weight", np.ones((24, 48))), {}, "no tensor 'encoder.layer.2.output.dense"),
    (lambda w: w, {"model_type": "llama"}, "different architectures: model_type is 'bert'"),
    (lambda w: {n.replace("encoder", "blocks.transformer"): x for n, x in w.items()}, {}, "no tensor"),
])
def test_what_does_not_fit_is_named_before_compute(tmp_path, monkeypatch, change, config, message):
    a = write(tmp_path / "a", weights())
    b = write(tmp_path / "b", change(weights()), **config)
    monkeypatch.setattr(spectral, "spectral", None)
    with pytest.raises(UserError, match=message):
        run(a, b, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nan_is_named(tmp_path):
    w = weights()
    w[QUERY] = np.full((24, 24), np.nan)
    with pytest.raises(UserError, match=f"{QUERY}: the tuned matrix .* NaN"):
        run(write(tmp_path / "a", weights()), write(tmp_path / "b", w), tmp_path / "out")


def call(*args):
    done = subprocess.run([sys.executable, SCRIPT, *args], capture_output=True, text=True, timeout=100)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_command_line(tmp_path):
    a, b = write(tmp_path / "a", weights()), write(tmp_path / "b", weights(seed=1))
    code, out, err = call(f"--base={a}", f"--tuned={b}", f"--out={tmp_path / 'out'}", "--k=2")
    assert code == 0, err
    assert "4 matrices" in out and "skipped 2: not a matrix" in out
    assert (tmp_path / "out" / "spectral.html").read_text("utf-8").startswith("<!doctype html>")
    before = (tmp_path / "out" / "spectral.json").read_bytes()
    data = (b / "model.safetensors").read_bytes()
    (b / "model.safetensors").write_bytes(data[: len(data) // 2])
    code, out, err = call(f"--base={a}", f"--tuned={b}", f"--out={tmp_path / 'out'}")
    assert code == 2 and len(err.strip().splitlines()) == 1 and "model.safetensors" in err and "whole" in err
    assert (tmp_path / "out" / "spectral.json").read_bytes() == before
