"""Peak bytes of the compiled step by method and by what the backward pass computes again, from shapes alone."""

import jax
import numpy as np

from ft_jax import plan
from ft_jax.models import config_from_hf
from scripts.benches import ours

SHAPES = ((4, 128), (8, 256))
REMATS = ("none", "dots", "full")


def _bytes(shapes):
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(shapes))


def measured(method, batch, length, remat, sizes, dtype="float32"):
    """``{"peak", "optimizer", "trainable"}`` bytes of a step; RuntimeError where the state outgrows what trains.

    peak: arguments, results and temporaries as the compiler laid them out, the state donated.
    """
    spec = {"method": method, "batch": batch, "length": length, "remat": remat, "dtype": dtype}
    step = plan.planned(ours.config(spec) | {"mesh": {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1}}, config_from_hf(sizes, head="lm"),
                        jax.devices()[:1])  # fmt: skip
    memory = plan.compiled(step)[0].memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    found = {"peak": held + memory.temp_size_in_bytes, "optimizer": _bytes(step.state.opt_state), "trainable": _bytes(step.state.trainable)}
    if not 2 * found["trainable"] <= found["optimizer"] <= 2 * found["trainable"] + 64:
        raise RuntimeError(f"{method}: the optimizer holds {found['optimizer']} bytes for {found['trainable']} that train")
    return found


def rows(shape="smollm2-135m", layers=None, dtype="float32", shapes=SHAPES, remats=REMATS):
    """Rows of full, LoRA and QLoRA (LoRA on a base in nf4), beside full fine-tuning of the same shape without recomputation."""
    sizes = ours.sizes_of(shape, layers)
    for batch, length in shapes:
        found = {(m, r): measured(m, batch, length, r, sizes, dtype) for m in ours.METHODS for r in remats}
        whole = found["full", "none"]
        for (method, remat), row in found.items():
            yield {"name": f"{method} {batch}x{length}, remat {remat}, peak", "ours": [row["peak"] / 2**30], "peer": [whole["peak"] / 2**30],
                   "peer_name": "full, remat none", "unit": "GiB"}  # fmt: skip
    for method in ours.METHODS:
        moved, all_moved = (row["optimizer"] + row["trainable"] for row in (found[method, "none"], whole))  # a gradient is as large as its weight
        yield {"name": f"{method}, gradient and optimizer", "ours": [moved / 2**20], "peer": [all_moved / 2**20], "peer_name": "full",
               "unit": "MiB"}  # fmt: skip
