"""A training step of ours against torch with PEFT and against Tunix: seconds, memory and compilation, a process a side."""

import tempfile

from ft_jax.errors import UserError
from scripts.benches import ours, worker

ROPE = 1e6  # what Tunix 0.1.7's Llama rotates by whatever its config says, so that all sides have one loss
CLOSE = 1e-3  # how far the sides' losses may be apart
GIB = 2**30


def sides(spec):
    """``({name: (side, spec, python)}, [one line for each peer that is missing])``."""
    found, lines = {"ours": ("ours:train_step", spec, None)}, []
    peers = {"torch": ("peft" if spec["method"] == "lora" else "transformers", "peers:torch_step")}
    if spec.get("dtype", "float32") == "float32":  # in bfloat16 it has no float32 weights to step, which is less work
        peers["tunix"] = ("tunix", "peers:tunix_step")
    for name, (package, side) in peers.items():
        python = worker.python_of(package)
        if python:
            found[name] = (side, spec, python)
        else:
            lines.append(worker.missing(package))
    return found, lines


def check(spec, facts, first, steps):
    """RuntimeError where the sides do not train as many weights of as many, or their losses differ by CLOSE."""
    for name in facts:
        for what in ("parameters", "trainable"):
            if facts[name][what] != facts["ours"][what]:
                raise RuntimeError(f"{name} has {facts[name][what]} {what}, ours {facts['ours'][what]}")
    for name in facts:
        pairs = [(first[name]["loss"], first["ours"]["loss"])]
        if spec["method"] == "full":  # adapters start from other random numbers
            pairs += [(a["loss"], b["loss"]) for a, b in zip(steps[name], steps["ours"])]
        for loss, own in pairs:
            if not abs(loss - own) < CLOSE:
                raise RuntimeError(f"{name} has the loss {loss}, ours {own}: the sides do not do the same work")


def rows(method, batch, length, shape="smollm2-135m", dtype="float32", repeats=3, layers=None):
    """Rows of one shape and method: a step against each peer, the peak of memory, the first step.

    All sides read the same random weights and tokens; they do one step that compiles, one that is not counted, and take turns.
    """
    sizes = ours.sizes_of(shape, layers) | {"rope_theta": ROPE}
    if batch < 1 or length < 2:
        raise UserError(f"a step of {batch} rows of {length} tokens cannot be measured")
    with tempfile.TemporaryDirectory() as folder:
        spec = {"method": method, "batch": batch, "length": length, "sizes": sizes, "dtype": dtype, "folder": ours.weights(folder, sizes)}
        found, lines = sides(spec)
        for line in lines:
            print(line, flush=True)
        with worker.started(found) as workers:
            facts = {name: each.facts for name, each in workers.items()}
            first, steps = worker.in_turn(workers, repeats + 1)
    check(spec, facts, first, steps)
    steps = {name: each[1:] for name, each in steps.items()}  # Tunix compiles once more in its second
    text = f"{method} {batch}x{length}" + (f", {layers} layers" if layers else "")
    yield from _compared(text, first, steps)


def _compared(text, first, steps):
    names = {"torch": "torch + PEFT" if text.startswith("lora") else "torch", "tunix": "Tunix"}
    peers = [name for name in steps if name != "ours"] or [None]
    for what, unit, samples in (
        ("step", "s", lambda name: [each["seconds"] for each in steps[name]]),
        ("step, CPU time", "s", lambda name: [each["cpu_seconds"] for each in steps[name]]),
        ("peak memory", "GiB", lambda name: [steps[name][-1]["peak_bytes"] / GIB]),
        ("first step", "s", lambda name: [first[name]["seconds"]]),
    ):
        for peer in peers:
            if what == "first step" and peer == "torch":
                continue  # which compiles nothing
            yield {"name": f"{text}, {what}", "ours": samples("ours"), "peer": samples(peer) if peer else [],
                   "peer_name": names.get(peer, "none"), "unit": unit}  # fmt: skip
