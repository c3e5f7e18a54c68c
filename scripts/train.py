"""Fine-tunes a model: ``python scripts/train.py --config=configs/train.py:model=…,data=…,method=… --workdir=…``."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import app, flags
from ml_collections import config_flags

from ft_jax import train
from ft_jax.errors import UserError, cli

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, with its options after a colon.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; the same command resumes it.")


def main(argv):
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; options are written --name=value")
    summary = train.train(_CONFIG.value, _WORKDIR.value)
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(cli(main))
