"""Several processes train one run: the same losses as one, a lost one ends the others, and any number of them goes on."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from ft_jax import train
from ft_jax.io import runs
from tests import folders, helpers

pytestmark = pytest.mark.slow
OPTIONS = {"batch_size": 8, "data.max_length": 16, "eval.every": 6, "save.every": 2, "log.every": 1, "log.tensorboard": False,
           "optimizer.learning_rate": 1e-3, "optimizer.schedule": "constant", "optimizer.warmup": 0.0}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("processes")
    folders.make_model_folder(home / "llama", "llama", "lm")
    folders.write_rows(home / "few.jsonl", folders.alphabets(np.random.default_rng(0), 60))
    return home


def start(home, count, workdir, **options):
    """``count`` processes of one command, each with one device."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    given = [f"--config.{k}={v}" for k, v in (OPTIONS | {k.replace("__", "."): v for k, v in options.items()}).items()]
    config = f"--config=configs/train.py:model={home / 'llama'},data={home / 'few.jsonl'},objective=causal_lm,method=layers"
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    return [subprocess.Popen([sys.executable, "scripts/train.py", config, f"--workdir={workdir}", "--distributed", f"--coordinator=localhost:{port}",
                              f"--num_processes={count}", f"--process_id={i}", *given],
                             cwd=folders.ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for i in range(count)]  # fmt: skip


def ended(processes, timeout=300):
    """``[(status, what it said)]``, all within the time."""
    end, out = time.monotonic() + timeout, []
    for process in processes:
        _, said = process.communicate(timeout=max(1, end - time.monotonic()))
        out.append((process.returncode, said))
    return out


def config_of(workdir, **changes):
    cfg = json.loads((workdir / "config.json").read_text())
    return {**cfg, **changes}


def losses(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {(row["step"], key): row[key] for row in rows for key in row if key.endswith("/loss")}


def weights(workdir):
    return runs.load_run(workdir, which="last")[1]


def test_processes_train_as_one_and_another_number_goes_on(home, tmp_path):
    """Two processes are stopped in the middle, four with another mesh go on; beside one process that never stopped."""
    two = start(home, 2, tmp_path / "run", steps=400, mesh__fsdp=2, mesh__data=1)
    end = time.monotonic() + 240
    while time.monotonic() < end and not (tmp_path / "run/checkpoints/4").exists() and all(p.poll() is None for p in two):
        time.sleep(0.02)
    two[1].send_signal(signal.SIGTERM)
    for status, said in ended(two, 120):
        assert status == 0 and "Traceback" not in said, said
    step = max(int(p.name) for p in (tmp_path / "run/checkpoints").iterdir())
    steps = step + 4
    cfg = config_of(tmp_path / "run", steps=steps, mesh={"data": 2, "fsdp": 2, "sequence": 1, "tensor": 1})
    (tmp_path / "run/config.json").write_text(json.dumps(cfg))  # the rest of a long run is not waited for
    four = start(home, 4, tmp_path / "run", steps=steps, mesh__fsdp=2, mesh__data=2)
    for status, said in ended(four):
        assert status == 0, said
    train.train({**cfg, "mesh": {"data": 1}}, tmp_path / "one")
    found, wanted = losses(tmp_path / "run"), losses(tmp_path / "one")
    assert list(found) == list(wanted) and len(found) >= steps
    np.testing.assert_allclose(list(found.values()), list(wanted.values()), rtol=0, atol=1e-5)
    assert json.loads((tmp_path / "run/DONE").read_text())["steps"] == steps


def test_two_processes_give_the_losses_of_one(home, tmp_path):
    for status, said in ended(start(home, 2, tmp_path / "two", steps=12, mesh__fsdp=2, mesh__data=1)):
        assert status == 0, said
    train.train({**config_of(tmp_path / "two"), "mesh": {"data": 1}}, tmp_path / "one")
    found, wanted = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert list(found) == list(wanted)
    np.testing.assert_allclose(list(found.values()), list(wanted.values()), rtol=0, atol=1e-5)
    helpers.assert_trees_close(weights(tmp_path / "two"), weights(tmp_path / "one"), rtol=0, atol=1e-4)


def test_a_lost_process_ends_the_other(home, tmp_path):
    two = start(home, 2, tmp_path / "run", steps=100000, mesh__fsdp=2, mesh__data=1)
    end = time.monotonic() + 240
    while time.monotonic() < end and not (tmp_path / "run/checkpoints/4").exists() and all(p.poll() is None for p in two):
        time.sleep(0.02)
    two[1].kill()
    began = time.monotonic()
    status, said = ended(two[:1], 150)[0]
    assert status not in (0, 2) and "another process of this run was lost" in said and time.monotonic() - began < 120, said
    two[1].communicate()
