import errno
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from ft_jax.data import tokenise
from ft_jax.errors import UserError, disk_full

ARRAYS = {"ids": np.arange(5000, dtype=np.int32), "empty": np.zeros((0, 3), np.int32)}


def make():
    return ARRAYS, {"examples": 5}


def test_kept_mapped_and_not_made_twice(tmp_path):
    arrays, info = tokenise.cached(tmp_path, {"a": 1}, make)
    again, _ = tokenise.cached(tmp_path, {"a": 1}, lambda: pytest.fail("made again"))
    assert isinstance(again["ids"], np.memmap) and not again["ids"].flags.writeable
    assert again["ids"].tolist() == arrays["ids"].tolist() == list(range(5000)) and again["empty"].shape == (0, 3)
    assert info == {"examples": 5}
    assert len(list(tmp_path.iterdir())) == 1
    tokenise.cached(tmp_path, {"a": 2}, make)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("file", ["ids.npy", "meta.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "empty"])
def test_damaged_arrays_are_made_again(tmp_path, file, damage):
    tokenise.cached(tmp_path, {}, make)
    path = next(tmp_path.iterdir()) / file
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:100] if damage == "cut" else b"")
    arrays, _ = tokenise.cached(tmp_path, {}, make)
    assert arrays["ids"].tolist() == list(range(5000))
    assert len(list(tmp_path.iterdir())) == 1


def test_failure_leaves_nothing(tmp_path, monkeypatch):
    tokenise.cached(tmp_path, {"old": 1}, make)

    def full(path, array):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(tokenise, "_save", full)
    with pytest.raises(OSError, match="No space"):
        tokenise.cached(tmp_path, {"new": 1}, make)
    assert len(list(tmp_path.iterdir())) == 1
    tokenise.cached(tmp_path, {"old": 1}, lambda: pytest.fail("made again"))


def test_a_full_disk_is_told_as_such(tmp_path):
    """The real thing through a limit on file size: the error carries its errno, nothing is left behind."""
    code = (
        "import resource, sys, numpy as np\n"
        "from ft_jax.data import tokenise\nfrom ft_jax.errors import disk_full\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n    tokenise.cached(sys.argv[1], {}, lambda: ({'ids': np.zeros(10**6)}, {}))\n"
        "except OSError as error:\n    assert disk_full(error), error\n    sys.exit(7)\n")
    env = os.environ | {"PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 7, done.stderr
    assert list(tmp_path.iterdir()) == []
    assert not disk_full(OSError(errno.EACCES, "no"))


def test_two_writers_at_once(tmp_path):
    barrier, found = threading.Barrier(2), []

    def slow():
        barrier.wait(10)
        return make()

    threads = [threading.Thread(target=lambda: found.append(tokenise.cached(tmp_path, {}, slow))) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(20)
    assert [f[0]["ids"].sum() for f in found] == [ARRAYS["ids"].sum()] * 2
    assert len(list(tmp_path.iterdir())) == 1


def test_unwritable_cache(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cache folder .*file cannot be written"):
        tokenise.cached(tmp_path / "file", {}, make)
