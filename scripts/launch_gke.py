"""Trains on GKE: writes a JobSet for TPU or GPU nodes and applies it, or has XPK do so: ``python scripts/launch_gke.py … -- --config=… --workdir=…``.

What stands after ``--`` goes to scripts/train.py --distributed in every pod. The image holds this code at /app and its Python
packages; the manifest is JSON, which kubectl reads as it reads YAML.
"""

import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path, PurePosixPath

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ft_jax.errors import ArgumentParser, UserError, cli, nearest
from ft_jax.io import files

TPUS = ("tpu-v4-podslice", "tpu-v5-lite-podslice", "tpu-v5p-slice", "tpu-v6e-slice", "tpu7x")
PORT = 8476
NAME = r"[a-z]([a-z0-9-]*[a-z0-9])?"


def options():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--name", help="of the JobSet; pods are NAME-workers-SLICE-NODE")
    add("--image", help="container image with this code at /app")
    add("--accelerator", help="TPU type (" + ", ".join(TPUS) + ") or GPU type (nvidia-h100-80gb, …) of the node pool")
    add("--topology", help="TPU: of one slice, such as 4x4")
    add("--chips", type=int, default=4, help="TPU: chips of one node")
    add("--slices", type=int, default=1, help="TPU: how many slices")
    add("--gpus", type=int, default=8, help="GPU: of one node")
    add("--nodes", type=int, default=1, help="GPU: how many nodes")
    add("--claim", action="append", default=[], metavar="PVC:/PATH", help="mount a PersistentVolumeClaim (Filestore, …) there")
    add("--bucket", action="append", default=[], metavar="NAME:/PATH", help="mount a bucket there with the gcsfuse driver")
    add("--service-account", help="Kubernetes account that may read and write the bucket")
    add("--spot", action="store_true", help="nodes that may be taken away; the run resumes on the next ones")
    add("--restarts", type=int, default=20, help="how often a failed or preempted job starts again")
    add("--namespace", default="default")
    add("--python", default="python", help="in the image")
    add("--xpk", metavar="CLUSTER", help="print or run an xpk command for this cluster; needs --tpu-type")
    add("--tpu-type", help="XPK: such as v5litepod-16")
    add("--dry-run", action="store_true", help="print what would be applied or run, and stop")
    return parser


def parse(argv):
    """``(options, train.py's options)``; UserError with the nearest right option for a wrong one."""
    cut = argv.index("--") if "--" in argv else len(argv)
    args, training = options().parse_args(argv[:cut]), argv[cut + 1 :]
    for name in ("name", "image"):
        if not getattr(args, name):
            raise UserError(f"--{name} is missing")
    for name in ("chips", "slices", "gpus", "nodes"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    if args.restarts < 0:
        raise UserError(f"--restarts is {args.restarts}; it cannot be negative")
    if not re.fullmatch(NAME, args.name) or len(args.name) > 40:
        raise UserError(f"--name {args.name!r} is no name for Kubernetes: at most 40 small letters, digits and '-', a letter first")
    return args, training


def workdir(training):
    """The run's folder in train.py's options; UserError for options that miss --config or --workdir, or for a URL."""
    found = {}
    for word, following in zip(training, [*training[1:], ""]):
        name, sep, value = word.partition("=")
        found[name] = value if sep else following
    for name in ("--config", "--workdir"):
        if not found.get(name):
            raise UserError(f"no {name}=… for scripts/train.py; its options come after --")
    return files.local(found["--workdir"])


def mounts(args):
    """``[(volume, mount)]`` of the claims and buckets."""
    found = []
    for kind, texts in (("claim", args.claim), ("bucket", args.bucket)):
        for text in texts:
            name, _, path = text.partition(":")
            if not (name and re.match(r"/[^/]", path)):
                raise UserError(f"--{kind} is {text!r}; it is written NAME:/PATH, the name without gs://")
            if kind == "claim":
                source = {"persistentVolumeClaim": {"claimName": name}}
            else:
                source = {"csi": {"driver": "gcsfuse.csi.storage.gke.io",
                                  "volumeAttributes": {"bucketName": name, "mountOptions": "implicit-dirs"}}}  # fmt: skip
            volume = f"disk-{len(found)}"
            found.append(({"name": volume, **source}, {"name": volume, "mountPath": path}))
    return found


def check_lasting(path, disks):
    """UserError for a workdir that is gone with its pod."""
    if not any(PurePosixPath("/app", path).is_relative_to(mount["mountPath"]) for _, mount in disks):
        paths = ", ".join(mount["mountPath"] for _, mount in disks) or "none"
        raise UserError(f"workdir {str(path)!r} lies on no mounted disk (mounted: {paths}), so a restarted job would begin anew; "
                        "add --claim=PVC:/PATH or --bucket=NAME:/PATH")


def hardware(args):
    """``(nodes of a slice, replicas, {resource: count}, node selector)``."""
    if not args.accelerator:
        raise UserError("--accelerator is missing")
    if args.accelerator.startswith("tpu"):
        if args.accelerator not in TPUS:
            raise UserError(f"unknown TPU {args.accelerator!r}{nearest(args.accelerator, TPUS)}")
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", args.topology or ""):
            raise UserError(f"--topology is {args.topology!r}; a TPU slice has one, such as 4x4 or 2x2x4")
        chips = math.prod(map(int, args.topology.split("x")))
        if chips % args.chips:
            raise UserError(f"a {args.topology} slice has {chips} chips, not a multiple of the {args.chips} of a node (--chips)")
        selector = {"gke-tpu-accelerator": args.accelerator, "gke-tpu-topology": args.topology}
        shape = chips // args.chips, args.slices, {"google.com/tpu": args.chips}
    else:
        if args.topology or args.slices > 1:
            raise UserError(f"--topology and --slices are for TPUs, {args.accelerator!r} is none; GPUs have --nodes and --gpus")
        selector = {"gke-accelerator": args.accelerator}
        shape = args.nodes, 1, {"nvidia.com/gpu": args.gpus}
    if args.spot:
        selector["gke-spot"] = "true"
    return *shape, {f"cloud.google.com/{key}": value for key, value in selector.items()}


def command(args, training):
    return [args.python, "/app/scripts/train.py", "--distributed", "--stopped_status=75", *training]


def literal(words):
    """Words in which Kubernetes replaces no ``$(NAME)``."""
    return [word.replace("$(", "$$(") for word in words]


def coordinates(args, nodes):
    """The environment by which processes on GPUs find each other; on TPUs GKE and JAX see to it."""
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    return [
        {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{args.name}-workers-0-0.{args.name}:{PORT}"},
        {"name": "JAX_NUM_PROCESSES", "value": str(nodes)},
        {"name": "JAX_PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": index}}},
    ]


def manifest(args, training):
    """The JobSet: one job a slice, one pod a node, one process a pod; all start again when one is lost."""
    nodes, replicas, resources, selector = hardware(args)
    disks = mounts(args)
    check_lasting(workdir(training), disks)
    taints = [next(iter(resources)), *(["cloud.google.com/gke-spot"] if args.spot else [])]
    container = {
        "name": "train", "image": args.image, "workingDir": "/app", "command": literal(command(args, training)),
        "env": [] if "google.com/tpu" in resources else coordinates(args, nodes),
        "ports": [{"containerPort": PORT}, *([{"containerPort": 8471}] if "google.com/tpu" in resources else [])],
        "resources": {"limits": resources}, "volumeMounts": [mount for _, mount in disks],
    }  # fmt: skip
    pod = {
        "restartPolicy": "Never", "nodeSelector": selector, "tolerations": [{"key": key, "operator": "Exists"} for key in taints],
        "containers": [container], "volumes": [volume for volume, _ in disks],
    }  # fmt: skip
    if args.service_account:
        pod["serviceAccountName"] = args.service_account
    template = {"metadata": {"annotations": {"gke-gcsfuse/volumes": "true"} if args.bucket else {}}, "spec": pod}
    job = {"parallelism": nodes, "completions": nodes, "completionMode": "Indexed", "backoffLimit": 0, "template": template,
           # status 2 is a mistake in the options, which another start would repeat
           "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2]}}]}}  # fmt: skip
    final = {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    whole = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}  # one slice a node pool
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet",
        "metadata": {"name": args.name, "namespace": args.namespace, "annotations": whole if "google.com/tpu" in resources else {}},
        "spec": {
            "network": {"enableDNSHostnames": True}, "failurePolicy": {"maxRestarts": args.restarts, "rules": [final]},
            "replicatedJobs": [{"name": "workers", "replicas": replicas, "template": {"spec": job}}],
        },
    }  # fmt: skip


def xpk(args, training):
    """The command line of ``xpk workload create``; its disks are those of the cluster (``xpk storage``)."""
    workdir(training)
    if not args.tpu_type:
        raise UserError("--xpk needs --tpu-type, such as v5litepod-16")
    if args.claim or args.bucket:
        raise UserError("--claim and --bucket are for a manifest; with --xpk attach disks to the cluster (xpk storage attach)")
    return [
        "xpk", "workload", "create", f"--cluster={args.xpk}", f"--workload={args.name}", f"--tpu-type={args.tpu_type}",
        f"--num-slices={args.slices}", f"--docker-image={args.image}", f"--max-restarts={args.restarts}",
        f"--command={shlex.join(command(args, training))}",
    ]  # fmt: skip


@cli
def main(argv=None):
    args, training = parse(sys.argv[1:] if argv is None else argv)
    if args.xpk:
        words, text = xpk(args, training), None
    else:
        words, text = ["kubectl", "apply", "-f", "-"], json.dumps(manifest(args, training), indent=2) + "\n"
    if args.dry_run:
        print(shlex.join(words) + (f" <<'END'\n{text}END" if text else ""))
        return
    try:
        status = subprocess.run(words, input=text, text=True).returncode
    except FileNotFoundError:
        raise UserError(f"{words[0]} was not found; install it, or see what would be done with --dry-run") from None
    if status:
        raise UserError(f"{words[0]} ended with status {status}; nothing was started by it")
    if text:
        print(f"follow: kubectl logs -f -n {args.namespace} job/{args.name}-workers-0; end: kubectl delete -n {args.namespace} jobset {args.name}")


if __name__ == "__main__":
    main()
