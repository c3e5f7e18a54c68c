"""Fine-tunes a model: ``python scripts/train.py --config=configs/train.py:model=…,data=…,method=… --workdir=…``.

With ``--distributed`` it is one process of a cluster (TPU pod, SLURM, GKE: docs/scale.md); each runs the same command.
"""

import contextlib
import json
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import app, flags, logging
from ml_collections import config_flags

from ft_jax import parallel, train, tree
from ft_jax.data import pipeline
from ft_jax.errors import Stopped, UserError, cli, nearest, one_line
from ft_jax.io import files

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, with its options after a colon.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; the same command resumes it.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the other processes of a cluster before anything else.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0; found out on TPUs and under SLURM.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are; found out likewise.")
_STOPPED_STATUS = flags.DEFINE_integer("stopped_status", 0, "Exit status after SIGTERM, when what was trained is saved.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "This process's number, from 0; found out likewise.")


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
    cluster = (_COORDINATOR, _NUM_PROCESSES, _PROCESS_ID)
    if given := [flag.name for flag in cluster if flag.value is not None and not _DISTRIBUTED.value]:
        raise UserError(f"--{given[0]} is for a cluster; add --distributed")
    files.local(_WORKDIR.value)  # before it waits for other processes
    silent = _DISTRIBUTED.value and parallel.join_cluster(*(flag.value for flag in cluster)) > 0
    try:
        with _no_progress() if silent else contextlib.nullcontext():
            summary = train.train(_CONFIG.value, _WORKDIR.value)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(_STOPPED_STATUS.value)
    except Exception as error:
        if not (_DISTRIBUTED.value and parallel.lost(error)):
            raise
        print(f"error: another process of this run was lost ({one_line(error)[:160]}); what was saved is intact: start all of them "
              "again, and they go on from there", file=sys.stderr, flush=True)  # fmt: skip
        os._exit(1)  # at a usual end JAX waits for the lost one
    if not silent:
        print(json.dumps(summary, indent=1))


@contextlib.contextmanager
def _no_progress():
    """Bars and notes go nowhere: process 0 shows them. What is raised passes, to be told by each process."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


if __name__ == "__main__":
    cli(app.run)(main, flags_parser=parse)
