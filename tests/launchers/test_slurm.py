"""scripts/launch_slurm.sh and its job against stubs of sbatch, srun, squeue and scontrol."""

import shlex
import signal
import subprocess
import time

import pytest

from tests.launchers.stubs import said

TRAINING = ("--config=configs/train.py:model=minilm,method=lora(rank=4)", "--workdir=/shared/a b", "--config.x=it's \"$HOME\"\n;")
JOB = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "12"}


@pytest.fixture
def launch(stubs):
    return lambda *options, training=TRAINING: stubs.run("bash", "scripts/launch_slurm.sh", *options, "--", *training)


def job_of(call):
    """The script that sbatch was given, with its words."""
    return call[call.index("scripts/launch/slurm_job.sh") :]


@pytest.mark.parametrize(
    "options, tasks, environment",
    [
        (("--nodes=2", "--gpus=4", "--time=1:00:00", "--partition=a100", "--account=me", "--cpus=12", "--logs=my logs"), 4, []),
        (("--gpus=4", "--per=node", "--python=/shared/venv/bin/python"), 1, ["JAX_LOCAL_DEVICE_IDS=0,1,2,3"]),
    ],
)
def test_a_dry_run_prints_what_a_real_one_does(launch, stubs, options, tasks, environment):
    dry = launch(*options, "--dry-run")
    assert dry.returncode == 0 and not dry.stderr and stubs.calls() == []
    printed = shlex.split(dry.stdout, comments=True)
    assert launch(*options).returncode == 0
    (call,) = stubs.calls()
    done = stubs.run("bash", *job_of(call), **JOB)
    assert done.returncode == 0, done.stderr
    (step,) = stubs.calls()
    assert printed == [*call, *(["export", *environment] if environment else []), *step]
    assert f"--ntasks-per-node={tasks}" in call and "--gpus-per-node=4" in call and f"--chdir={stubs.repo}" in call
    assert step[-len(TRAINING) - 3 :] == ["scripts/train.py", "--distributed", "--stopped_status=75", *TRAINING] and "--gpu-bind=none" in step
    assert sorted((stubs.home / "environment").read_text().splitlines()) == sorted(
        [*environment, "SRUN_CPUS_PER_TASK=12"])
    for option in options:
        name = option.partition("=")[0]
        assert option in call or name in ("--gpus", "--per", "--cpus", "--logs", "--python")


def test_the_job_asks_for_a_signal_and_may_be_queued_again(stubs):
    head = [line for line in (stubs.repo / "scripts/launch/slurm_job.sh").read_text().splitlines() if line.startswith("#SBATCH")]
    assert head == ["#SBATCH --requeue", "#SBATCH --open-mode=append", "#SBATCH --signal=B:TERM@120"]


@pytest.mark.parametrize(
    "state, status, again",
    [("RUNNING", 143, True), ("CANCELLED", 143, False), ("RUNNING", 0, False)],
    ids=["time limit", "cancelled", "ended in time"],
)
def test_the_signal_reaches_the_training(stubs, state, status, again):
    """Before the time limit the training gets SIGTERM and the job goes back to the queue, unless it was cancelled or has ended."""
    stubs.script(squeue=[state], srun=[status], wait=[""])
    words = ["bash", "scripts/launch/slurm_job.sh", "python", "gpu", "8", *TRAINING]
    job = subprocess.Popen(words, cwd=stubs.repo, env=stubs.env | JOB, stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + 100
    while not (stubs.home / "started").exists() and time.monotonic() < end:
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    out = job.communicate(timeout=100)[0]
    assert job.returncode == status and (stubs.home / "stopped").exists()
    assert stubs.calls("scontrol") == ([["scontrol", "requeue", "7"]] if again else [])
    assert ("resumes from its last checkpoint" in out) == again


def test_a_training_that_fails_is_not_queued_again(stubs):
    stubs.script(squeue=["RUNNING"], srun=[2])
    assert stubs.run("bash", "scripts/launch/slurm_job.sh", "python", "gpu", "8", *TRAINING, **JOB).returncode == 2
    assert [words[0] for words in stubs.calls()] == ["srun"]


def test_bad_options(launch, stubs):
    cases = {
        ("--gpu=4",): "unknown option '--gpu'; nearest: '--gpus'", ("--per=nodes",): "--per is 'nodes'; it is gpu or node; nearest: 'node'",
        ("--nodes=0",): "--nodes is '0'; it takes a whole number", ("--gpus=two",): "--gpus is 'two'", ("--time",): "--time needs a value",
        ("--zzzzzzzzzz",): "known: --nodes, --gpus",
    }  # fmt: skip
    for options, says in cases.items():
        assert says in said(launch(*options)), options
    assert "is a URL" in said(launch(training=["--config=c", "--workdir=gs://b/run"]))
    assert "no --config=" in said(launch(training=["--workdir=w"]))
    assert stubs.calls() == []
