"""Sharding as data: a mesh (data, fsdp, sequence, tensor) and ordered rules from paths to axes."""

import os
import re

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ft_jax import tree
from ft_jax.errors import UserError, one_line

AXES = ("data", "fsdp", "sequence", "tensor")
ROWS = ("data", "fsdp")  # the axes that a batch's rows are spread over; its tokens are over ``sequence``

# Rules speak of a weight's last dimensions (leading stack axes stay whole); the first full match decides.
# A kernel's fields inherit from its matrix: base as the matrix, a as its input side, b as its output side.
RULES = (
    (r"(.*/)?embedding", ("tensor", "fsdp")),
    (r"(.*/)?(attn/(q|k|v)|mlp/(up|gate))/kernel", ("fsdp", "tensor")),
    (r"(.*/)?(attn/out|mlp/down)/kernel", ("tensor", "fsdp")),
    (r"(.*/)?head/kernel", ("fsdp", "tensor")),
    (r"(.*/)?kernel", ("fsdp", None)),
    (r"(.*/)?(attn/(q|k|v)|mlp/(up|gate))/bias", ("tensor",)),
    (r".*", ()),
)


def join_cluster(coordinator=None, num_processes=None, process_id=None):
    """``jax.distributed.initialize``, which must come before anything asks for a device; returns this process's number.

    What is None comes from JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID, else JAX finds it out on
    TPUs and under SLURM or Open MPI. Raises UserError for numbers that do not fit, and where nothing is found.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    if coordinator and not re.fullmatch(r".+:\d+", coordinator):
        raise UserError(f"the coordinator's address is {coordinator!r}; it is written host:port")
    count = _number("num_processes", num_processes, "JAX_NUM_PROCESSES")
    index = _number("process_id", process_id, "JAX_PROCESS_ID")
    if count is not None and (count < 1 or not 0 <= (index or 0) < count):
        raise UserError(f"process_id {index} does not fit num_processes {count}; processes are numbered from 0")
    # Its handler would keep the process alive after SIGTERM; a run ends there, and resumes from its last checkpoint.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(coordinator, count, index)
    except ValueError as error:
        raise UserError(f"found no cluster to join ({one_line(error)}); outside TPU, SLURM and Open MPI give --coordinator, "
                        "--num_processes and --process_id, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID") from None
    return jax.process_index()


def lost(error):
    """Whether an exception says that another process of the cluster is gone."""
    return bool(re.search(r"Gloo|heartbeat|[Cc]oordination service|UNAVAILABLE|preempted|Connection (reset|closed)", str(error)))


def _number(name, value, variable):
    """``value``, or that of an environment variable, as an int; None where neither is given."""
    value, name = (os.environ.get(variable), variable) if value is None else (value, name)
    if value is not None and not re.fullmatch(r"-?\d+", str(value)):
        raise UserError(f"{name} is {value!r}; it takes a whole number")
    return None if value is None else int(value)


def make_mesh(data=-1, fsdp=1, tensor=1, sequence=1, devices=None):
    """A Mesh over all devices, one size -1 meaning whatever is left; sizes that are all given may use fewer devices.

    Of several slices the data axis runs over the slices first, so that between them only gradients travel; within one the
    axes follow the chips' own network.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "sequence": sequence, "tensor": tensor}
    if any(s < 1 and s != -1 for s in sizes.values()) or list(sizes.values()).count(-1) > 1:
        raise UserError(f"mesh sizes are positive, at most one of them -1, not {sizes}")
    known = int(np.prod([s for s in sizes.values() if s != -1]))
    free = [k for k, s in sizes.items() if s == -1]
    if free:
        sizes[free[0]] = len(devices) // known
    shape = tuple(sizes[a] for a in AXES)
    needed = int(np.prod(shape))
    if needed < 1 or needed > len(devices) or (needed < len(devices) and (free or jax.process_count() > 1)):
        raise UserError(f"mesh {sizes} does not fit {len(devices)} devices")
    return Mesh(_placed(shape, devices[:needed]), AXES)


def _placed(shape, devices):
    """Devices as an array of ``shape``, neighbours on the later axes near each other where devices say where they are."""
    if not hasattr(devices[0], "coords"):
        return np.asarray(devices).reshape(shape)
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if shape[0] % slices:
        raise UserError(f"mesh.data {shape[0]} is not a multiple of the {slices} slices that it runs over")
    within = (shape[0] // slices, *shape[1:])
    if slices == 1:
        return mesh_utils.create_device_mesh(within, devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1, 1), devices, allow_split_physical_axes=True)


def ways(mesh):
    """How many shares a batch's rows are cut into; 1 without a mesh."""
    return 1 if mesh is None else int(np.prod([mesh.shape[a] for a in ROWS]))


def batch_spec(shape, mesh):
    """PartitionSpec of rows and their tokens, ``[B, T, …]`` or ``[B]``; tokens that the axis does not divide stay whole."""
    return P(ROWS, *("sequence" if n % mesh.shape["sequence"] == 0 else None for n in shape[1:2]))


def spread(x, mesh):
    """Activations ``[B, T, …]`` laid out as the batch is, so that weights are gathered and not activations; x without a mesh."""
    if mesh is None or mesh.size == 1 or x.shape[0] % ways(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, batch_spec(x.shape, mesh)))


def spec_of(path, shape, mesh, rules=RULES):
    """PartitionSpec of one leaf; a dimension that its axis does not divide stays whole."""
    found = re.fullmatch(r"(.*/kernel)((?:/base)*)(?:/(a|b))?", path)
    matrix, side = (found.group(1), found.group(3)) if found else (path, None)
    axes = next(axes for pattern, axes in rules if re.fullmatch(pattern, matrix))
    if side:
        axes = (axes[0], None) if side == "a" else (None, axes[1])
    axes = (None,) * (len(shape) - len(axes)) + tuple(axes) if len(shape) >= len(axes) else ()
    return P(*(a if a and n % mesh.shape[a] == 0 else None for a, n in zip(axes, shape, strict=False)))


def shardings(params, mesh, rules=RULES):
    """Tree of NamedSharding for a tree of arrays or shapes; optimiser states follow the leaf they belong to."""
    return tree.map_with_path(lambda p, x: NamedSharding(mesh, spec_of(p, np.shape(x), mesh, rules)), params)


def shard(params, mesh, rules=RULES):
    """Puts a tree on the mesh by the rules."""
    return jax.device_put(params, shardings(params, mesh, rules))


def shard_batch(batch, mesh):
    """This process's rows of a batch ``{name: [B, …]}`` as global arrays, rows over data and fsdp, tokens over sequence."""
    return {k: jax.make_array_from_process_local_data(NamedSharding(mesh, batch_spec(np.shape(v), mesh)), np.asarray(v))
            for k, v in batch.items()}  # fmt: skip


def held(params, mesh):
    """A layer's weights kept to the rules inside the loop over layers, so that their gradients are summed into shares there."""
    if mesh is None or mesh.size == 1:
        return params
    return jax.lax.with_sharding_constraint(params, shardings(params, mesh))


def gathered(head, mesh):
    """A head's weights, whole over ``fsdp`` and cut over ``tensor`` as the rules have it; as they are without a mesh.

    Its paths are those of a model, but for a ``table`` of tokens and a ``kernel`` that is the head's own.
    """
    if mesh is None or mesh.size == 1:
        return head

    def whole(path, x):
        own = {"table": "embedding", "kernel": "head/kernel"}.get(path.partition("/")[0])
        spec = spec_of(path if own is None else own + path.removeprefix(path.partition("/")[0]), x.shape, mesh)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*(None if a == "fsdp" else a for a in spec))))

    return tree.map_with_path(whole, head)


def check_batch(batch_size, mesh):
    shares = ways(mesh)
    if batch_size % shares:
        raise UserError(
            f"batch_size {batch_size} is not a multiple of data x fsdp = {shares}; nearest: {-(-batch_size // shares) * shares}"
        )
