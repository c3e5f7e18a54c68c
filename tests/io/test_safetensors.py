"""Checkpoints: every damage is named, a failure leaves the old files readable."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from ft_jax.errors import UserError
from ft_jax.io import files, safetensors

ARRAYS = {f"layer.{i}.weight": np.arange(12, dtype=np.float32).reshape(3, 4) + i for i in range(5)}


def read(path):
    return dict(safetensors.Checkpoint(path).items())


def same(got, want):
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name])


@pytest.mark.parametrize("limit", [10_000, 100, 48])
def test_round_trip(tmp_path, limit):
    written = safetensors.save(tmp_path, iter(ARRAYS.items()), max_shard_bytes=limit)
    assert sorted(written) == files.entries(tmp_path)
    assert len(written) == {10_000: 1, 100: 4, 48: 6}[limit]  # shards and, from two on, an index
    same(read(tmp_path), ARRAYS)
    (tmp_path / "other").touch()
    modes = {file.stat().st_mode for file in tmp_path.iterdir()}
    assert len(modes) == 1  # as readable as any file made here


def test_sizes_are_bounded(tmp_path):
    """No shard is larger than asked for, and no more than one is held at a time."""
    alive = []

    def tensors():
        for i in range(6):
            array = np.full(100, i, np.float32)
            alive.append(array.nbytes)
            yield f"t{i}", array

    safetensors.save(tmp_path, tensors(), max_shard_bytes=800)
    for file in tmp_path.glob("*.safetensors"):
        assert sum(a.nbytes for a in read(file).values()) <= 800
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(alive) and len(index["weight_map"]) == 6


def test_dtypes(tmp_path):
    values = np.array([1.5, -2.25, 3.0])
    kinds = {"a": np.float32, "b": np.float16, "c": ml_dtypes.bfloat16}
    save_file({k: values.astype(v) for k, v in kinds.items()} | {"d": values, "e": np.arange(3)},
              tmp_path / "model.safetensors")  # fmt: skip
    checkpoint = safetensors.Checkpoint(tmp_path)
    for name in kinds:
        got = checkpoint.read(name)
        assert got.dtype == np.float32 and checkpoint.shape(name) == (3,)
        np.testing.assert_array_equal(got, values)
    for name, kind in (("d", "F64"), ("e", "I64")):
        assert checkpoint.dtype(name) == kind
        with pytest.raises(UserError, match=f"{name} is {kind}; read are F32, F16, BF16"):
            checkpoint.read(name)
    with pytest.raises(UserError, match="no tensor 'aa'"):
        checkpoint.read("aa")


@pytest.mark.parametrize("change", ["shards", "single", "single to shards", "shards to single"])
def test_resaving_leaves_no_old_file(tmp_path, change):
    first, second = {"shards": (50, 50), "single": (999, 999), "single to shards": (999, 50),
                     "shards to single": (50, 999)}[change]  # fmt: skip
    safetensors.save(tmp_path, ARRAYS.items(), max_shard_bytes=first)
    (tmp_path / "notes.txt").write_text("mine")
    new = {k: v * 2 for k, v in ARRAYS.items()}
    written = safetensors.save(tmp_path, new.items(), max_shard_bytes=second)
    same(read(tmp_path), new)
    assert files.entries(tmp_path) == sorted([*written, "notes.txt"])


@pytest.mark.parametrize("limit", [999, 50])
@pytest.mark.parametrize("when", ["tensors", "write", "rename", "third rename"])
def test_failure_keeps_the_old(tmp_path, monkeypatch, limit, when):
    safetensors.save(tmp_path, ARRAYS.items(), max_shard_bytes=limit)
    before = files.entries(tmp_path)

    def broken():
        for i, (name, array) in enumerate(ARRAYS.items()):
            if when == "tensors" and i == 3:
                raise OSError(28, "No space left on device")
            yield name, array + 1

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    if when == "write":
        monkeypatch.setattr(safetensors, "save_file", full)
    replace, calls = os.replace, []

    def broken_replace(*args):
        calls.append(args)
        return full() if when == "rename" or len(calls) == 3 else replace(*args)

    if "rename" in when:
        monkeypatch.setattr(safetensors.os, "replace", broken_replace)
    with pytest.raises(OSError, match="No space left"):
        safetensors.save(tmp_path, broken(), max_shard_bytes=50)
    same(read(tmp_path), ARRAYS)
    assert files.entries(tmp_path) == before


def test_every_cut_is_noticed(tmp_path):
    """A file cut at any length, or with bytes after its end, is refused when it is opened."""
    safetensors.save(tmp_path, list(ARRAYS.items())[:2])
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for size in range(0, len(whole), 7):
        file.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"model.safetensors: not a whole safetensors file \(\d+ bytes"):
            safetensors.Checkpoint(tmp_path)
    file.write_bytes(whole + b"12345678")
    with pytest.raises(UserError, match="not a whole safetensors file"):
        safetensors.Checkpoint(tmp_path)


@pytest.mark.parametrize("damage, message", [
    (lambda d, m: (d / "model-00002-of-00003.safetensors").unlink(),
     "shard model-00002-of-00003.safetensors is missing"),
    (lambda d, m: m.update({"extra": "model-00001-of-00003.safetensors"}), "'extra' is in model-00001-of-00003"),
    (lambda d, m: m.update({"layer.0.weight": "../secret.safetensors"}), "no file of this folder"),
    (lambda d, m: m.update({"layer.0.weight": "/etc/passwd"}), "no file of this folder"),
    (lambda d, m: m.update({"layer.0.weight": ".."}), "no file of this folder"),
    (lambda d, m: m.update({"layer.0.weight": "a\\b"}), "no file of this folder"),
    (lambda d, m: m.update({"layer.0.weight": 3}), "no file of this folder"),
    (lambda d, m: m.clear(), "no weight_map"),
])  # fmt: skip
def test_bad_index(tmp_path, damage, message):
    safetensors.save(tmp_path, ARRAYS.items(), max_shard_bytes=100)
    index = tmp_path / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    (tmp_path.parent / "secret.safetensors").write_bytes((tmp_path / where["layer.0.weight"]).read_bytes())
    damage(tmp_path, where)
    index.write_text(json.dumps({"weight_map": where}))
    with pytest.raises(UserError, match=message):
        safetensors.Checkpoint(tmp_path)


def test_truncated_shard_and_index(tmp_path):
    safetensors.save(tmp_path, ARRAYS.items(), max_shard_bytes=100)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-4])
    with pytest.raises(UserError, match=f"{shard.name}: not a whole"):
        safetensors.Checkpoint(tmp_path)
    shard.write_bytes(whole)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {')
    with pytest.raises(UserError, match="cannot be read as JSON"):
        safetensors.Checkpoint(tmp_path)


def test_nothing_to_open(tmp_path):
    with pytest.raises(UserError, match="holds no model.safetensors"):
        safetensors.Checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="pickled weights are never read"):
        safetensors.Checkpoint(tmp_path)
    (tmp_path / "model.safetensor").write_bytes(b"x")
    with pytest.raises(UserError, match="no such file or folder; nearest: 'model.safetensor'"):
        safetensors.Checkpoint(tmp_path / "model.safetensors")
