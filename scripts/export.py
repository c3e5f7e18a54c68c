"""Writes what a run trained as a merged Hugging Face model or as a PEFT LoRA adapter.

python scripts/export.py --workdir=RUN --format=merged|peft --out=DIR
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl import app, flags

from ft_jax.errors import UserError, cli
from ft_jax.io import hf, peft, runs

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_FORMAT = flags.DEFINE_enum("format", "merged", ["merged", "peft"], "A whole model, or the adapter alone.")
_OUT = flags.DEFINE_string("out", None, "Folder to write.")
_WHICH = flags.DEFINE_enum("which", "best", ["best", "last"], "Which checkpoint of the run.")


def export(workdir, form, out, which="best"):
    """Loads the run and writes it under ``out``; the base's tokenizer files go with a merged model."""
    if pathlib.Path(out).resolve() == pathlib.Path(workdir).resolve():
        raise UserError(f"--out is the run's own folder {out}; name another one")
    model, params, recipe = runs.load_run(workdir, which)
    spec = recipe["model"]["path"]
    if form == "merged":
        hf.save(out, model, params, source=hf.resolve(spec))
    else:
        _, base = hf.load(spec, head=model.config.head, num_labels=model.config.num_labels)
        used = [rule for _, rule in recipe["method"].get("kernels") or ()]
        peft.save_adapter(out, model, params, spec, base=base, use_rslora=any("rslora" in rule for rule in used))
    print(f"wrote {out}")


def main(argv):
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; options are written --name=value")
    export(_WORKDIR.value, _FORMAT.value, _OUT.value, _WHICH.value)


if __name__ == "__main__":
    flags.mark_flags_as_required(["workdir", "out"])
    app.run(cli(main))
