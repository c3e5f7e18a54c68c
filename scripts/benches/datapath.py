"""The path of packed examples to the device: tokens a second, and how long a step waits for its batch."""

import contextlib
import time

import jax
import numpy as np

from ft_jax import parallel
from ft_jax.data import packing, pipeline
from scripts.benches import ours


def dataset(examples, length, vocabulary=49152):
    """A packed `Dataset` of random examples whose lengths are geometric, as those of texts nearly are."""
    rng = np.random.RandomState(0)
    sizes = np.clip(rng.geometric(4 / length, examples), 2, length)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    tokens = {"ids": rng.randint(1, vocabulary, offsets[-1]).astype(np.int32), "offsets": offsets, "starts": np.ones(examples, np.int32)}
    started = time.perf_counter()
    arrays, filled = packing.pack(tokens, length, 0, "random texts")
    seconds = time.perf_counter() - started
    info = {"examples": examples, "tokens": int(offsets[-1]), "longest": int(sizes.max()), **filled}
    return pipeline.Dataset("random texts", "causal_lm", length, arrays, info, 0, packed=True), offsets[-1] / seconds


def _drawn(data, batch, count):
    """Tokens a second of ``count`` shuffled batches that are put on the device, read ahead as a run reads them."""
    batches, mesh = pipeline.prefetch(pipeline.batches(data, batch, 0)), parallel.make_mesh(data=1, devices=jax.devices()[:1])
    next(batches)
    started = time.perf_counter()
    for _ in range(count):
        placed = parallel.shard_batch(next(batches), mesh)
    jax.block_until_ready(placed)
    return count * batch * data.length / (time.perf_counter() - started)


def _torch_drawn(data, batch, count):
    import torch

    rows = [data[i] for i in range(len(data))]
    loader = torch.utils.data.DataLoader(rows, batch, shuffle=True, num_workers=2, drop_last=True, multiprocessing_context="spawn")
    done, started = -1, None
    while done < count:
        for _ in loader:
            done += 1
            started = time.perf_counter() if done == 0 else started  # the workers have started
            if done == count:
                break
    return count * batch * data.length / (time.perf_counter() - started)


def _waits(data, spec, steps):
    """Shares of a step's time for which the engine's step waited on its batch."""
    (step, *_), shares = ours.engine_step(spec), []
    batches, mesh = pipeline.prefetch(pipeline.batches(data, spec["batch"], 0)), parallel.make_mesh(data=1, devices=jax.devices()[:1])
    for _ in range(steps + 1):
        started = time.perf_counter()
        placed = parallel.shard_batch(next(batches), mesh)
        got = time.perf_counter()
        step(placed)
        shares.append((got - started) / (time.perf_counter() - started))
    return shares[1:]  # the first one compiles


def rows(shape="smollm2-135m", layers=None, repeats=3, examples=20000, batch=8, length=256, count=200, steps=10):
    """Rows of packing, of drawing packed batches beside torch's loader, and of what a step of two layers waits."""
    data, packed = dataset(examples, length)
    text = f"batches of {batch}x{length}"
    yield {"name": "packing", "ours": [packed], "peer": [], "peer_name": "none", "unit": "tokens/s"}
    speed = {"ours": [], "peer": []}
    for _ in range(repeats):
        speed["ours"].append(_drawn(data, batch, count))
        with contextlib.suppress(ImportError):
            speed["peer"].append(_torch_drawn(data, batch, count))
    yield {"name": f"packed {text}", **speed, "peer_name": "torch DataLoader, 2 workers" if speed["peer"] else "none", "unit": "tokens/s"}
    sizes = ours.sizes_of(shape, layers or 2)
    waits = _waits(data, {"sizes": sizes, "method": "lora", "batch": batch, "length": length}, steps)
    yield {"name": f"waiting for {text}, {sizes['num_hidden_layers']} layers, LoRA", "ours": [100 * w for w in waits], "peer": [],
           "peer_name": "none", "unit": "% of step"}  # fmt: skip
