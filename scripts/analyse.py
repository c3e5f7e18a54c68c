"""The spectral report of two Hugging Face checkpoints of one architecture, or of a base and its PEFT adapter.

python scripts/analyse.py --base=DIR --tuned=DIR --out=DIR [--k=10 --eps=0.5 --include=REGEX --exclude=REGEX]
python scripts/analyse.py --base=DIR --tuned=DIR --out=DIR --repair[=0.7] [--control=neighbour|shrink --which=all]
                          [--task=SOURCE --text=SOURCE]

Writes spectral.json and spectral.html. A folder, a .gguf file, hf:org/name or a bundled model's name is taken.
--repair scales the top intruder of every matrix that has one and writes DIR/repaired (a model, or an adapter of the
same rank) and repair.json with the numbers before and after. The same command goes on where a stopped one left off.
"""

import argparse
import functools
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from ft_jax import errors
from ft_jax.analysis import compare, report, spectral_page
from ft_jax.errors import UserError
from ft_jax.io import adapted, files, hf
from ft_jax.weights import repair, repair_files

DATA = "data source as in configs/train.py, or a JSON object of data settings with it"


def _sources(args):
    """``(base folder, tuned folder or base with adapter)``."""
    if adapted.is_adapter(args.base):
        raise UserError(f"{args.base}: is an adapter, not a model; --base is the model that it was trained on")
    base, tuned = hf.resolve(args.base), pathlib.Path(args.tuned)
    if not adapted.is_adapter(tuned):
        tuned = hf.resolve(args.tuned)
    return base, adapted.Adapted(base, tuned) if adapted.is_adapter(tuned) else tuned


def _arguments(argv):
    parser = errors.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="the pretrained model")
    parser.add_argument("--tuned", required=True, help="the fine-tuned model, or a PEFT LoRA adapter for the base")
    parser.add_argument("--out", required=True, help="folder for spectral.json and spectral.html")
    parser.add_argument("--k", type=int, default=10, help="leading directions of each matrix (10)")
    parser.add_argument("--eps", type=float, default=0.5, help="cosine under which a direction is an intruder (0.5)")
    parser.add_argument("--include", help="regex searched for in tensor names: only these")
    parser.add_argument("--exclude", default=compare.EXCLUDE, help="regex of names to skip (embeddings and heads)")
    parser.add_argument("--engine", choices=compare.ENGINES, default="auto", help="how top directions are found: counts "
                        "are the same (auto: exact when tiny, fast up to 2048, certified above)")  # fmt: skip
    parser.add_argument("--effective-rank", action="store_true", help="effective rank also where it takes a full "
                        "factorisation of a large matrix")  # fmt: skip
    parser.add_argument("--repair", type=float, nargs="?", const=0.7, metavar="FACTOR",
                        help="write a mended checkpoint: the top intruders times FACTOR (0.7)")  # fmt: skip
    parser.add_argument("--control", choices=repair.CONTROLS, default="none", help="scale in the intruder's place: the "
                        "pretrained direction beside it, or the whole change, by as large a norm")  # fmt: skip
    parser.add_argument("--which", choices=repair.WHICH, default="top", help="the top intruder of a matrix (top) or all")
    parser.add_argument("--task", help=f"measure this task before and after: {DATA}")
    parser.add_argument("--text", help=f"measure forgetting on this text (language models): {DATA}")
    args = parser.parse_args(argv)
    if args.repair is None:
        given = [f"--{name}" for name in ("control", "which", "task", "text")
                 if getattr(args, name) != parser.get_default(name)]  # fmt: skip
        if given:
            raise UserError(f"{given[0]} belongs to a repair; add --repair")
    else:
        repair.check(args.repair, args.control, args.which)
    return args


def _repair(args, base, tuned, result, how, asked, measure):
    """The content of repair.json, with what ``measure`` finds before and after where something was asked."""
    found = repair_files.run(base, tuned, result, args.out, factor=args.repair, control=args.control, which=args.which, **how)
    if asked and found.get("asked") != asked:
        measured = measure({"base": base, "before": tuned, "after": repair_files.target(tuned, args.out)})
        found |= {"asked": asked, "measured": measured}
        files.write_json(pathlib.Path(args.out) / "repair.json", found)
    return found


def _print_repair(found):
    before, after = found["before"], found["after"]
    print(f"repaired {found['mended']} of {found['matrices']} matrices: intruders {before['intruders']} → "
          f"{after['intruders']}, ‖ΔW‖ {before['delta_norm']:.4g} → {after['delta_norm']:.4g}")
    if before["effective_rank"] is not None:
        print(f"mean effective rank of ΔW {before['effective_rank']:.3g} → {after['effective_rank']:.3g}")
    if found["kind"] == "adapter":
        print(f"the adapter kept its rank, which loses at most {found['lost']:.2%} of a matrix's mended change")
    for note in found["notes"]:
        print(note)
    for name, row in found.get("measured", {}).items():
        for key in ("accuracy", "loss", "perplexity"):
            if key in row["before"]:
                base = f" (base {row['base'][key]:.4f})" if "base" in row else ""
                print(f"{name} {row['source']}: {key} {row['before'][key]:.4f} → {row['after'][key]:.4f}{base}")
    print(found["folder"])


@errors.cli
def main(argv=None):
    args = _arguments(argv)
    base, tuned = _sources(args)
    measure = found = None
    asked = {name: getattr(args, name) for name in ("task", "text") if getattr(args, name)}
    if args.repair is not None:
        repair_files.target(tuned, args.out)
        compare.plan(base, tuned, args.include, args.exclude)  # what does not fit is said before any data is read
    if asked:
        from ft_jax import evaluate  # brings the models and the data pipeline, which spectra do without

        measure = functools.partial(evaluate.measure, evaluate.plan(base, tuned, asked))
    how = {"include": args.include, "exclude": args.exclude, "engine": args.engine, "effective_rank": args.effective_rank}
    result = compare.compare(base, tuned, args.out, k=args.k, eps=args.eps, **how)
    print(f"{len(result['matrices'])} matrices, {result['total_intruders']} intruders (k = {args.k}, ε = {args.eps})")
    for why, count in result["skipped_counts"].items():
        print(f"skipped {count}: {why}")
    if args.repair is not None:
        found = _repair(args, base, tuned, result, how, asked, measure)
        _print_repair(found)
    page = pathlib.Path(args.out) / "spectral.html"
    report.write(page, spectral_page.render(result, found))
    print(f"{page}\n{page.with_name('spectral.json')}")


if __name__ == "__main__":
    main()
