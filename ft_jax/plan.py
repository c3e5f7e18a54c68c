"""A training step of a large model on a pod that is not there: compiled ahead of time, weighed and held against the chips.

The step is the engine's own (`train.make_step`), its arguments are shapes with shardings on the devices of a topology.
"""

import dataclasses
import re
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding

from ft_jax import flops, hlo, kernels, parallel, recipe, train, tree
from ft_jax.errors import UserError, nearest, one_line
from ft_jax.io import hf
from ft_jax.models import Model, config_from_hf


def _llama(vocab, width, hidden, layers, heads, kv, theta=10000.0, positions=4096, eps=1e-5, **more):
    return {"model_type": "llama", "vocab_size": vocab, "hidden_size": width, "intermediate_size": hidden, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv, "rope_theta": theta, "max_position_embeddings": positions,
            "rms_norm_eps": eps, "hidden_act": "silu", "tie_word_embeddings": False, **more}  # fmt: skip


# config.json of the models by name, as their publishers give them.
SHAPES = {
    "llama-2-7b": _llama(32000, 4096, 11008, 32, 32, 32),
    "llama-2-13b": _llama(32000, 5120, 13824, 40, 40, 40),
    "llama-2-70b": _llama(32000, 8192, 28672, 80, 64, 8),
    "llama-3-8b": _llama(128256, 4096, 14336, 32, 32, 8, 500000.0, 8192),
    "llama-3-70b": _llama(128256, 8192, 28672, 80, 64, 8, 500000.0, 8192),
    "llama-3.2-1b": _llama(128256, 2048, 8192, 16, 32, 8, 500000.0, 8192, tie_word_embeddings=True),
    "qwen2.5-7b": _llama(152064, 3584, 18944, 28, 28, 4, 1e6, 32768, 1e-6) | {"model_type": "qwen2"},
    "qwen2.5-72b": _llama(152064, 8192, 29568, 80, 64, 8, 1e6, 32768, 1e-6) | {"model_type": "qwen2"},
    "mistral-7b": _llama(32000, 4096, 14336, 32, 32, 8, 10000.0, 32768) | {"model_type": "mistral", "sliding_window": 4096},
    "smollm2-135m": _llama(49152, 576, 1536, 30, 9, 3, 100000.0, 8192, tie_word_embeddings=True),
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a chip can do at most: bfloat16 FLOP/s, bytes of memory, bytes/s of memory, of its links (one way), of the data centre."""

    flops: float
    memory: float
    bandwidth: float
    links: float
    network: float
    host: tuple[int, int, int]  # chips of one host


# From the vendor's pages of each generation (peak compute, HBM, ICI and DCN per chip).
CHIPS = {
    "v5e": Chip(197e12, 16e9, 819e9, 200e9, 3.125e9, (2, 2, 1)),
    "v5p": Chip(459e12, 95e9, 2765e9, 600e9, 6.25e9, (2, 2, 1)),
    "v6e": Chip(918e12, 32e9, 1640e9, 448e9, 12.5e9, (2, 2, 1)),
}


def devices(topology, slices=1):
    """Devices of a topology such as ``v5e:16x16`` that need not be there, or the machine's own for ``cpu``.

    Raises UserError for an unknown kind of chip, a shape that it has not, and where libtpu is not installed.
    """
    kind, _, shape = topology.partition(":")
    if kind == "cpu":
        return jax.devices("cpu")
    if kind not in CHIPS:
        raise UserError(f"no chip called {kind!r} in the topology {topology!r}{nearest(kind, [*CHIPS, 'cpu'])}")
    if not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise UserError(f"the topology {topology!r} has no shape; give it as {kind}:{'4x4x4' if kind == 'v5p' else '16x16'}")
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, chip_config_name="default",
                                             chips_per_host_bounds=CHIPS[kind].host, num_slices=slices)  # fmt: skip
    except Exception as error:
        text = " ".join(str(error).split())
        hint = "; pip install libtpu, or plan with --topology=cpu" if "libtpu" in text.lower() else ""
        raise UserError(f"the topology {topology} with {slices} slices cannot be had: {text[:200]}{hint}") from None
    return found.devices


def read_model(name):
    """``ModelConfig`` of a name in SHAPES, or of the config.json of a folder, asset or hf:org/name."""
    if name in SHAPES:
        return config_from_hf(SHAPES[name], head="lm")
    if ":" not in name and not Path(name).exists():
        raise UserError(f"no model called {name!r}{nearest(name, SHAPES)}; or a folder with config.json, or hf:org/name")
    return hf.read_config(hf.resolve(name), "lm")


def config(method, optimizer, *, name, batch, length, remat, dtype, frozen_dtype, accumulate, mesh):
    """The train config of a plan: what `train.complete` gives, for text of ``length`` tokens."""
    cfg = {"steps": 1000, "batch_size": batch, "accumulate": accumulate, "objective": "causal_lm",
           "model": {"path": name, "head": "lm", "dtype": dtype, "frozen_dtype": frozen_dtype, "remat": remat, "dropout": False},
           "method": method, "optimizer": {"learning_rate": 1e-4, **optimizer}, "mesh": mesh,
           "data": {"source": "planned.jsonl", "max_length": length, "packing": True}}  # fmt: skip
    return train.complete(cfg)


@dataclasses.dataclass
class Planned:
    """The step of a config as shapes on a mesh."""

    model: Model
    mesh: jax.sharding.Mesh
    step: object
    state: train.TrainState
    frozen: dict
    batch: dict


def planned(cfg, model_config, found):
    """`Planned` of a train config over the devices ``found``; UserError for a mesh or batch that does not fit."""
    mesh = parallel.make_mesh(**cfg["mesh"], devices=found)
    parallel.check_batch(cfg["batch_size"] // cfg["accumulate"], mesh)
    spec = cfg["model"]
    model = Model(model_config, dtype=spec["dtype"], remat=spec["remat"], mesh=mesh)
    base = recipe.Base(model, model.shapes(), (), "")
    if kernels.needs(base.params, cfg["method"]["kernels"]):
        raise UserError(f"method {cfg['method']['name']!r} starts from data, and a plan has none; plan lora of the same rank")
    _, params, mask, _ = recipe.build(recipe.of_config(cfg), base, dry=True)
    trainable, frozen = tree.split(recipe.stored(params, mask, spec["frozen_dtype"]), mask)
    tx, _ = train.optimizer(cfg, cfg["optimizer"]["learning_rate"])
    state = train.TrainState(jax.ShapeDtypeStruct((), jnp.int32), trainable, jax.eval_shape(tx.init, trainable))
    rows = jax.ShapeDtypeStruct((cfg["batch_size"], cfg["data"]["max_length"]), jnp.int32)
    objective = train.make_objective(cfg, model, None)
    keys = ("input_ids", "attention_mask", "loss_mask", "segment_ids", "positions")
    sharding = NamedSharding(mesh, parallel.batch_spec(rows.shape, mesh))
    return Planned(model, mesh, train.make_step(objective, tx, cfg["accumulate"], cfg["seed"]), on(state, mesh), on(frozen, mesh),
                   {key: jax.ShapeDtypeStruct(rows.shape, rows.dtype, sharding=sharding) for key in keys})  # fmt: skip


def on(shapes, mesh):
    """A tree of shapes with the shardings of the rules."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, parallel.shardings(shapes, mesh))


class TooLarge(UserError):
    """A step whose compiler found no way to fit it into a chip; ``bytes``: what the least of its ways would take, if it said so."""

    def __init__(self, text):
        said = re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT])", text)
        scale = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
        self.bytes = float(said[1]) * scale[said[2]] if said else None
        super().__init__(f"the step does not fit a chip: {said[0] if said else text[:200]}; take more chips, --mesh=tensor=…, a smaller "
                         "--batch, --remat=full or --accumulate")  # fmt: skip


def compiled(plan):
    """(the compiled step, its text): the state donated and kept where it is, the frozen half an argument alone. TooLarge where it fits no chip.

    The text is what the compiler itself writes: jaxlib, an older XLA than libtpu's, cannot read every program of its.
    """
    kept = jax.tree.map(lambda x: x.sharding, plan.state)
    lowered = jax.jit(plan.step, donate_argnums=0, out_shardings=(kept, None)).lower(plan.state, plan.frozen, plan.batch)
    with tempfile.TemporaryDirectory() as folder:
        try:
            program = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise TooLarge(one_line(error)) from None
        return program, next(Path(folder).glob("*after_optimizations.txt")).read_text()


def model_flops(plan):
    """FLOPs that the method needs, without what is computed again: forward, ∂x, and ∂W of the share of matrices that trains.

    Products of activations alone (attention's 4 B T² heads head_dim a layer, forward) have two derivatives whatever trains.
    """
    c, (rows, length) = plan.model.config, plan.batch["input_ids"].shape
    model = dataclasses.replace(plan.model, mesh=None, remat="none")
    inputs = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in plan.batch.items() if k != "loss_mask"}
    forward = flops.count(model.apply, model.shapes(), inputs)
    attention = 4 * rows * length**2 * c.num_heads * c.head_dim * c.num_layers
    matrices = [sum(x.size for p, x in tree.flatten(half).items() if len(x.shape) >= 2 and "embed" not in p)
                for half in (plan.state.trainable, plan.frozen)]  # fmt: skip
    share = matrices[0] / sum(matrices)
    return 2 * (forward - attention) + share * (forward - attention) + 3 * attention


def sizes(plan, topology):
    """What is known of a plan before it is compiled: a JSON-able dict. FLOPs are of one chip."""
    chips, counted = plan.mesh.size, flops.count(plan.step, plan.state, plan.frozen, plan.batch)
    return {
        "topology": topology, "chips": chips, "slices": len(set(_slices(plan))), "mesh": dict(plan.mesh.shape),
        "parameters": tree.count(plan.state.trainable) + tree.count(plan.frozen), "trainable": tree.count(plan.state.trainable),
        "tokens": int(np.prod(plan.batch["input_ids"].shape)), "flops": counted / chips, "model_flops": model_flops(plan) / chips,
    }  # fmt: skip


def _slices(plan):
    return [getattr(d, "slice_index", 0) for d in plan.mesh.devices.flatten()]


def report(plan, program, text, topology):
    """What a plan that `compiled` gave needs and would take: `sizes` and the program's own. Times are bounds from the chip's peaks, in seconds."""
    memory, slices = program.memory_analysis(), _slices(plan)
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    rows = hlo.collectives(text, slices if len(set(slices)) > 1 else None)
    out = sizes(plan, topology) | {
        "bytes_held": held, "bytes_temporary": memory.temp_size_in_bytes, "bytes": held + memory.temp_size_in_bytes,
        "bytes_moved": hlo.moved(text), "collectives": rows,
        "collective_bytes": sum(r["bytes"] for r in rows if not r["across"]), "network_bytes": sum(r["bytes"] for r in rows if r["across"]),
    }  # fmt: skip
    chip = CHIPS.get(topology.partition(":")[0])
    return out | (_roofline(out, chip) if chip else {"fits": None})


def _roofline(found, chip):
    times = {"compute": found["flops"] / chip.flops, "memory": found["bytes_moved"] / chip.bandwidth,
             "links": found["collective_bytes"] / chip.links, "network": found["network_bytes"] / chip.network}  # fmt: skip
    best, worst = max(times.values()), sum(times.values())
    return {"fits": found["bytes"] <= chip.memory, "chip_bytes": chip.memory, "seconds": times, "step_seconds": [best, worst],
            "bound": max(times, key=times.get), "mfu": [found["model_flops"] / chip.flops / t for t in (best, worst)]}  # fmt: skip


def mesh_for(text, chips, slices=1):
    """Mesh sizes from ``fsdp=64,tensor=4``; what is left goes to fsdp, over the slices to data."""
    sizes = {"data": slices, "fsdp": 0, "sequence": 1, "tensor": 1}
    for part in filter(None, (text or "").split(",")):
        key, _, value = part.partition("=")
        if key not in sizes:
            raise UserError(f"cannot read {part!r} in the mesh{nearest(key, sizes)}")
        if not value.isdecimal() or not int(value):
            raise UserError(f"the mesh axis {key} takes a positive number, not {value!r}")
        sizes[key] = int(value)
    sizes["fsdp"] = sizes["fsdp"] or max(1, chips // (sizes["data"] * sizes["sequence"] * sizes["tensor"]))
    return sizes


