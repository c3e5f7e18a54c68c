"""Damaged files and odd configs: whatever they hold, a loader loads them rightly or says in one line why not.

``FT_JAX_FUZZ=2400`` draws that many cases in all; by default there are few, and scripts/reliability.py draws the many.
"""

import json
import math
import os
import struct
import tracemalloc

import numpy as np
import pytest

from ft_jax.errors import UserError
from ft_jax.io import gguf, hf, safetensors
from ft_jax.weights import graft
from tests import folders, fuzzing

COUNT = int(os.environ.get("FT_JAX_FUZZ", 0))
PER_TARGET = {"prepared config": 5, "gguf": 10, "gguf tensors": 10}  # the dear ones


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    with folders.small_home(tmp_path_factory, 30) as home:
        yield home


@pytest.mark.parametrize("name", [*fuzzing.TARGETS, *fuzzing.CONFIGS])
def test_it_is_loaded_rightly_or_refused(name, home):
    count = COUNT // (len(fuzzing.TARGETS) + len(fuzzing.CONFIGS)) or PER_TARGET.get(name, 20)
    found = fuzzing.cases(name, count, 1, home)
    assert [(drawn[0], what) for drawn, what in found if what not in ("loaded", "refused")] == []
    assert len(found) >= count // 2


@pytest.mark.parametrize("name", fuzzing.TARGETS)
def test_what_is_not_damaged_is_loaded(name):
    assert fuzzing.case(name, "none", fuzzing._good(name)[fuzzing.TARGETS[name].file]) == "loaded"


def test_a_flipped_bit_of_a_safetensors_file_is_what_is_loaded_or_refused(tmp_path):
    """The format has no checksum: a bit of a number that flips gives the file's number, one of the header mostly a refusal."""
    safetensors.save(tmp_path, [("a", np.arange(6, dtype=np.float32).reshape(2, 3)), ("b", np.ones(2, np.float32))])
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    size, seen = 8 + int.from_bytes(whole[:8], "little"), {"loaded": 0, "refused": 0}
    for bit in range(8 * len(whole)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bytes(data))
        try:
            loaded = dict(safetensors.Checkpoint(tmp_path).items())
        except UserError:
            assert bit // 8 < size, "a number cannot be told from another"
            seen["refused"] += 1
            continue
        seen["loaded"] += 1
        held = fuzzing.plain(file)
        assert {n: x.tobytes() for n, x in loaded.items()} == {n: data for n, (_, _, data) in held.items()}
    assert seen["refused"] > 300 and seen["loaded"] >= 8 * (len(whole) - size)


# Headers that promise what no file holds


def _header(**tensors):
    rows = {n: {"dtype": "F32", "shape": s, "data_offsets": [0, 4 * math.prod(s)]} for n, s in tensors.items()}
    text = json.dumps(rows).encode()
    return len(text).to_bytes(8, "little") + text


def _packed(text, count=0):
    text = text.encode()
    return struct.pack("<Q", count or len(text)) + text


def _bert_with(folder, **values):
    folders.make_model_folder(folder)
    (folder / "config.json").write_text(json.dumps({**json.loads((folder / "config.json").read_text()), **values}))


def _mask_of(folder, shapes):
    from safetensors.numpy import save_file

    save_file({"a": np.zeros(2, np.uint8)}, folder / "mask", metadata={"shapes": json.dumps(shapes)})


BOMBS = {
    "safetensors, a huge tensor": (lambda f: (f / "model.safetensors").write_bytes(_header(a=[2**20, 2**20])), safetensors.Checkpoint),
    "safetensors, a huge header": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 7 + b"\x7f" + b"{}"), safetensors.Checkpoint),
    "safetensors, more than a word counts": (lambda f: (f / "model.safetensors").write_bytes(_header(a=[2**40, 2**40])), safetensors.Checkpoint),
    "gguf, huge counts": (lambda f: (f / "a.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60)), lambda f: gguf.cached_folder(f / "a.gguf")),
    "gguf, a huge string": (lambda f: (f / "a.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + _packed("x", 2**62)),
                            lambda f: gguf.cached_folder(f / "a.gguf")),
    "gguf, a huge array": (lambda f: (f / "a.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + _packed("x") + struct.pack("<IIQ", 9, 8, 2**61)),
                           lambda f: gguf.cached_folder(f / "a.gguf")),
    "graft mask, a huge shape": (lambda f: _mask_of(f, {"a": [2**20, 2**20]}), lambda f: graft.load_mask(f / "mask")),
    "graft mask, no shape": (lambda f: _mask_of(f, [1]), lambda f: graft.load_mask(f / "mask")),
    "config.json, a huge vocabulary": (lambda f: _bert_with(f, vocab_size=2**31 - 1), hf.load),
    "config.json, huge layers": (lambda f: _bert_with(f, hidden_size=2**30, intermediate_size=2**31 - 1), hf.load),
    "config.json, many layers": (lambda f: _bert_with(f, num_hidden_layers=10**9), hf.load),
    "config.json, many labels": (lambda f: _bert_with(f, architectures=["BertForSequenceClassification"], num_labels=2**30), hf.load),
    "config.json, deep": (lambda f: (folders.make_model_folder(f) / "config.json").write_text("[" * 10**6), hf.load),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_header_that_promises_too_much_is_refused_before_it_costs(name, tmp_path, monkeypatch):
    """Refused, with no more memory than a few times the file and a little that is fixed."""
    monkeypatch.setenv("FT_JAX_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "made"
    folder.mkdir()
    make, load = BOMBS[name]
    make(folder)
    size = sum(p.stat().st_size for p in folder.iterdir())
    tracemalloc.start()
    try:
        with fuzzing.bounds(), pytest.raises(UserError):
            load(folder)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * size + 8_000_000
