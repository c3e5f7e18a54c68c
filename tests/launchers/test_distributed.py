"""``scripts/train.py --distributed``: two real processes join; process 0 alone speaks; SIGTERM ends them; what cannot join says so."""

import json
import multiprocessing
import os
import signal
import socket
import time

import pytest
from tqdm.auto import tqdm

from ft_jax import errors, train
from ft_jax.io import files, runs
from tests import folders
from tests.launchers.stubs import ROOT

GIVEN = ("--config=configs/train.py", "--distributed")


@pytest.fixture(scope="module")
def context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ft_jax.train", "absl.app", "ml_collections.config_flags"])
    return context


def member(words, home, name, environment, waits):
    """scripts/train.py with a training that notes whom it joined, shows a bar and, if asked, waits for a signal."""

    def joined(_, workdir):
        import jax

        for _ in tqdm(range(2), desc="steps"):
            print("a note")
        seen = [jax.process_index(), jax.process_count(), jax.device_count() // jax.local_device_count()]
        (home / f"{name}.new").write_text(json.dumps([*seen, workdir]))
        (home / f"{name}.new").rename(home / f"{name}.joined")
        while waits:
            time.sleep(0.05)
        return {"seen": seen}

    train.train = joined
    texts = [str(home / f"{name}.{stream}") for stream in ("out", "err")]
    folders._script(str(ROOT / "scripts/train.py"), words, texts, environment)


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def clean_environment(**more):
    return {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")} | {"PYTHONPATH": str(ROOT), **more}


def test_two_processes_join_and_the_first_speaks(context, tmp_path):
    """One by flags, the other by its environment."""
    address = f"localhost:{free_port()}"
    by_flags = (*GIVEN, "--workdir=a b", f"--coordinator={address}", "--num_processes=2", "--process_id=0")
    variables = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    processes = [context.Process(target=member, args=(by_flags, tmp_path, "0", clean_environment(), False)),
                 context.Process(target=member, args=((*GIVEN, "--workdir=a b"), tmp_path, "1", clean_environment(**variables), False))]  # fmt: skip
    for process in processes:
        process.start()
    for process in processes:
        process.join(150)
    texts = {name: (tmp_path / name).read_text() for name in ("0.out", "0.err", "1.out", "1.err")}
    assert [p.exitcode for p in processes] == [0, 0], texts
    assert [json.loads((tmp_path / f"{i}.joined").read_text()) for i in (0, 1)] == [[i, 2, 2, "a b"] for i in (0, 1)]
    assert texts["0.out"].startswith("a note\na note\n{") and '"seen"' in texts["0.out"] and "steps: 100%" in texts["0.err"]
    assert texts["1.out"] == "" and "steps" not in texts["1.err"] and "a note" not in texts["1.err"]


def test_sigterm_ends_a_process_of_a_cluster(context, tmp_path):
    """JAX's own handler would keep it alive until it is killed, and no job would go back to a queue."""
    words = (*GIVEN, "--workdir=w", f"--coordinator=localhost:{free_port()}", "--num_processes=1", "--process_id=0")
    process = context.Process(target=member, args=(words, tmp_path, "0", clean_environment(), True))
    process.start()
    end = time.monotonic() + 150
    while not (tmp_path / "0.joined").exists() and process.is_alive() and time.monotonic() < end:
        time.sleep(0.02)
    assert (tmp_path / "0.joined").exists(), (tmp_path / "0.err").read_text()
    process.terminate()
    process.join(20)
    ended = process.exitcode
    process.kill()
    assert ended == -signal.SIGTERM


CASES = {
    "no cluster": (("--distributed", "--workdir=w"), {}, "found no cluster to join (coordinator_address should be defined.)"),
    "address": (("--distributed", "--workdir=w", "--coordinator=10.0.0.1"), {}, "'10.0.0.1'; it is written host:port"),
    "process": (("--distributed", "--workdir=w", "--process_id=2", "--num_processes=2"), {}, "process_id 2 does not fit num_processes 2"),
    "variable": (("--distributed", "--workdir=w"), {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two'; it takes a whole number"),
    "not distributed": (("--workdir=w", "--process_id=0"), {}, "--process_id is for a cluster; add --distributed"),
    "flag": (("--distribute", "--workdir=w"), {}, "Did you mean: distributed"),
    "bucket": (("--distributed", "--workdir=gs://bucket/run"), {}, "workdir 'gs://bucket/run' is a URL; runs write local files: mount"),
}


def test_what_cannot_join_says_so_in_one_line(context, tmp_path):
    started = {}
    for name, (words, environment, _) in CASES.items():
        started[name] = context.Process(target=member, args=((GIVEN[0], *words), tmp_path, name, clean_environment(**environment), False))
        started[name].start()
    for name, process in started.items():
        process.join(150)
        stderr = (tmp_path / f"{name}.err").read_text()
        assert process.exitcode == 2 and CASES[name][2] in stderr and stderr.count("error:") == 1, (name, stderr)
        assert not (tmp_path / f"{name}.joined").exists()


def test_a_run_does_not_take_a_url_for_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for url in ("gs://bucket/run", "s3://bucket/run", "file:///tmp/run"):
        for call in (lambda: runs.Run(url, {}), lambda: runs.load_run(url), lambda: files.make_folder(url)):  # noqa: B023
            with pytest.raises(errors.UserError, match="is a URL; runs write local files: mount the bucket"):
                call()
    assert list(tmp_path.iterdir()) == []
    assert runs.Run("a: folder", {}).path == tmp_path / "a: folder"
