"""The benchmark table: rows and their file, what is named in errors, and the spectral ones on tiny shapes."""

import json

import numpy as np
import pytest

from scripts import bench
from scripts.benches import spectra


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
    ("--repeats=0", "--repeats=0: at least 1"), ("--layers=-1", "--layers=-1: at least 1"),
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
