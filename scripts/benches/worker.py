"""One side of a benchmark in a process of its own that answers over a pipe.

So sides take turns step by step, none finds another's threads or caches, and each has a peak of memory of its own. A side
may run in another Python (`python_of`), where all that this file imports is the standard library.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import pathlib
import re
import resource
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
VARIABLE = "FT_JAX_BENCH_PYTHON"


class Worker:
    """``side``, ``module:function`` of `scripts.benches`, started with ``spec``; ``facts`` is what it said of itself.

    The function takes the spec and returns ``(facts, step)``; ``step()`` returns what was found, both JSON-able.
    Raises RuntimeError with the end of what it wrote where the side fails.
    """

    def __init__(self, side, spec, python=None):
        self.side, self.log = side, tempfile.TemporaryFile()  # noqa: SIM115 (close has it)
        environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen([python or sys.executable, __file__, side, json.dumps(spec)], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment)  # fmt: skip
        self.facts = self._read()

    def step(self):
        """``{"seconds", "cpu_seconds", "peak_bytes", …}`` of one step; the peak is of all since the side was set up."""
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self):
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.process.wait()
        self.log.seek(0)
        said = self.log.read().decode(errors="replace").strip().splitlines()
        self.close()
        raise RuntimeError(f"{self.side} ended with status {self.process.returncode}: " + "\n".join(said[-12:]))

    def close(self):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()
        self.log.close()


def python_of(package):
    """A Python that has ``package``: this one, or the one that FT_JAX_BENCH_PYTHON names; None without."""
    for python in (sys.executable, os.environ.get(VARIABLE)):
        find = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
        if python and subprocess.run([python, "-c", find], check=False).returncode == 0:
            return python
    return None


def missing(package):
    """One line about a peer that is left out."""
    return f"{package} is not installed, so its rows are left out: requirements-bench.txt; {VARIABLE} may name a Python that has it"


@contextlib.contextmanager
def started(sides):
    """``{name: Worker}`` of ``{name: (side, spec, python)}``, closed at the end."""
    with contextlib.ExitStack() as stack:
        workers = {}
        for name, (side, spec, python) in sides.items():
            workers[name] = Worker(side, spec, python)
            stack.callback(workers[name].close)
        yield workers


def in_turn(workers, repeats):
    """``({name: first step}, {name: [the steps after it]})``: the first compiles, the others take turns."""
    first = {name: worker.step() for name, worker in workers.items()}
    steps = {name: [] for name in workers}
    for _ in range(repeats):
        for name, worker in workers.items():
            steps[name].append(worker.step())
    return first, steps


def _forget_peak():
    """Counts the peak of memory from here, with what was read to get here given back."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5", "ascii")


def peak_bytes():
    """The peak of resident memory of this process; Linux hands ru_maxrss on through exec, so it is only the second choice."""
    with contextlib.suppress(OSError, TypeError):
        return int(re.search(r"VmHWM:\s*(\d+) kB", pathlib.Path("/proc/self/status").read_text("ascii"))[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _timed(step):
    wall, cpu = time.perf_counter(), time.process_time()
    found = step()
    seconds = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    return {"peak_bytes": peak_bytes()} | found | seconds


def main(side, spec):
    """The process of a side: its facts, then a line of JSON for every line that comes in."""
    answers, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr
    os.dup2(2, 1)  # what libraries print is no answer
    sys.path[0] = str(ROOT)
    module, function = side.split(":")
    facts, step = getattr(importlib.import_module(f"scripts.benches.{module}"), function)(json.loads(spec))
    _forget_peak()
    answers.write(json.dumps(facts) + "\n")
    answers.flush()
    for _ in sys.stdin:
        answers.write(json.dumps(_timed(step)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
