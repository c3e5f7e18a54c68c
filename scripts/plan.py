"""What a training step needs on a TPU pod that is not there: compiles the real step and weighs it.

python scripts/plan.py --model=llama-2-7b --method='lora(rank=16)' --topology=v5e:8x8 --length=4096

Prints bytes a chip and whether they fit, FLOPs, bytes that travel between chips, and bounds on step time and MFU from the
chips' peaks: everything overlapping, and nothing. Needs the libtpu package; without it --topology=cpu:64 partitions the same
step over so many virtual devices, which tells FLOPs and traffic, but no chip's memory.

--table=FILE.json plans every model of TABLE on its pods, those that the file has not yet, and prints the file as Markdown.
"""

import argparse
import json
import os
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from ft_jax import errors

MODELS = ("llama-2-7b", "llama-2-13b", "llama-2-70b", "llama-3-8b", "llama-3-70b", "qwen2.5-7b", "qwen2.5-72b", "mistral-7b")
PODS = {"v5e-64": ("v5e:8x8", 1), "v5e-256": ("v5e:16x16", 1), "v5p, 64 chips": ("v5p:4x4x4", 1), "v6e-256": ("v6e:16x16", 1),
        "2 x v5e-256": ("v5e:16x16", 2)}  # fmt: skip
TABLE = [(model, method, *pod) for model in MODELS for method in ("full", "lora(rank=16)") for pod in PODS.values()]


def arguments(argv=None):
    parser = errors.ArgumentParser(prog="scripts/plan.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-2-7b", help="a name of plan.SHAPES, a folder with config.json, hf:org/name")
    parser.add_argument("--method", default="layers", help="as in configs/train.py: full, layers, lora(rank=16), nf4+lora(rank=16), …")
    parser.add_argument("--topology", default="v5e:16x16", help="v5e:16x16, v5p:4x4x4, v6e:16x16, …; cpu:N")
    parser.add_argument("--slices", type=int, default=1, help="slices of that topology, joined by the data-centre network")
    parser.add_argument("--mesh", default="", help="fsdp=64,tensor=4,sequence=1,data=1; what is left goes to fsdp")
    parser.add_argument("--batch", type=int, default=0, help="sequences in a step; default: one for each share of rows")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a sequence")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--remat", default="full", help="none, dots, full")
    parser.add_argument("--dtype", default="bfloat16", help="of activations and products")
    parser.add_argument("--frozen-dtype", default="bfloat16", help="of frozen matrices")
    parser.add_argument("--out", type=pathlib.Path, help="a file of JSON rows to which this one is added")
    parser.add_argument("--table", type=pathlib.Path, help="a file of JSON rows: plans all of TABLE that it lacks")
    parser.add_argument("--hlo", type=pathlib.Path, help="writes the compiled program's text")
    return parser.parse_args(argv)


def lines(row):
    """What a row says, as text."""
    def size(n):
        return f"{n / 2**30:.2f} GiB"

    kept = f"{size(row['bytes'])} a chip ({size(row['bytes_held'])} held, {size(row['bytes_temporary'])} temporary)"
    fits = {True: f"fits {row.get('chip_bytes', 0) / 1e9:g} GB", False: f"does NOT fit {row.get('chip_bytes', 0) / 1e9:g} GB", None: "virtual devices"}
    yield f"{row['model']} {row['method']} on {row['topology']} x {row['slices']}: mesh {row['mesh']}, {row['tokens']} tokens a step"
    yield f"  parameters {row['parameters'] / 1e9:.2f} G, of which train {row['trainable'] / 1e6:.2f} M; compiled in {row['compile_seconds']:.0f} s"
    yield f"  memory     {kept}: {fits[row['fits']]}"
    yield f"  FLOPs      {row['flops'] / 1e12:.1f} T a chip, {row['model_flops'] / 1e12:.1f} T without what is computed again"
    for r in row["collectives"]:
        yield f"  {'network' if r['across'] else 'links':<10} {r['op']:<18} {size(r['bytes'])} sent by a chip in {r['count']} calls"
    if row["fits"] is not None:
        parts = ", ".join(f"{k} {v:.3f}" for k, v in row["seconds"].items())
        yield f"  step       {row['step_seconds'][0]:.3f} s if all overlaps, {row['step_seconds'][1]:.3f} s if nothing does ({parts}); bound by {row['bound']}"
        yield f"  MFU        at most {row['mfu'][0]:.0%}, {row['mfu'][1]:.0%} without overlap"


def planned(args):
    """The row of one plan."""
    from configs.train import method
    from ft_jax import plan
    from ft_jax.io import files

    model = plan.read_model(args.model)
    found = plan.devices(args.topology, args.slices)
    sizes = plan.mesh_for(args.mesh, len(found), args.slices)
    group, optimizer = method(args.method)
    cfg = plan.config(group, optimizer, name=args.model, batch=args.batch or sizes["data"] * sizes["fsdp"] * args.accumulate, length=args.length,
                      remat=args.remat, dtype=args.dtype, frozen_dtype=args.frozen_dtype, accumulate=args.accumulate, mesh=sizes)  # fmt: skip
    step, started = plan.planned(cfg, model, found), time.perf_counter()
    row = {"model": args.model, "method": args.method, "length": args.length, "remat": args.remat, "dtype": args.dtype,
           "frozen_dtype": args.frozen_dtype}  # fmt: skip
    try:
        program, text = plan.compiled(step)
    except plan.TooLarge as error:
        if not args.table:
            raise
        return row | plan.sizes(step, args.topology) | {"fits": False, "bytes": error.bytes}
    row |= {"compile_seconds": time.perf_counter() - started} | plan.report(step, program, text, args.topology)
    if args.hlo:
        files.write(args.hlo, text.encode())
    return row


def table(args):
    """Plans what the file lacks of TABLE, a row at a time, and prints it all."""
    from tqdm.auto import tqdm

    from ft_jax.io import files

    rows = json.loads(args.table.read_text()) if args.table.exists() else []
    done = {(r["model"], r["method"], r["topology"], r["slices"]) for r in rows}
    for one in tqdm([one for one in TABLE if one not in done], desc="plans", unit="plan"):
        args.model, args.method, args.topology, args.slices = one
        rows.append(planned(args))
        files.write(args.table, json.dumps(rows, indent=1).encode() + b"\n")
    print("\n".join(markdown(rows)))


def markdown(rows):
    names = {pod: name for name, pod in PODS.items()}
    yield "| model | method | pod | tokens a step | GiB a chip | fits | TFLOP a chip | sent by a chip, GiB | step, s | MFU | bound by |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for r in rows:
        size = f"{r['bytes'] / 2**30:.1f}" if r["bytes"] else "?"
        cells = [r["model"], f"`{r['method']}`", names[r["topology"], r["slices"]], f"{r['tokens']:,}", size, "yes" if r["fits"] else "**no**",
                 f"{r['flops'] / 1e12:.0f}"]  # fmt: skip
        if "step_seconds" in r:
            sent = f"{r['collective_bytes'] / 2**30:.0f}" + (f" + {r['network_bytes'] / 2**30:.1f}" if r["network_bytes"] else "")
            cells += [sent, "–".join(f"{t:.1f}" for t in r["step_seconds"]), "–".join(f"{m:.0%}" for m in reversed(r["mfu"])), r["bound"]]
        yield f"| {' | '.join(cells + [''] * (11 - len(cells)))} |"


def main(argv=None):
    args = arguments(argv)
    kind, _, count = args.topology.partition(":")
    if kind == "cpu":
        if not count.isdecimal() or not int(count):
            raise errors.UserError(f"--topology={args.topology!r}: give the number of virtual devices, as cpu:64")
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={int(count) * args.slices}"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the topology's compiler is asked for by name, and no device is opened
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # for the same reason: plans may be made beside each other
    if args.table:
        return table(args)
    row = planned(args)
    print("\n".join(lines(row)))
    if args.out:
        from ft_jax.io import files

        rows = json.loads(args.out.read_text()) if args.out.exists() else []
        files.write(args.out, json.dumps([*rows, row], indent=1).encode() + b"\n")


if __name__ == "__main__":
    errors.cli(main)()
