"""What a model says and whom it serves: generation against transformers, a bank of adapters against one."""

import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from ft_jax import kernels
from ft_jax.models import Model, config_from_hf
from scripts.benches import ours, worker

AGREE = 0.95  # the share of tokens that both sides have to say alike; after a near tie two may part


def generation(shape="smollm2-135m", layers=None, repeats=3, rows=8, prompt=32, new=64):
    """Greedy tokens a second of both sides from the same random weights; RuntimeError where they say other things."""
    sizes = ours.sizes_of(shape, layers)
    python = worker.python_of("transformers")
    if not python:
        print(worker.missing("transformers"), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        spec = {"sizes": sizes, "folder": ours.weights(folder, sizes), "batch": rows, "length": prompt, "new": new}
        sides = {"ours": ("ours:generate", spec, None)} | ({"torch": ("peers:torch_generate", spec, python)} if python else {})
        with worker.started(sides) as workers:
            first, steps = worker.in_turn(workers, repeats)
    if python:
        same = np.mean(np.asarray(first["ours"]["tokens"]) == np.asarray(first["torch"]["tokens"]))
        if not same >= AGREE:
            raise RuntimeError(f"{same:.0%} of the tokens are those of transformers")
    speed = {name: [rows * new / each["seconds"] for each in found] for name, found in steps.items()}
    yield {"name": f"{rows} rows, {prompt} tokens of prompt, {new} new, greedy", "ours": speed["ours"], "peer": speed.get("torch", []),
           "peer_name": "transformers" if python else "none", "unit": "tokens/s"}  # fmt: skip


def bank(shape="smollm2-135m", layers=None, repeats=5, adapters=256, length=32):
    """A forward pass in which every row has an adapter of its own, of LoRA with one for all, and of the base, in turn."""
    sizes = ours.sizes_of(shape, layers or 8)
    model = Model(config_from_hf(sizes, head="none"))
    base = model.init(jax.random.key(0))
    ids = jnp.asarray(ours.tokens({"sizes": sizes, "batch": adapters, "length": length}))
    own = np.random.RandomState(1).permutation(adapters).astype(np.int32)
    passes = {
        "bank": (kernels.adapt(base, ((ours.LINEAR, f"bank(adapters={adapters}, rank=8)"),), jax.random.key(1)), {"tasks": jnp.asarray(own)}),
        "one": (kernels.adapt(base, ((ours.LINEAR, "lora(rank=8)"),), jax.random.key(1)), {}),
        "base": (base, {}),
    }
    run = jax.jit(lambda params, inputs: model.apply(params, inputs))
    seconds = {name: [] for name in passes}
    for turn in range(repeats + 1):
        for name, (params, more) in passes.items():
            started = time.perf_counter()
            jax.block_until_ready(run(params, {"input_ids": ids, **more}))
            if turn:  # the first one compiles
                seconds[name].append(time.perf_counter() - started)
    text = f"{adapters} adapters in {adapters} rows of {length}, {sizes['num_hidden_layers']} layers, forward"
    for name, peer_name in (("one", "one adapter"), ("base", "no adapter")):
        yield {"name": text, "ours": seconds["bank"], "peer": seconds[name], "peer_name": peer_name, "unit": "s"}
