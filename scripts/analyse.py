"""The spectral report of two Hugging Face checkpoints of one architecture.

python scripts/analyse.py --base=DIR --tuned=DIR --out=DIR [--k=10 --eps=0.5 --include=REGEX --exclude=REGEX]

Writes spectral.json and spectral.html. A folder, a .gguf file, hf:org/name or a bundled model's name is taken.
The same command goes on where a stopped one left off.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from ft_jax import errors
from ft_jax.analysis import compare, report, spectral_page
from ft_jax.io import hf


def _folder(spec):
    path = pathlib.Path(spec)
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise errors.UserError(f"{spec}: is an adapter, not a model; merge it into its base and export that first")
    return hf.resolve(spec)


def _arguments(argv):
    parser = errors.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="the pretrained model")
    parser.add_argument("--tuned", required=True, help="the fine-tuned model")
    parser.add_argument("--out", required=True, help="folder for spectral.json and spectral.html")
    parser.add_argument("--k", type=int, default=10, help="leading directions of each matrix (10)")
    parser.add_argument("--eps", type=float, default=0.5, help="cosine under which a direction is an intruder (0.5)")
    parser.add_argument("--include", help="regex searched for in tensor names: only these")
    parser.add_argument("--exclude", default=compare.EXCLUDE, help="regex of names to skip (embeddings and heads)")
    return parser.parse_args(argv)


@errors.cli
def main(argv=None):
    args = _arguments(argv)
    result = compare.compare(
        _folder(args.base), _folder(args.tuned), args.out,
        k=args.k, eps=args.eps, include=args.include, exclude=args.exclude)
    page = pathlib.Path(args.out) / "spectral.html"
    report.write(page, spectral_page.render(result))
    print(f"{len(result['matrices'])} matrices, {result['total_intruders']} intruders (k = {args.k}, ε = {args.eps})")
    for why, count in result["skipped_counts"].items():
        print(f"skipped {count}: {why}")
    print(f"{page}\n{page.with_name('spectral.json')}")


if __name__ == "__main__":
    main()
