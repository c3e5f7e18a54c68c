"""scripts/launch_tpu_pod.sh against a stub of gcloud whose machines are folders: the real worker script runs in them."""

import re
import shlex
import shutil
import subprocess
import tarfile

import pytest

from tests.launchers.stubs import ROOT, WORKERS, said

pytestmark = pytest.mark.skipif(not shutil.which("git") or not shutil.which("flock"), reason="needs git and flock")

MACHINE = ("--name=pod", "--zone=us-east5-b", "--type=v6e-8", "--version=v2-alpha-tpuv6e")
TRAINING = ("--config=configs/train.py:model=minilm,method=lora(rank=4)", "--workdir=/mnt/runs/a b",
            "--config.data.template=It's \"$HOME\" \\ {text}\nand * more; exit 1 &", "--config.model.label_ids=()", "")  # fmt: skip
JAX = re.search(r"^jax==(.*)$", (ROOT / "requirements.txt").read_text(), re.M).group(1)


@pytest.fixture
def launch(stubs):
    def launch(*options, training=TRAINING, **answers):
        stubs.script(**answers)
        return stubs.run("bash", "scripts/launch_tpu_pod.sh", *options, *(["--", *training] if training else []))

    return launch


def verbs(calls):
    """The calls in short: kind and verb, and what a worker is told."""
    short = []
    for words in calls:
        told = re.search(r"worker\.sh (setup|start|follow)|(tail -n 20)", " ".join(words))
        short.append(f"{words[3].removeprefix('queued-')} {words[4]}" + (f" {told.group(1) or 'tail'}" if told else ""))
    return short


LAUNCH = ["tpu-vm scp", "tpu-vm ssh setup", "tpu-vm ssh start"]
LOOK = ["resources describe", "tpu-vm describe"]


@pytest.mark.parametrize(
    "options, answers",
    [
        (("--project=my-project", "--queued", "--spot", "--follow", "--delete", "--prepare=touch 'a disk'"),
         {"queued_resources": ["MISSING", "ACTIVE"], "tpu_vm": ["READY"], "status": [0]}),
        ((), {"tpu_vm": ["MISSING", "READY"], "status": [0]}),
    ],
)  # fmt: skip
def test_a_dry_run_prints_what_a_real_one_does(launch, stubs, options, answers):
    dry = launch(*MACHINE, *options, "--dry-run")
    assert dry.returncode == 0 and not dry.stderr and stubs.calls() == [] and not (stubs.repo / "runs").exists()
    printed = shlex.split(dry.stdout, comments=True)
    assert printed.count("--distributed") == 0 and "scripts/launch/pack.sh" in printed
    done = launch(*MACHINE, *options, **answers)
    assert done.returncode == 0, done.stderr
    wanted = [word for call in stubs.calls("gcloud") for word in call]
    cut = printed.index("bash")
    assert printed[cut : cut + 3] == ["bash", "scripts/launch/pack.sh", "runs/launch/pod/code.tar.gz"]
    assert printed[:cut] + printed[cut + 3 :] == wanted
    assert wanted.count("--zone=us-east5-b") == wanted.count("gcloud") == wanted.count("--quiet")
    if not options:
        return
    assert wanted.count("--spot") == 1 and wanted.count("--project=my-project") == wanted.count("gcloud")
    # what reached the workers: the code, the packages, the prepared disk, and every word as it was written here
    trained = stubs.calls(file="trained")
    assert sorted(trained) == [[worker, "scripts/train.py", "--distributed", "--stopped_status=75", *TRAINING] for worker in WORKERS]
    for worker in WORKERS:
        assert (stubs.home / worker / "ft_jax" / "a disk").exists()
        assert (stubs.home / worker / "ft_jax/requirements.txt").read_text() == (ROOT / "requirements.txt").read_text()
        assert (stubs.home / worker / f"ft_jax/.venv/jax-tpu-{JAX}").exists()
    log = (stubs.repo / "runs/launch/pod/train.1.log").read_bytes()
    assert log == b"train: 1/2\rtrain: 2/2\n\nft_jax: training ended with status 0\n" and log.decode().splitlines()[1] in done.stdout


def test_packages_are_pinned_and_installed_once(launch, stubs):
    answers = {"tpu_vm": ["READY"], "status": [0]}
    for _ in range(2):
        assert launch(*MACHINE, "--follow", **answers).returncode == 0
    installs = [words[6:] for words in stubs.calls("python") if "pip" in words]
    assert [words[-1] for words in installs] == ["requirements.txt", f"jax[tpu]=={JAX}"] * len(WORKERS)
    # code that is gone here goes there; what runs wrote there stays
    for path in ("runs/kept", "log/kept"):
        (stubs.home / "w1/ft_jax" / path).parent.mkdir(exist_ok=True)
        (stubs.home / "w1/ft_jax" / path).touch()
    (stubs.repo / "scripts/bench.py").unlink()
    (stubs.repo / "a new file").write_text("1")
    assert launch(*MACHINE, "--follow", **answers).returncode == 0
    with tarfile.open(stubs.repo / "runs/launch/pod/code.tar.gz") as archive:
        names = archive.getnames()
    assert "a new file" in names and not [n for n in names if n.startswith("runs")]
    there = stubs.home / "w1/ft_jax"
    assert (there / "a new file").exists() and (there / "runs/kept").exists() and (there / "log/kept").exists()
    assert not (there / "scripts/bench.py").exists() and (there / "scripts/train.py").exists()


def test_a_preempted_machine_is_made_again_and_the_run_resumed(launch, stubs):
    """Its worker dies before the queue says why; then the request is suspended, deleted, waits and comes back."""
    queue = ["MISSING", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED", "MISSING", "ACTIVE"]
    done = launch(*MACHINE, "--queued", "--spot", "--follow", queued_resources=queue, tpu_vm=["READY"], status=[143, 0])
    assert done.returncode == 0, done.stderr
    calls = stubs.calls("gcloud")
    assert verbs(calls) == [
        "resources describe", "resources create", "resources describe", "resources describe", *LOOK, *LAUNCH, "tpu-vm ssh follow",
        *LOOK, "resources describe",  # still there, then going
        "resources describe", "resources delete", "resources describe", "resources create", *LOOK, *LAUNCH, "tpu-vm ssh follow",
    ]  # fmt: skip
    creates = [words for words in calls if "create" in words]
    assert creates[0] == creates[1] and "--force" in next(words for words in calls if "delete" in words)
    trained = stubs.calls(file="trained")
    assert len(trained) == 2 * len(WORKERS) and {tuple(words[1:]) for words in trained} == {tuple(trained[0][1:])}
    logs = [(stubs.repo / f"runs/launch/pod/train.{n}.log").read_text().splitlines()[-1] for n in (1, 2)]
    assert [line.split()[-1] for line in logs] == ["143", "0"] and "resumes from its last checkpoint" in done.stdout


def test_a_machine_that_is_gone_or_lost_while_it_is_set_up(launch, stubs):
    """The request stands without a machine; then the copy fails because the next one is taken too. A stopped VM is started."""
    done = launch(*MACHINE, "--queued", "--follow", scp=["fails", ""], status=[0],
                  queued_resources=["ACTIVE", "MISSING", "ACTIVE", "FAILED", "FAILED", "MISSING", "ACTIVE"],
                  tpu_vm=["MISSING", "READY"])  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert verbs(stubs.calls("gcloud"))[-9:] == ["resources delete", "resources describe", "resources create", *LOOK, *LAUNCH, "tpu-vm ssh follow"]
    done = launch(*MACHINE, tpu_vm=["STOPPED", "STARTING", "READY"])
    assert done.returncode == 0 and verbs(stubs.calls("gcloud"))[:4] == ["tpu-vm describe", "tpu-vm start", "tpu-vm describe", "tpu-vm describe"]


def test_a_failed_copy_stops_before_anything_else(launch, stubs):
    line = said(launch(*MACHINE, "--follow", tpu_vm=["READY"], scp=["fails"]))
    assert "copying the code failed on pod" in line
    assert verbs(stubs.calls("gcloud")) == ["tpu-vm describe", "tpu-vm scp", *["tpu-vm describe"] * 4]
    assert stubs.calls(file="trained") == []
    subprocess.run(["rm", stubs.repo / "requirements.txt"], check=True)
    assert "setting up the workers failed" in said(launch(*MACHINE, "--follow", scp=[""]))
    assert stubs.calls(file="trained") == []


@pytest.mark.parametrize("status, looks", [(2, 0), (1, 4)])
def test_a_training_that_fails_is_not_repeated(launch, stubs, status, looks):
    done = launch(*MACHINE, "--follow", "--delete", tpu_vm=["READY"], status=[status])
    assert done.returncode == status and f"ended with status {status}" in done.stderr
    after = ["tpu-vm ssh follow", *["tpu-vm describe"] * looks, "tpu-vm ssh tail"]
    assert verbs(stubs.calls("gcloud"))[-len(after) :] == after, "and the machine is not deleted"
    assert (stubs.repo / "runs/launch/pod/workers.log").read_text().count("train: 2/2") == len(WORKERS)


def test_a_broken_connection_goes_on_at_its_byte(launch, stubs):
    done = launch(*MACHINE, "--follow", tpu_vm=["READY"], status=[0], follow=["7", "5", ""])
    assert done.returncode == 0, done.stderr
    follows = [int(re.search(r"follow (\d+)", " ".join(words)).group(1)) for words in stubs.calls("gcloud") if "follow" in " ".join(words)]
    assert follows == [1, 8, 13]
    assert (stubs.repo / "runs/launch/pod/train.1.log").read_bytes().startswith(b"train: 1/2\rtrain: 2/2\n\nft_jax")
    assert "no connection to pod" in said(launch(*MACHINE, "--follow", follow=["0"]))


def test_a_training_that_runs_is_followed_and_not_started_again(launch, stubs):
    (stubs.home / "wait").touch()
    first = launch(*MACHINE, tpu_vm=["READY"], status=[0])
    assert first.returncode == 0 and "--follow shows it" in first.stdout
    second = launch(*MACHINE, "--follow")  # the stub lets the training end once it is followed
    assert second.returncode == 0 and "train: 2/2" in second.stdout and "a training runs here already" in second.stdout
    assert len(stubs.calls(file="trained")) == len(WORKERS)


def test_what_the_cloud_refuses(launch, stubs):
    done = launch(*MACHINE, tpu_vm=["MISSING", "MISSING", "READY"], create=["RESOURCE_EXHAUSTED: no more capacity in the zone", ""])
    assert done.returncode == 0 and verbs(stubs.calls("gcloud"))[:4] == ["tpu-vm describe", "tpu-vm create"] * 2
    said_no = said(launch(*MACHINE, tpu_vm=["MISSING"], create=["INVALID_ARGUMENT: no type v6e-7"]))
    assert "could not make pod" in said_no and "no type v6e-7" in said_no
    never = said(launch(*MACHINE, "--attempts=3", create=["RESOURCE_EXHAUSTED"]))
    assert "asked 3 times for pod" in never and verbs(stubs.calls("gcloud")).count("tpu-vm create") == 4
    assert "cannot say how pod is: ERROR: you are not logged in" in said(launch(*MACHINE, tpu_vm=["BROKEN"]))


def test_delete(launch, stubs):
    for options, call in (((), "tpu-vm delete"), (("--queued",), "resources delete")):
        assert launch(*MACHINE[:2], "--delete", *options, training=()).returncode == 0
        assert verbs(stubs.calls("gcloud")) == [call]
    assert launch(*MACHINE, "--follow", "--delete", tpu_vm=["READY"], status=[0]).returncode == 0
    assert verbs(stubs.calls("gcloud"))[-1] == "tpu-vm delete"


def test_bad_options(launch, stubs):
    cases = {
        ("--nmae=pod",): "unknown option '--nmae'; nearest: '--name'", ("--qeued",): "nearest: '--queued'",
        ("--name",): "--name needs a value", ("--spot=yes",): "--spot takes no value", ("pod",): "unexpected argument 'pod'",
        MACHINE[:3]: "--version is missing", ("--attempts=many", *MACHINE): "--attempts is 'many'",
        ("--delete", *MACHINE): "--delete with a training needs --follow",
    }  # fmt: skip
    for options, says in cases.items():
        assert says in said(launch(*options, "--dry-run")), options
    assert "no --config=" in said(launch(*MACHINE, training=()))
    assert "no --workdir=" in said(launch(*MACHINE, training=TRAINING[:1]))
    for url in (["--workdir=gs://bucket/run"], ["--workdir", "s3://bucket/run"]):
        assert "is a URL; runs write local files: mount" in said(launch(*MACHINE, training=[TRAINING[0], *url]))
    shown = launch("--help")
    assert shown.returncode == 0 and "--prepare=CMD" in shown.stdout
    shutil.rmtree(stubs.repo / ".git")
    assert "is no git checkout" in said(launch(*MACHINE))
    assert stubs.calls() == [] and not (stubs.repo / "runs").exists()
