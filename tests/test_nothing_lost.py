"""What a run promises when it is stopped, damaged or started twice: nothing that was saved is lost."""

import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from ft_jax import population, train, tree
from ft_jax.errors import Stopped, UserError
from ft_jax.io import runs
from tests import folders
from tests.test_train import assert_same_run, cache, config, home, rows_of  # noqa: F401 (fixtures)


@pytest.fixture(scope="module")
def reference(home):  # noqa: F811
    """(config, folder) of a run of 8 steps with checkpoints of 2, 4, 6 and 8, none of them removed."""
    cfg = config(home, steps=8, batch_size=8, data={"source": str(home / "few.jsonl")}, eval={"every": 4},
                 save={"every": 2, "keep": 9}, log={"every": 1})  # fmt: skip
    train.train(cfg, home / "reference")
    return cfg, home / "reference"


def unfinished(reference, folder, step=6):
    """The reference as it was after ``step``."""
    shutil.copytree(reference[1], folder)
    (folder / "DONE").unlink()
    for later in (p for p in (folder / "checkpoints").iterdir() if int(p.name) > step):
        shutil.rmtree(later)
    return folder


def numbers(folder, step):
    """The files of a checkpoint that hold its arrays, the largest first."""
    found = [p for p in (folder / "checkpoints" / str(step)).rglob("*") if p.is_file() and "/d/" in str(p)]
    return sorted(found, key=lambda p: -p.stat().st_size)


def flip(file, place=0.5):
    data = bytearray(file.read_bytes())
    data[int(place * (len(data) - 1))] ^= 0x10
    file.write_bytes(bytes(data))


def spoil(folder, step):
    """Bits of every file of numbers: about a twentieth of the bytes are of no consequence, superseded or slack in a compression."""
    for file in numbers(folder, step):
        for place in (0.1, 0.3, 0.5, 0.7, 0.9):
            flip(file, place)


DAMAGE = {
    "bits": lambda folder: spoil(folder, 6),
    "cut": lambda folder: os.truncate(numbers(folder, 6)[0], 100),
    "gone": lambda folder: [p.unlink() for p in numbers(folder, 6)],
    "meta": lambda folder: flip(next((folder / "checkpoints/6/meta").rglob("metadata")), 0.0),
    "index": lambda folder: [p.write_bytes(b"") for p in (folder / "checkpoints/6").rglob("manifest.ocdbt")],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow) if k == "bits" else k for k in DAMAGE])
def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_goes_on(kind, reference, tmp_path, capsys):
    folder = unfinished(reference, tmp_path / "run")
    DAMAGE[kind](folder)
    train.train(reference[0], folder)
    said = capsys.readouterr().err
    assert "the checkpoint of step 6 is damaged" in said and "going on from that of step 4" in said
    assert_same_run(reference[1], folder)
    assert len(list(folder.glob("damaged-checkpoints-6-*"))) == 1


@pytest.mark.slow
def test_no_flipped_bit_changes_a_number_silently(reference, tmp_path):
    """At twelve places of every file that holds numbers: noticed, or of no consequence."""
    folder = unfinished(reference, tmp_path / "run")
    run, seen = runs.Run(folder, json.loads((folder / "config.json").read_text()), tensorboard=False), {True: 0, False: 0}
    parts = train.prepare(train.ready(reference[0]))
    trainable, _ = tree.split(parts["params"], parts["mask"])
    templates = {"trainable": trainable, "opt_state": parts["tx"].init(trainable)}
    read = functools.partial(run._read, run._managers["checkpoints"], 6, templates, lambda meta: None)
    whole = jax.tree.map(np.asarray, read()[0])
    for file in numbers(folder, 6):
        data = file.read_bytes()
        for place in np.linspace(0, 1, 12):
            flip(file, place)
            try:
                jax.tree.map(np.testing.assert_array_equal, read()[0], whole)
                seen[False] += 1
            except AssertionError:
                raise
            except Exception:  # noqa: BLE001 (whatever its readers meet)
                seen[True] += 1
            file.write_bytes(data)
    run.close()
    assert seen[True] >= 12


def test_where_all_are_damaged_nothing_is_touched(reference, tmp_path):
    folder = unfinished(reference, tmp_path / "run", 2)
    before = sorted(str(p) for p in folder.rglob("*"))
    for file in numbers(folder, 2):
        os.truncate(file, 10)
    with pytest.raises(UserError, match="checkpoints: no checkpoint can be read; that of step 2: "):
        train.train(reference[0], folder)
    assert sorted(str(p) for p in folder.rglob("*")) == before


@pytest.mark.slow
def test_a_members_damaged_checkpoint_takes_all_back_to_the_one_before(home, tmp_path, capsys):  # noqa: F811
    cfg = config(home, steps=6, batch_size=8, data={"source": str(home / "few.jsonl")}, eval={"every": 3},
                 save={"every": 2, "keep": 9}, log={"every": 1})  # fmt: skip
    configs = {name: {**cfg, "seed": seed} for seed, name in enumerate(("one", "two"))}
    for place in ("straight", "stopped"):
        population.train(configs, tmp_path / place)
    for name in configs:
        (tmp_path / "stopped" / name / "DONE").unlink()
        shutil.rmtree(tmp_path / "stopped" / name / "checkpoints" / "6")
    spoil(tmp_path / "stopped" / "two", 4)
    population.train(configs, tmp_path / "stopped")
    assert "two/checkpoints: the checkpoint of step 4 is damaged" in capsys.readouterr().err
    for name in configs:
        assert_same_run(tmp_path / "straight" / name, tmp_path / "stopped" / name)


def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(reference, tmp_path):
    folder = unfinished(reference, tmp_path / "run")
    text = "import fcntl, sys, time; f = open(sys.argv[1], 'a+'); fcntl.flock(f, fcntl.LOCK_EX); f.write('process 1 on moon'); f.flush(); print(1, flush=True); time.sleep(99)"
    other = subprocess.Popen([sys.executable, "-c", text, str(folder / "LOCK")], stdout=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(UserError, match="run is in use by process 1 on moon; wait for it, stop it, or choose another --workdir"):
        train.train(reference[0], folder)
    other.kill()
    other.wait()
    train.train(reference[0], folder)
    assert_same_run(reference[1], folder)
    assert not (folder / "LOCK").exists()


@pytest.mark.slow
@pytest.mark.parametrize("status", [0, 75])
def test_sigterm_saves_and_ends_well(status, home, tmp_path):  # noqa: F811
    """In the middle of steps, long before the next checkpoint; the same command goes on and ends as if nothing had been."""
    folder = tmp_path / "run"
    options = {"steps": 150, "batch_size": 8, "data.max_length": 16, "eval.every": 50, "save.every": 1000, "log.every": 1,
               "log.tensorboard": False, "optimizer.learning_rate": 1e-3, "mesh.data": 1}  # fmt: skip
    command = [sys.executable, "scripts/train.py", f"--workdir={folder}", f"--stopped_status={status}",
               f"--config=configs/train.py:model={home / 'bert'},data={home / 'few.jsonl'},method=lora(rank=2)",
               *(f"--config.{k}={v}" for k, v in options.items())]  # fmt: skip
    process = subprocess.Popen(command, cwd=folders.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None and not (folder / "metrics.jsonl").exists():
        time.sleep(0.002)
    while time.monotonic() < end and process.poll() is None and len(rows_of(folder)) < 3:
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == status, said
    (step,) = (int(p.name) for p in (folder / "checkpoints").iterdir())
    assert f"stopped by SIGTERM after step {step}, which is saved" in said and 3 <= step < 150 and "Traceback" not in said
    if status:
        return
    cfg = json.loads((folder / "config.json").read_text())
    train.train(cfg, folder)
    train.train(cfg, tmp_path / "straight")
    assert_same_run(tmp_path / "straight", folder)


def test_a_study_does_not_take_a_stop_for_a_failure():
    with pytest.raises(Stopped):
        try:
            raise Stopped("told to")
        except Exception:  # noqa: BLE001 (as experiments/study.py does)
            pytest.fail("a stop is no error")


def test_a_folder_that_may_not_be_written_says_so(reference, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "mkdir", refuse)
    with pytest.raises(UserError, match="may not be written; name another folder"):
        train.train(reference[0], tmp_path / "new")
