"""The benchmark table: rows and their file, what is named in errors, and the benchmarks themselves on tiny shapes."""

import json

import numpy as np
import pytest

from scripts import bench
from scripts.benches import datapath, memory, ours, peers, serving, spectra, steps, trace, worker

TINY = {"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 64, "tie_word_embeddings": True}  # fmt: skip


@pytest.fixture
def made_up(monkeypatch):
    rows = [{"name": "fast", "ours": [1.0, 3.0, 2.0], "peer": [4.0, 4.0, 5.0], "peer_name": "slow loop", "unit": "s"},
            {"name": "alone", "ours": [2.0], "peer": [], "peer_name": "none", "unit": "s"}]  # fmt: skip
    seen = []
    monkeypatch.setattr(bench, "BENCHES", {"made_up": lambda args: seen.append(args) or rows, "other": None})
    return seen


def test_medians_ratio_and_spread(made_up, tmp_path, capsys):
    out = tmp_path / "new" / "rows.json"
    bench.main([f"--out={out}", "--only=made", "--repeats=2", "--layers=3"])
    first, second = json.loads(out.read_text())
    assert set(first) == {"benchmark", "ours", "peer", "peer_name", "ratio", "spread", "unit", "machine"}
    assert first["benchmark"] == "made_up: fast" and (first["ours"], first["peer"], first["ratio"]) == (2.0, 4.0, 2.0)
    assert first["spread"] == [1.0, 0.25] and "cores" in first["machine"]
    assert second["peer"] is None and second["ratio"] is None and second["spread"] == [None, None]
    assert (made_up[0].repeats, made_up[0].layers) == (2, 3)
    said = capsys.readouterr().out
    assert "made_up: fast" in said and "slow loop" in said


@pytest.mark.parametrize("argument,message", [
    ("--only=othr", "names no benchmark; nearest: 'other'"), ("--only=(", "not a regular expression"),
    ("--shape=smollm", "no model shape called 'smollm'; nearest: 'smollm2-135m'"), ("--repeats=0", "--repeats=0: at least 1"), ("--layers=-1", "--layers=-1: at least 1"),
])
def test_bad_arguments_are_named(made_up, capsys, argument, message):
    with pytest.raises(SystemExit) as error:
        bench.main([argument])
    assert error.value.code == 2 and message in capsys.readouterr().err and not made_up


def test_spectral_counts_are_the_peer_s():
    rows = list(spectra.roberta(repeats=1, layers=1, width=200))
    assert len(rows) == 4 and all(len(row["ours"]) == len(row["peer"]) == 1 for row in rows)
    assert all(row["ours"][0] > 0 and "torch" in row["peer_name"] for row in rows)


def test_a_count_that_differs_ends_the_benchmark(monkeypatch):
    monkeypatch.setattr(spectra, "_peer", lambda torch, model, name: (1.0, {kind: [99] for kind in model}))
    with pytest.raises(RuntimeError, match="the peer counts .99."):
        list(spectra.roberta(repeats=1, layers=1, width=16))


def test_without_torch_ours_is_measured_and_the_row_says_so(monkeypatch):
    monkeypatch.setattr(spectra, "_torch", lambda: (None, "torch is not installed"))
    rows = list(spectra.roberta(repeats=2, layers=1, width=16))
    assert [len(row["ours"]) for row in rows] == [2, 2, 2, 1] and all(row["peer"] == [] for row in rows)


def test_7b_counts_are_the_planted_ones_and_a_part_is_extrapolated(monkeypatch):
    shapes = {(300, 300): 3, (240, 400): 3}
    rows = {row["name"]: row["ours"] for row in spectra.llama(layers=1, shapes=shapes)}
    assert [len(x) for x in rows.values()] == [3, 3, 1, 1, 1]
    assert "6 matrices of 1 layers, 0 directions fell back" in rows
    total, making = (x[0] for x in list(rows.values())[2:4])
    assert rows["extrapolated to 32 layers, weights made included"][0] == pytest.approx(32 * (total + making))
    monkeypatch.setattr(spectra, "_report", lambda base, tuned: {"intruders": 1, "fell_back": 0})
    with pytest.raises(RuntimeError, match="1 intruders, planted 3"):
        list(spectra.llama(layers=1, shapes=shapes))


def test_weights_have_the_spectrum_that_is_said():
    sigma = np.linalg.svd(spectra.weights(np.random.default_rng(0), (384, 384)), compute_uv=False)
    assert sigma[9] / sigma[0] == pytest.approx(0.75, abs=0.05)
    assert sigma[192] / sigma[0] == pytest.approx(0.17, abs=0.02)


def test_files_of_rows_as_a_table(tmp_path, capsys):
    rows = [{"benchmark": "a: step", "ours": 2.0, "peer": 3.0, "peer_name": "torch", "ratio": 1.5, "spread": [0.1, None], "unit": "s", "machine": "m"},
            {"benchmark": "a: peak", "ours": 12.5, "peer": None, "peer_name": "none", "ratio": None, "spread": [None, 0.0], "unit": "GiB", "machine": "m"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    bench.main([f"--table={tmp_path}"])
    assert capsys.readouterr().out.splitlines()[2:] == ["| a: step | 2 s | 3 | torch | 1.50 | 10% / - |", "| a: peak | 12.5 GiB | | | | - / 0% |"]


def test_more_tokens_a_second_are_better():
    row = bench.summarised("x", {"name": "y", "ours": [30.0], "peer": [10.0], "peer_name": "peer", "unit": "tokens/s"})
    assert row["ratio"] == 3


@pytest.mark.slow
def test_a_step_beside_the_peer_s_in_processes_of_their_own(monkeypatch):
    monkeypatch.setattr(worker, "python_of", lambda package, own=worker.python_of: None if package == "tunix" else own(package))
    rows = {row["name"]: row for row in steps.rows("lora", 2, 8, TINY, repeats=1)}
    assert list(rows) == ["lora 2x8, step", "lora 2x8, step, CPU time", "lora 2x8, peak memory"]
    assert all(len(row["ours"]) == len(row["peer"]) == 1 and row["ours"][0] > 0 and row["peer"][0] > 0 for row in rows.values())
    assert all(row["peer_name"] == "torch + PEFT" for row in rows.values())
    assert 0.05 < rows["lora 2x8, peak memory"]["ours"][0] < 4


def test_peers_do_the_same_work_and_say_the_same(tmp_path):
    pytest.importorskip("transformers")
    spec = {"sizes": TINY, "folder": ours.weights(tmp_path, TINY), "batch": 2, "length": 8, "method": "full", "new": 6}
    (facts, step), (peer_facts, peer_step) = ours.train_step(spec), peers.torch_step(spec)
    found = [[side()["loss"] for _ in range(3)] for side in (step, peer_step)]
    assert facts == peer_facts and facts["parameters"] == facts["trainable"]
    np.testing.assert_allclose(*found, atol=1e-4)
    assert found[0][2] < found[0][0]
    assert ours.generate(spec)[1]() == peers.torch_generate(spec)[1]()


def test_the_parts_of_a_traced_step_are_all_of_it():
    rows = {row["name"]: row["ours"] for row in trace.rows(TINY, repeats=2, batch=2, length=8)}
    kinds = [kind for _, kind in trace.KINDS if kind]
    assert list(rows) == [f"{method} 2x8, {kind}" for method in ("lora", "full") for kind in [*kinds, "nothing runs"]]
    assert all(min(rows[f"{method} 2x8, {kind}"]) > 0 for method in ("lora", "full") for kind in ("matrix products", "elementwise work and sums"))


def test_time_is_shared_among_what_runs_at_once():
    found = trace._kinds([(0, 4000, "a"), (2000, 4000, "b"), (5000, 6000, "b"), (5000, 6000, "b")])
    assert found == {"a": 3.0, "b": 2.0, "nothing runs": 1.0}


def test_sides_that_do_other_work_end_the_benchmark():
    facts, spec = {"parameters": 9, "trainable": 2}, {"method": "full"}
    one, far = {"loss": 1.0}, {"loss": 1.01}
    steps.check(spec, {"ours": facts, "torch": facts}, {"ours": one, "torch": one}, {"ours": [one], "torch": [one]})
    with pytest.raises(RuntimeError, match="torch has 3 trainable, ours 2"):
        steps.check(spec, {"ours": facts, "torch": facts | {"trainable": 3}}, {}, {})
    with pytest.raises(RuntimeError, match="torch has the loss 1.01, ours 1.0"):
        steps.check(spec, {"ours": facts, "torch": facts}, {"ours": one, "torch": one}, {"ours": [one], "torch": [far]})


def test_a_missing_peer_is_said_and_left_out(monkeypatch, capsys):
    monkeypatch.setattr(worker, "python_of", lambda package: None)
    found, lines = steps.sides({"method": "lora"})
    assert list(found) == ["ours"] and len(lines) == 2
    assert lines[1] == "tunix is not installed, so its rows are left out: requirements-bench.txt; FT_JAX_BENCH_PYTHON may name a Python that has it"
    assert list(steps.sides({"method": "lora", "dtype": "bfloat16"})[1]) == lines[:1]
    one = {"seconds": 2.0, "cpu_seconds": 3.0, "peak_bytes": 2**30, "loss": 1.0}
    rows = list(steps._compared("lora 2x8", {"ours": one}, {"ours": [one]}))
    assert [row["peer"] for row in rows] == [[]] * 4 and rows[0]["peer_name"] == "none"


def test_a_side_that_fails_says_why():
    with pytest.raises(RuntimeError, match="(?s)worker:nothing ended with status 1.*no attribute 'nothing'"):
        worker.Worker("worker:nothing", {})


@pytest.mark.slow
def test_memory_by_method():
    rows = {row["name"]: row for row in memory.rows(TINY | {"vocab_size": 512}, shapes=((2, 32),), remats=("none", "full"))}
    assert len(rows) == 9
    full, lora = (rows[f"{m}, gradient and optimizer"]["ours"][0] for m in ("full", "lora"))
    assert lora == rows["qlora, gradient and optimizer"]["ours"][0] < full
    assert rows["qlora 2x32, remat full, peak"]["ours"] < rows["lora 2x32, remat full, peak"]["ours"] < rows["full 2x32, remat full, peak"]["ours"]


def test_a_bank_beside_one_adapter():
    rows = list(serving.bank(TINY, repeats=2, adapters=4, length=8, layers=1))
    assert [row["peer_name"] for row in rows] == ["one adapter", "no adapter"] and all(len(row["ours"]) == len(row["peer"]) == 2 for row in rows)


@pytest.mark.slow
def test_packed_batches_and_waiting():
    rows = list(datapath.rows(TINY | {"vocab_size": 49152}, layers=1, repeats=1, examples=200, batch=2, length=32, count=4, steps=2))
    assert [row["unit"] for row in rows] == ["tokens/s", "tokens/s", "% of step"]
    assert rows[0]["ours"][0] > 0 and rows[1]["ours"][0] > 0 and all(0 <= share < 100 for share in rows[2]["ours"])
