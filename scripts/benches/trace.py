"""Where a training step's time goes: the operations of the compiled step by kind, from the profiler's trace of it."""

import collections
import glob
import gzip
import json
import re
import tempfile

import jax
import numpy as np

from scripts.benches import ours

# Regex on an instruction's name in the compiled program -> kind; the first that is found.
KINDS = (
    (r"^(while|call|conditional|tuple|get-tuple-element)\b", None),  # made of others
    (r"ynn_fusion|dot|gemm|matmul", "matrix products"),
    (r"dynamic-update-slice", "writes into stacks of layers"),
    (r"dynamic-slice", "reads from stacks of layers"),
    (r"^(wrapped_)?broadcast", "zeros that stacks begin with"),
    (r"copy|transpose", "copies, turned or not"),
    (r"", "elementwise work and sums"),
)


def rows(shape="smollm2-135m", layers=None, repeats=3, batch=4, length=128):
    """Milliseconds of each kind, a row a method and kind; of operations that ran at once each counts its share."""
    for method in ("lora", "full"):
        spec = {"sizes": ours.sizes_of(shape, layers), "method": method, "batch": batch, "length": length}
        found = [_kinds(events) for events in _traced(spec, repeats)]
        for kind in [k for _, k in KINDS if k] + ["nothing runs"]:
            yield {"name": f"{method} {batch}x{length}, {kind}", "ours": [f[kind] for f in found], "peer": [], "peer_name": "none", "unit": "ms"}


def _traced(spec, repeats):
    """``[(begin, end, kind)]`` in microseconds of each of ``repeats`` steps."""
    run, state, frozen = ours.engine(spec)
    ids = ours.tokens(spec)
    batch = jax.device_put({"input_ids": ids, "attention_mask": np.ones_like(ids), "loss_mask": np.ones_like(ids)})
    step = run.lower(state, frozen, batch).compile()
    names = set(re.findall(r"^\s*(?:ROOT )?%?([\w.\-]+) = ", step.as_text(), re.MULTILINE))
    state = jax.block_until_ready(step(state, frozen, batch)[0])
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder, profiler_options=options):
                state = jax.block_until_ready(step(state, frozen, batch)[0])
            (file,) = glob.glob(f"{folder}/**/*.trace.json.gz", recursive=True)
            with gzip.open(file) as held:
                events = [e for e in json.load(held)["traceEvents"] if e.get("ph") == "X" and e["name"] in names]
        yield [(e["ts"], e["ts"] + e["dur"], kind) for e in events if (kind := _kind(e["name"]))]


def _kind(name):
    return next(kind for pattern, kind in KINDS if re.search(pattern, name))


def _kinds(events):
    """``{kind: milliseconds}``: at each moment the time is shared out among what runs."""
    found, running, last = collections.Counter(), collections.Counter(), None
    for moment, change, kind in sorted([(b, 1, k) for b, _, k in events] + [(e, -1, k) for _, e, k in events]):
        if last is not None:
            total = running.total()
            for other, count in running.items() if total else [("nothing runs", 1)]:
                found[other] += (moment - last) * count / max(total, 1) / 1000
        running[kind] += change
        last = moment
    return found
