"""Kills running work at random moments and looks whether the same command ends as if nothing had been: docs/reliability.md.

python scripts/reliability.py [--kills=20 --only=REGEX --seed=0 --fuzz=2400 --out=FILE.json]

Each kill is of a real process with a folder of its own, by SIGKILL, in one of three ways: at a random moment of its life;
at a random moment and then as soon as a checkpoint is being written; or right before a random one of the renames that put a
finished file or checkpoint in its place. The same command then runs until it ends well, and what it leaves is compared with
what an uninterrupted run left, bit for bit. ``--fuzz`` cases of damaged files and odd configs follow (tests/fuzzing.py).
What it needs: requirements-test.txt.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import pathlib
import random
import re
import runpy
import shutil
import signal
import sys
import tempfile
import time
import typing

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tqdm.auto import tqdm

from ft_jax import errors
from ft_jax.io import files

ENVIRONMENT = {  # compiled once for all processes: what is killed is the work, not the compiler
    "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip
PRELOAD = ["absl.app", "ml_collections.config_flags", "ft_jax.population", "ft_jax.search", "experiments.run", "experiments.mechanisms.study"]
HALF = (".orbax-checkpoint-tmp", files.TEMPORARY)  # in the names of what is being written
WAYS = ("at a random moment", "while a checkpoint is written", "before a rename")
TRIES = 3  # times that the same command may be needed


# What is run


def _options(home, **more):
    keys = {"batch_size": 8, "data.max_length": 16, "log.every": 1, "optimizer.learning_rate": 1e-3, "mesh.data": 1, "save.every": 3,
            "eval.every": 4, **more}  # fmt: skip
    return f"configs/train.py:model={home / 'bert'},data={home / 'reviews.jsonl'}", keys


def finetune(home, workdir):
    """`scripts/train.py` with a method that starts from data, so that its start is kept too."""
    config, keys = _options(home, steps=30)
    _script("train.py", f"--config={config},method=corda(rank=2)", f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in keys.items()))


def population(home, workdir):
    """`population.train` of three members of one program, with ranks, rates and seeds of their own."""
    from configs.train import LINEAR
    from ft_jax import population, search

    def member(rank, rate, seed):
        return search.config_of(_options(home)[0], _options(home, steps=20, seed=seed)[1] | {
            "method.kernels": [[LINEAR, f"lora(rank={rank})"]], "optimizer.learning_rate": rate, "log.tensorboard": False, "save.keep": 1})  # fmt: skip

    population.train({f"rank{r}": member(r, rate, seed) for r, rate, seed in ((1, 1e-3, 0), (3, 2e-3, 1), (4, 1e-3, 2))}, workdir)


def search(home, workdir):
    """`scripts/search.py` over ranks and layers."""
    config, keys = _options(home, **{"steps": 6, "log.tensorboard": False})
    kernels = [["layers/attn/[qv]/kernel", "lora(rank={rank})"]]
    space = {"parameters": {"rank": [1, 2, 4], "layers": {"subset": 2}},
             "settings": {**keys, "method.kernels": kernels, "method.mask": "only_layers(layers='{layers}')"}}  # fmt: skip
    if not (home / "space.json").exists():
        files.write_json(home / "space.json", space)
    _script("search.py", f"--config={config}", f"--space={home / 'space.json'}", f"--workdir={workdir}", "--trials=7", "--seed=1")


def study(home, workdir):
    """`python -m experiments.run mechanisms` at the smallest size that has every part."""
    import dataclasses

    from experiments import run
    from experiments.mechanisms.settings import Counting, Regression, Setting
    from experiments.mechanisms.study import STUDY

    small = {"width": 16, "layers": 1, "heads": 2, "seeds": (0,), "batch": 16, "steps": 10, "tune_steps": 10, "shares": (0.1,), "ranks": (1,)}
    counting = Counting(**small, length=6, families=("count", "recount"), tune_marks=(10,), correlations={"medium": (0.0, 1.0), "small": (1.0,)},
                        revert_steps=10, revert_marks=(0, 10), test_rows=32, probe_rows=(40, 20), prune=(1,))  # fmt: skip
    regression = Regression(**small, dimension=2, pairs=3, tasks=2, tune_marks=(0, 10), factors=(1.0, 2.0), bins=3, test_rows=20)
    run.load = lambda name: dataclasses.replace(STUDY, scales={"smoke": Setting(counting, regression)})
    errors.cli(run.main)(["mechanisms", "--scale=smoke", f"--workdir={workdir}"])


def _script(name, *args):
    sys.argv = [str(ROOT / "scripts" / name), *args]
    with contextlib.suppress(SystemExit):  # absl leaves by it at a good end, too; others are told by DONE
        runpy.run_path(sys.argv[0], run_name="__main__")


# What is left, to be compared


def run_left(workdir):
    """``{what: value}`` of a run's folder: every array of its newest checkpoints by hash, their meta, metrics, DONE without times."""
    import numpy as np
    import orbax.checkpoint as ocp

    found = {}
    for name in ("checkpoints", "best"):
        with ocp.CheckpointManager(workdir / name) as manager:
            step = manager.latest_step()
            items = [p.name for p in (workdir / name / str(step)).iterdir() if p.is_dir() and p.name != "meta"]
            arguments = {item: ocp.args.StandardRestore() for item in items}
            held = manager.restore(step, args=ocp.args.Composite(**arguments, meta=ocp.args.JsonRestore()))
        arrays = {f"{name}/{item}/{path}": np.asarray(x) for item in items for path, x in held[item].items()}
        found |= {path: f"{x.dtype}{x.shape} {hashlib.sha256(x.tobytes()).hexdigest()}" for path, x in arrays.items()}
        found |= {f"{name}/step": step, f"{name}/meta": held["meta"]}
    done = files.read_json(workdir / "DONE")
    kept = ("steps", "best_step", "validation", "trainable_parameters", "moving_parameters", "total_parameters")
    rows = [json.loads(row) for row in (workdir / "metrics.jsonl").read_text().splitlines()]
    return found | {"metrics": rows, "DONE": {k: done[k] for k in kept}}


def population_left(workdir):
    return {f"{name}: {k}": v for name in ("rank1", "rank3", "rank4") for k, v in run_left(workdir / name).items()}


def search_left(workdir):
    rows = [json.loads(row) for row in (workdir / "results.jsonl").read_text().splitlines()]
    left = {"trials": rows, "front": files.read_json(workdir / "pareto.json")}
    return left | {f"{run}: {k}": v for run in sorted({row["run"] for row in rows}) for k, v in run_left(workdir / run).items()}


def study_left(workdir):
    summary = files.read_json(workdir / "summary.json")
    models = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(workdir.rglob("[!.]*.safetensors"))}  # but half written ones
    return {**summary["parts"], "claims": summary["claims"], "missing": summary["made"]["missing"], "models": models}


class Kind(typing.NamedTuple):
    """What is killed: ``run(home, workdir)``, ``left(workdir)``, and the pattern of what it saves first."""

    run: typing.Callable
    left: typing.Callable
    saved: str


KINDS = {
    "finetune": Kind(finetune, run_left, "checkpoints/[0-9]*"), "population": Kind(population, population_left, "*/checkpoints/[0-9]*"),
    "search": Kind(search, search_left, "runs/*/checkpoints/[0-9]*"), "study": Kind(study, study_left, "parts/*.json"),
}  # fmt: skip


# Processes and their ends


def _child(kind, home, workdir, log, last):
    """In a process of its own; ``last`` is the rename before which it kills itself (-1: none). Notes beside its log how many there were."""
    for fd in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", closefd=False) for fd in (1, 2))
    os.chdir(ROOT)
    counter = itertools.count()

    def counted(real):
        def rename(*args, **options):
            if str(workdir) in str(args[0]) and next(counter) == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        return rename

    os.replace, os.rename = counted(os.replace), counted(os.rename)
    KINDS[kind].run(home, workdir)
    pathlib.Path(f"{log}.renames").write_text(str(next(counter)))
    sys.stdout.flush()
    sys.stderr.flush()


class Lab:
    """Starts, kills and resumes one kind of work, and knows what an uninterrupted run of it leaves."""

    def __init__(self, kind, home, rng):
        self.kind, self.home, self.rng, self.count = kind, home, rng, 0
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOAD)
        whole, again = (home / f"{kind}-{name}" for name in ("whole", "again"))
        for workdir in (whole, again):  # the second one finds its programs compiled, as the killed ones do
            began = time.monotonic()
            if said := self.run(workdir):
                raise errors.UserError(f"{kind} does not run: {said}")
            self.life = time.monotonic() - began
        self.renames = int(max(home.glob(f"{kind}-*.renames"), key=os.path.getmtime).read_text())
        self.wanted = KINDS[kind].left(whole)
        if odd := self.difference(again):
            raise errors.UserError(f"{kind}: two uninterrupted runs differ: {odd}")

    def start(self, workdir, last=-1):
        self.count += 1
        self.log = self.home / f"{self.kind}-{self.count}.log"
        process = self.context.Process(target=_child, args=(self.kind, self.home, workdir, str(self.log), last))
        process.start()
        return process

    def run(self, workdir):
        """Runs to the end; what it said last where that was no good end, else None."""
        process = self.start(workdir)
        process.join(600)
        if process.is_alive():
            process.kill()
            return "it did not end within 600 seconds"
        said = [line for line in re.split(r"[\r\n]+", self.log.read_text(errors="replace")) if line.strip()]
        bad = [line for line in said if line.startswith("error:") or "Traceback" in line]
        if process.exitcode == 0 and not bad:
            return None
        return f"{bad[-1]} … {said[-1]}" if bad else f"exit status {process.exitcode}: {said[-1:]}"

    def difference(self, workdir):
        """The first thing that is not as the uninterrupted run left it, or None."""
        try:
            found = KINDS[self.kind].left(workdir)
        except Exception as error:  # whatever is missing or cannot be read is the difference
            return errors.one_line(f"{type(error).__name__}: {error}")[:300]
        odd = [key for key in {**self.wanted, **found} if self.wanted.get(key) != found.get(key)]
        return f"{odd[0]} is {str(found.get(odd[0]))[:120]}, without a kill {str(self.wanted.get(odd[0]))[:120]}" if odd else None

    def kill(self, number):
        """One row: how and when it was killed, where that landed, how often the command was called again, whether all is equal."""
        way, moment = WAYS[number % len(WAYS)], self.rng.random()
        workdir = self.home / f"{self.kind}-{number}"
        process = self.start(workdir, int(moment * self.renames) if way == WAYS[2] else -1)
        process.join(600 if way == WAYS[2] else moment * self.life)
        if way == WAYS[1]:
            while process.exitcode is None and not _half_written(workdir):
                process.join(0.0005)
        process.kill()
        process.join()
        row = {"kind": self.kind, "kill": number, "way": way, "moment": round(moment, 3), "landed": self.landed(process, workdir)}
        for row["resumed"] in range(1, TRIES + 1):
            if (said := self.run(workdir)) is None:
                break
        row["difference"] = said or self.difference(workdir)
        row["left_behind"] = len(_half_written(workdir)) + len(list(workdir.rglob(files.LOCK)))
        row["equal"] = row["difference"] is None
        if row["equal"]:
            shutil.rmtree(workdir)
        return row

    def landed(self, process, workdir):
        if process.exitcode == 0:
            return "after the end"
        if _half_written(workdir):
            return "inside a save"
        return "between saves" if next(workdir.glob(KINDS[self.kind].saved), None) else "before the first save"


def _half_written(workdir):
    """Names in the folder of what is being written; does not go down into finished checkpoints."""
    found = []
    for _, folders, names in os.walk(workdir):
        found += [name for name in (*folders, *names) if any(half in name for half in HALF)]
        folders[:] = [name for name in folders if not name.isdigit() and not any(half in name for half in HALF)]
    return found


def make_home(home):
    """The tiny model and data that everything runs on; the environment of the processes."""
    import numpy as np

    os.environ.update(ENVIRONMENT, FT_JAX_CACHE=str(home / "cache"), JAX_COMPILATION_CACHE_DIR=str(home / "programs"))
    from tests import folders

    folders.make_model_folder(home / "bert")
    folders.write_rows(home / "reviews.jsonl", folders.reviews(np.random.default_rng(0), 60))


def summarised(rows):
    """``{kind: counts}``: kills, how many ended equal, where they landed, what was called again or left behind."""
    out = {}
    for kind in [kind for kind in KINDS if any(row["kind"] == kind for row in rows)]:
        own = [row for row in rows if row["kind"] == kind]
        landed = {where: sum(row["landed"] == where for row in own) for where in dict.fromkeys(row["landed"] for row in own)}
        out[kind] = {"kills": len(own), "equal": sum(row["equal"] for row in own), "landed": landed,
                     "called_again_more_than_once": sum(row["resumed"] > 1 for row in own),
                     "left_behind": sum(row["left_behind"] for row in own)}  # fmt: skip
    return out


def killed(kinds, kills, seed, home, note=lambda rows: None):
    """The rows of all kills; ``note(rows so far)`` after each."""
    rows = []
    with tqdm(total=kills * len(kinds), desc="kills", unit="kill") as bar:
        for kind in kinds:
            bar.set_postfix_str(f"{kind}: uninterrupted")
            lab = Lab(kind, home, random.Random(f"{seed} {kind}"))
            for number in range(kills):
                rows.append(lab.kill(number))
                note(rows)
                bar.update()
                bar.set_postfix_str(f"{kind}: {sum(row['equal'] for row in rows)} of {len(rows)} equal")
    return rows


@errors.cli
def main(argv=None):
    parser = errors.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="kills of each kind (20)")
    parser.add_argument("--only", default="", help=f"regex searched for in {', '.join(KINDS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fuzz", type=int, default=2400, help="cases of damaged files and odd configs (2400; 0: none)")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file for the rows and their summary")
    args = parser.parse_args(argv)
    if args.kills < 0 or args.fuzz < 0:
        raise errors.UserError("--kills and --fuzz are at least 0")
    kinds = [kind for kind in KINDS if re.search(args.only, kind)] if args.kills else []
    if args.kills and not kinds:
        raise errors.UserError(f"--only={args.only!r} names no kind{errors.nearest(args.only, KINDS)}")
    held = files.read_json(args.out) if args.out and args.out.exists() else {"fuzz": None, "rows": []}
    others = [row for row in held["rows"] if row["kind"] not in kinds]  # what this call does not do again is kept

    def note(rows, fuzz=held["fuzz"]):
        made = {"kills": summarised([*others, *rows]), "fuzz": fuzz, "rows": [*others, *rows]}
        if args.out:
            files.write_json(args.out, made)
        return made

    with tempfile.TemporaryDirectory(prefix="reliability-") as home:
        make_home(pathlib.Path(home))
        rows = killed(kinds, args.kills, args.seed, pathlib.Path(home), note)
        made = note(rows)
        if args.fuzz:
            from tests import fuzzing

            made = note(rows, fuzzing.run(pathlib.Path(home), args.fuzz, args.seed))
    print(json.dumps({"kills": made["kills"], "fuzz": made["fuzz"]}, indent=1))
    if any(not row["equal"] for row in made["rows"]) or (made["fuzz"] or {}).get("failed"):
        sys.exit(1)


if __name__ == "__main__":
    main()
