"""``python -m experiments.run STUDY [--scale=smoke|cpu|full]`` runs or resumes a study; ``--list`` shows all of them.

What is done is kept: a second call goes on where the first one stopped, and one failed part does not lose the others.
"""

import importlib
import sys
from collections import Counter
from pathlib import Path

from experiments import study as shared
from experiments.demo.settings import SETTINGS, default_workdir
from ft_jax.errors import UserError, cli, nearest


def names():
    """Every folder of ``experiments/`` that holds a study."""
    return sorted(p.parent.name for p in Path(__file__).parent.glob("*/study.py"))


def load(name):
    if name not in names():
        raise UserError(f"no study called {name!r}{nearest(name, names())}")
    return importlib.import_module(f"experiments.{name}.study").STUDY


def listing():
    """Lines: each study, its question, and for each scale how many parts are done, failed, to do."""
    lines = _demo()
    for study in map(load, names()):
        lines.append(f"{study.name}: {study.question}")
        for scale in study.scales:
            found = shared.status(study, scale)
            counts = Counter(found.values())
            said = [f"{counts['done']} of {len(found)} parts done"]
            if counts["failed"]:
                said.append("failed: " + ", ".join(n for n, s in found.items() if s == "failed"))
            if (Path(__file__).parent / study.name / "results" / scale / "summary.json").exists():
                said.append(f"results in experiments/{study.name}/results/{scale}")
            lines.append(f"  {scale:<6} {'; '.join(said)}")
    return lines


def _demo():
    """The demo has a command of its own and keeps its parts in a folder of its own."""
    lines = ["demo: what do full fine-tuning and LoRA each do to the weights? (bash scripts/demo.sh --model=NAME)"]
    for model in SETTINGS:
        parts = len(list(default_workdir(model).glob("parts/*.json")))
        said = "done" if (default_workdir(model) / "summary.json").exists() else f"{parts} parts done"
        lines.append(f"  {model:<8} {said}; results in experiments/demo/results/{model}")
    return lines


def main(argv=None):
    args = shared.arguments("experiments.run", __doc__, argv)
    if args.list or not args.study:
        print("\n".join(listing()))
        return
    study = load(args.study)
    shared.quiet()
    if args.publish:
        print(f"{shared.publish(study, args.scale, args.workdir)} holds the results")
        return
    if args.restore:
        print(f"restored: {', '.join(shared.restore(study, args.scale, args.workdir)) or 'nothing that was missing'}")
    failed = shared.run(study, args.scale, args.workdir, args.only)
    folder = args.workdir or shared.default_workdir(study, args.scale)
    print(f"{folder}/report.html and {folder}/summary.json are ready")
    if failed:
        print(f"failed: {', '.join(failed)}; the same command tries them again", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    cli(main)()
