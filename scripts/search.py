"""Searches configurations for few weights and a good score: ``python scripts/search.py --config=… --space=… --workdir=…``.

``--space`` is a JSON file, see ft_jax/search.py and configs/spaces/; the same command resumes, with more ``--trials`` it goes on.
``--tree`` in its place is one that is searched downwards by what is learnt and forgotten, see ft_jax/tree_search.py.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import logging

from ft_jax import search, tree_search
from ft_jax.errors import ArgumentParser, UserError, cli
from ft_jax.io import files


@cli
def main(argv=None):
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="config file with its options after a colon, without method")
    parser.add_argument("--space", help="JSON file of parameters and settings")
    parser.add_argument("--tree", help="JSON file of a tree of places to train")
    parser.add_argument("--workdir", required=True, help="folder of the search; the same command resumes it")
    parser.add_argument("--trials", type=int, default=20, help="how many trials in all")
    parser.add_argument("--sampler", default="tpe", help=", ".join(search.SAMPLERS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    logging.set_verbosity(logging.FATAL)  # orbax logs every error that it also raises
    if bool(args.space) == bool(args.tree):
        raise UserError("give one of --space and --tree")
    if args.tree:
        if odd := [n for n in ("trials", "sampler", "seed") if getattr(args, n) != parser.get_default(n)]:
            raise UserError(f"--{odd[0]} is for --space: a tree is visited in its own order")
        rows = tree_search.search_tree(args.config, files.read_json(args.tree), args.workdir)
        print(json.dumps({"nodes": len(rows), "page": str(Path(args.workdir) / "index.html"),
                          "chosen": files.read_json(Path(args.workdir) / "chosen.json")["path"]}, indent=1))  # fmt: skip
        return
    space = files.read_json(args.space)
    rows = search.search(args.config, space, args.workdir, trials=args.trials, sampler=args.sampler, seed=args.seed)
    print(json.dumps({"trials": len(rows), "page": str(Path(args.workdir) / "index.html"),
                      "pareto": files.read_json(Path(args.workdir) / "pareto.json")["trials"]}, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
