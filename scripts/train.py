"""Fine-tunes a model: ``python scripts/train.py --config=configs/train.py:model=…,data=…,method=… --workdir=…``."""

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import app, flags, logging
from ml_collections import config_flags

from ft_jax import train, tree
from ft_jax.data import pipeline
from ft_jax.errors import UserError, cli, nearest, one_line

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, with its options after a colon.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; the same command resumes it.")


def parse(argv):
    """absl's parser with one-line errors that name the key and the nearest right one."""
    known = tree.flatten({**train.DEFAULTS, "data": pipeline.DEFAULTS}, is_leaf=lambda x: not isinstance(x, dict))
    keys = [path.replace("/", ".") for path in known]
    for arg in argv[1:]:
        if arg.startswith("--config=") and not (file := Path(arg.removeprefix("--config=").partition(":")[0])).is_file():
            raise UserError(f"no config file {str(file)!r}{nearest(file, sorted(map(str, file.parent.glob('*.py'))))}")
        found = re.match(r"--config\.([\w.]+)", arg)
        if found and found.group(1) not in keys and not re.match(r"(optimizer\.hp|data\.splits)\.", found.group(1)):
            raise UserError(f"unknown config key {found.group(1)!r}{nearest(found.group(1), keys)}")
    try:
        return flags.FLAGS(argv)
    except (flags.Error, KeyError, AttributeError, ValueError, TypeError) as error:
        raise UserError(one_line(error)) from None


def main(argv):
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; options are written --name=value")
    logging.set_verbosity(logging.FATAL)  # orbax logs every error that it also raises
    for flag in (_CONFIG, _WORKDIR):
        if flag.value is None:
            raise UserError(f"--{flag.name} is missing")
    print(json.dumps(train.train(_CONFIG.value, _WORKDIR.value), indent=1))


if __name__ == "__main__":
    cli(app.run)(main, flags_parser=parse)
