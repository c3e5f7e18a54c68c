"""Benchmarks against peers, ours and the peer in turn within one run.

python scripts/bench.py [--only=REGEX --out=FILE --table=FOLDER --repeats=3 --layers=N --shape=NAME --dtype=float32]

Prints a table and writes JSON rows {benchmark, ours, peer, peer_name, ratio, spread, unit, machine}: medians over the
repeats, ratio above 1: ours is that many times as fast, or takes that many times less; spread = (largest - smallest) / median
of [ours, peer]. --layers runs that many layers of the benchmarks that have layers; the spectral ones then say what all would
take. Peers are those that are installed (requirements-bench.txt); FT_JAX_BENCH_PYTHON may name another Python that has Tunix.
"""

import argparse
import json
import os
import pathlib
import platform
import re
import statistics
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from ft_jax import errors, models, plan
from ft_jax.io import files


def _spectral(args):
    from scripts.benches import spectra

    return spectra.roberta(repeats=args.repeats, **_given(layers=args.layers))


def _spectral_7b(args):
    from scripts.benches import spectra

    return spectra.llama(**_given(layers=args.layers))


def _population(args):
    from scripts.benches import population

    for shape in population.SHAPES:
        for row in population.rows(shape, rounds=args.repeats):
            yield {"name": f"{shape}, {row['what']}", **row["samples"], "unit": row["unit"], "peer_name": "the same runs one after the other"}


def _train(method, batch, length):
    def rows(args):
        from scripts.benches import steps

        return steps.rows(method, batch, length, args.shape, args.dtype, args.repeats, args.layers)

    return rows


def _memory(args):
    from scripts.benches import memory

    return memory.rows(args.shape, args.layers, args.dtype)


def _bank(args):
    from scripts.benches import serving

    return serving.bank(args.shape, args.layers, args.repeats)


def _generation(args):
    from scripts.benches import serving

    return serving.generation(args.shape, args.layers, args.repeats)


def _data(args):
    from scripts.benches import datapath

    return datapath.rows(args.shape, args.layers, args.repeats)


def _trace(args):
    from scripts.benches import trace

    return trace.rows(args.shape, args.layers, args.repeats)


# name -> function of the arguments that yields rows {name, ours, peer, peer_name, unit}: ours and peer are samples,
# an empty peer has none; of units a second, more is better. Imports stand inside, so that --only pays for what it runs.
BENCHES = {
    "train_lora": _train("lora", 4, 128), "train_full": _train("full", 4, 128),
    "train_lora_8x256": _train("lora", 8, 256), "train_full_8x256": _train("full", 8, 256),
    "generation": _generation, "bank": _bank, "memory": _memory, "data": _data, "trace": _trace,
    "spectral": _spectral, "spectral_7b": _spectral_7b, "population": _population,
}  # fmt: skip


def _given(**options):
    return {name: value for name, value in options.items() if value is not None}


def machine():
    """The class of this machine: cores, processor, system."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text("utf-8")
        model = re.search(r"model name\s*:\s*(.*)", text)[1]
    except (OSError, TypeError):
        model = platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores, {model}, {platform.system()} {platform.machine()}, Python {platform.python_version()}"


def _spread(samples):
    return (max(samples) - min(samples)) / statistics.median(samples) if len(samples) > 1 else None


def summarised(benchmark, row):
    """One JSON row from the samples of ours and the peer."""
    ours, peer = statistics.median(row["ours"]), statistics.median(row["peer"]) if row["peer"] else None
    ratio = (ours / peer if row["unit"].endswith("/s") else peer / ours) if peer else None
    return {"benchmark": f"{benchmark}: {row['name']}", "ours": ours, "peer": peer, "peer_name": row["peer_name"], "ratio": ratio,
            "spread": [_spread(row["ours"]), _spread(row["peer"] or [0.0])], "unit": row["unit"], "machine": machine()}  # fmt: skip


def _line(row):
    ratio = f"{row['ratio']:8.2f}" if row["ratio"] else "       -"
    peer = f"{row['peer']:10.3f}" if row["peer"] else "         -"
    return f"{row['benchmark']:<78} {row['ours']:10.3f} {peer} {ratio} {_spreads(row):>9} {row['unit']:<9} {row['peer_name']}"


def _spreads(row, between="/"):
    return between.join("-" if s is None else f"{s:.0%}" for s in row["spread"])


def _table(folder, pattern):
    """The rows in the JSON files of a folder, whose names ``pattern`` is found in, as Markdown."""
    print("| benchmark | ours | peer | | ratio | spread |\n|---|---|---|---|---|---|")
    for file in sorted(folder.glob("*.json")):
        for row in json.loads(file.read_text("utf-8")) if re.search(pattern, file.stem) else ():
            peer = f" {row['peer']:.4g} | {row['peer_name']} | {row['ratio']:.2f} |" if row["peer"] else " | | |"
            print(f"| {row['benchmark']} | {row['ours']:.4g} {row['unit']} |{peer} {_spreads(row, ' / ')} |")


def run(chosen, args):
    """Rows of the benchmarks, printed as they come; the file holds those done so far."""
    rows = []
    print(f"{machine()}\n{'benchmark':<78} {'ours':>10} {'peer':>10} {'ratio':>8} {'spread':>9} {'unit':<9} peer")
    for name in chosen:
        for row in BENCHES[name](args):
            rows.append(summarised(name, row))
            print(_line(rows[-1]), flush=True)
            if args.out:
                files.write_json(args.out, rows)
    return rows


def _chosen(pattern):
    try:
        found = [name for name in BENCHES if re.search(pattern, name)]
    except re.error as error:
        raise errors.UserError(f"--only={pattern!r} is not a regular expression: {error}") from None
    if not found:
        raise errors.UserError(f"--only={pattern!r} names no benchmark{errors.nearest(pattern, BENCHES)}")
    return found


@errors.cli
def main(argv=None):
    parser = errors.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"regex searched for in {', '.join(BENCHES)}")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file for the rows")
    parser.add_argument("--table", type=pathlib.Path, help="measures nothing: a folder of such files as a Markdown table")
    parser.add_argument("--repeats", type=int, default=3, help="times that ours and the peer take turns (3)")
    parser.add_argument("--layers", type=int, help="layers of the model shapes that are run (all)")
    parser.add_argument("--shape", default="smollm2-135m", help=f"model of those of models (smollm2-135m): {', '.join(plan.SHAPES)}")
    parser.add_argument("--dtype", default="float32", choices=sorted(models.DTYPES), help="of activations and products of train and memory")
    args = parser.parse_args(argv)
    if args.shape not in plan.SHAPES:
        raise errors.UserError(f"no model shape called {args.shape!r}{errors.nearest(args.shape, plan.SHAPES)}")
    for name in ("repeats", "layers"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise errors.UserError(f"--{name}={value}: at least 1")
    chosen = _chosen(args.only)
    if args.table:
        return _table(args.table, args.only)
    if args.out:
        files.make_folder(args.out.resolve().parent)
    run(chosen, args)


if __name__ == "__main__":
    main()
