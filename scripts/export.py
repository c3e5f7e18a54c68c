"""Writes what a run trained as a merged Hugging Face model or as a PEFT LoRA adapter.

python scripts/export.py --workdir=RUN --format=merged|peft --out=DIR
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from ft_jax import errors
from ft_jax.errors import UserError
from ft_jax.io import hf, peft, runs


def export(workdir, form, out, which="best"):
    """Loads the run and writes it under ``out``; the base's tokenizer files go with a merged model."""
    if pathlib.Path(out).resolve() == pathlib.Path(workdir).resolve():
        raise UserError(f"--out is the run's own folder {out}; name another one")
    model, params, recipe = runs.load_run(workdir, which)
    spec = recipe["model"]["path"]
    if form == "merged":
        hf.save(out, model, params, source=hf.resolve(spec))
    else:
        _, base = hf.load(spec, head=model.config.head, num_labels=model.config.num_labels, label_ids=model.config.label_ids)
        used = [rule for _, rule in recipe["method"].get("kernels") or ()]
        peft.save_adapter(out, model, params, spec, base=base, use_rslora=any("rslora" in rule for rule in used))
    print(f"wrote {out}")


@errors.cli
def main(argv=None):
    parser = errors.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", required=True, help="folder of the run")
    parser.add_argument("--format", choices=("merged", "peft"), default="merged", help="a whole model, or the adapter alone")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--which", choices=("best", "last"), default="best", help="checkpoint of the run (best)")
    args = parser.parse_args(argv)
    export(args.workdir, args.format, args.out, args.which)


if __name__ == "__main__":
    main()
