"""scripts/launch_gke.py: its manifests, and that what a dry run prints is what kubectl and xpk are given."""

import json
import shlex
import sys

import pytest

from tests.launchers.stubs import said

TRAINING = ("--config=configs/train.py:model=minilm", "--workdir=/mnt/runs/a b", "--config.x=it's $(HOME) \"$HOME\"")
TPU = ("--name=ft", "--image=registry/ft:1", "--accelerator=tpu-v6e-slice", "--topology=4x4", "--bucket=runs:/mnt/runs")
GPU = ("--name=ft", "--image=registry/ft:1", "--accelerator=nvidia-h100-80gb", "--nodes=3", "--claim=nfs:/mnt")


@pytest.fixture
def launch(stubs):
    return lambda *options, training=TRAINING: stubs.run(sys.executable, "scripts/launch_gke.py", *options, "--", *training)


@pytest.fixture
def applied(launch, stubs):
    """The manifest that kubectl is given, after a check that a dry run pasted into a shell gives it the same."""

    def applied(*options):
        dry = launch(*options, "--dry-run")
        assert dry.returncode == 0, dry.stderr
        assert stubs.calls() == []
        assert stubs.run("bash", "-c", dry.stdout).returncode == 0
        pasted = stubs.calls("kubectl"), (stubs.home / "manifest").read_text()
        done = launch(*options)
        assert done.returncode == 0 and "kubectl logs -f" in done.stdout, done.stderr
        assert (stubs.calls("kubectl"), (stubs.home / "manifest").read_text()) == pasted
        assert pasted[0] == [["kubectl", "apply", "-f", "-"]]
        return json.loads(pasted[1])

    return applied


def parts(manifest):
    (workers,) = manifest["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    return workers, job, job["template"]["spec"], job["template"]["spec"]["containers"][0]


def test_tpu_slices(applied):
    manifest = applied(*TPU, "--slices=2", "--spot", "--service-account=trainer", "--restarts=5", "--namespace=lab")
    workers, job, pod, container = parts(manifest)
    assert (manifest["kind"], manifest["apiVersion"]) == ("JobSet", "jobset.x-k8s.io/v1alpha2")
    assert manifest["metadata"]["namespace"] == "lab" and manifest["spec"]["failurePolicy"]["maxRestarts"] == 5
    assert "exclusive-topology" in "".join(manifest["metadata"]["annotations"])
    assert (workers["replicas"], job["parallelism"], job["completions"], job["backoffLimit"]) == (2, 4, 4, 0)
    assert pod["nodeSelector"] == {"cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
                                   "cloud.google.com/gke-tpu-topology": "4x4", "cloud.google.com/gke-spot": "true"}  # fmt: skip
    assert container["resources"]["limits"] == {"google.com/tpu": 4} and container["env"] == []
    assert {taint["key"] for taint in pod["tolerations"]} == {"google.com/tpu", "cloud.google.com/gke-spot"}
    assert pod["serviceAccountName"] == "trainer" and job["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "runs"
    assert container["volumeMounts"] == [{"name": pod["volumes"][0]["name"], "mountPath": "/mnt/runs"}]
    # Kubernetes reads $$( as $(; all else reaches the training as it was written
    given = [word.replace("$$(", "$(") for word in container["command"]]
    assert given == ["python", "/app/scripts/train.py", "--distributed", "--stopped_status=75", *TRAINING] and "$$(HOME)" in container["command"][-1]
    # a mistake in the options ends everything, anything else starts again
    assert job["podFailurePolicy"]["rules"][0] == {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2]}}
    assert manifest["spec"]["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]


def test_gpu_nodes(applied):
    """JAX cannot find a cluster of GPU pods by itself: its environment says where process 0 is, by the JobSet's names."""
    manifest = applied(*GPU)
    workers, job, pod, container = parts(manifest)
    assert (workers["replicas"], job["parallelism"], job["completionMode"]) == (1, 3, "Indexed")
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"} and manifest["metadata"]["annotations"] == {}
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    env = {row["name"]: row.get("value") or row["valueFrom"]["fieldRef"]["fieldPath"] for row in container["env"]}
    port = container["ports"][0]["containerPort"]
    assert env == {"JAX_COORDINATOR_ADDRESS": f"ft-{workers['name']}-0-0.ft:{port}", "JAX_NUM_PROCESSES": "3",
                   "JAX_PROCESS_ID": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}  # fmt: skip
    assert manifest["spec"]["network"] == {"enableDNSHostnames": True}
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "nfs"}


def test_xpk(launch, stubs):
    options = ("--name=ft", "--image=registry/ft:1", "--xpk=my-cluster", "--tpu-type=v6e-16", "--slices=2")
    dry = launch(*options, "--dry-run")
    assert launch(*options).returncode == 0
    (call,) = stubs.calls()
    assert shlex.split(dry.stdout) == call and call[:3] == ["xpk", "workload", "create"] and "--num-slices=2" in call
    command = next(word for word in call if word.startswith("--command=")).removeprefix("--command=")
    assert shlex.split(command) == ["python", "/app/scripts/train.py", "--distributed", "--stopped_status=75", *TRAINING]


def test_bad_options(launch, stubs):
    cases = [
        ((*TPU, "--topolgy=4x4"), "nearest: '--topology'"), (TPU[1:], "--name is missing"), (TPU[:2], "--accelerator is missing"),
        (("--name=Ft", *TPU[1:]), "no name for Kubernetes"), ((*TPU[:2], "--accelerator=tpu-v6-slice", *TPU[3:]), "nearest: 'tpu-v6e-slice'"),
        ((*TPU, "--topology=16"), "such as 4x4"), ((*TPU, "--chips=3"), "16 chips, not a multiple of the 3"), ((*GPU, "--gpus=0"), "--gpus is 0"),
        ((*GPU, "--topology=4x4"), "are for TPUs"), ((*GPU, "--restarts=-1"), "cannot be negative"), ((*GPU, "--nodes=x"), "invalid int value"),
        (GPU[:4], "lies on no mounted disk (mounted: none)"), ((*GPU[:4], "--claim=nfs:/data"), "(mounted: /data)"),
        ((*GPU, "--bucket=gs://b"), "written NAME:/PATH"), (("--name=a", "--image=b", "--xpk=c"), "needs --tpu-type"),
        ((*TPU, "--xpk=c", "--tpu-type=v6e-16"), "xpk storage attach"),
    ]  # fmt: skip
    for options, says in cases:
        assert says in said(launch(*options)), options
    assert "is a URL; runs write local files" in said(launch(*TPU, training=["--config=c", "--workdir=gs://runs/a"]))
    assert "no --workdir=" in said(launch(*TPU, training=["--config=c"]))
    assert stubs.calls() == []
    stubs.script(kubectl=[1])
    assert "kubectl ended with status 1" in said(launch(*TPU))
