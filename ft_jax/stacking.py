"""Trees of many runs as one: stacked on a leading axis of members, padded with zeros, stepped by one ``vmap``."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ft_jax import train, tree
from ft_jax.kernels import LowRank, is_kernel, parse_rule

# Updates that see each number of a leaf by itself, and so let ranks be padded with zeros.
PADDED = ("adamw", "adamw_l1", "lion", "lora_plus", "sgd")


@dataclasses.dataclass
class Frozen:
    """The frozen half of all members: leaves that they share, leaves of their own stacked, by their place in the tree."""

    structure: jax.tree_util.PyTreeDef
    shared: dict
    own: dict

    def join(self, own, shared):
        """The tree of one member from its ``own`` leaves and the ``shared`` ones."""
        leaves = own | shared
        return self.structure.unflatten([leaves[i] for i in range(len(leaves))])


def place(x, mesh, stacked=True):
    """A tree on the mesh: the leading axis of members over data where it divides them, otherwise whole."""

    def sharding(leaf):
        split = stacked and leaf.shape[0] % mesh.shape["data"] == 0
        return NamedSharding(mesh, P("data") if split else P())

    return jax.tree.map(lambda leaf: jax.device_put(leaf, sharding(leaf)), x)


def _padded(x, shape):
    out = np.zeros(shape, x.dtype)
    out[tuple(slice(n) for n in x.shape)] = x
    return out


def stack(trees, mesh):
    """Trees of one structure as one: every leaf padded with zeros at its ends to the largest, then stacked."""

    def together(*leaves):
        shape = tuple(max(sizes) for sizes in zip(*(x.shape for x in leaves), strict=True))
        return np.stack([_padded(np.asarray(x), shape) for x in leaves])

    return place(jax.tree.map(together, *trees), mesh)


@jax.jit
def take(trees, i):
    """The tree of member ``i`` out of a stack, padding included."""
    return jax.tree.map(lambda x: x[i], trees)


def cut(trees, i, shapes):
    """The tree of member ``i`` out of a stack of numpy arrays, without its padding: as large as ``shapes``."""
    return jax.tree.map(lambda x, s: jnp.asarray(x[i][tuple(slice(n) for n in s.shape)]), trees, shapes)


def stack_frozen(halves, mesh):
    """The `Frozen` of the members' frozen halves: what is equal in all of them is kept once."""
    shared, own = {}, {}
    for i, leaves in enumerate(zip(*map(jax.tree.leaves, halves), strict=True)):
        first = leaves[0]
        if all(x is first or (x.shape == first.shape and bool((x == first).all())) for x in leaves):
            shared[i] = place(first, mesh, stacked=False)
        else:
            own[i] = stack(leaves, mesh)
    return Frozen(jax.tree.structure(halves[0]), shared, own)


def step_of(cfg, objective, join, shardings):
    """``step(carry, rates, own, shared, batch) -> (carry, metrics)`` of all members at once, compiled.

    carry: (TrainState, alive bool) stacked, donated. rates: learning_rate, seed of each. batch: ``own`` stacked and
    ``shared`` arrays. A member whose loss or gradient is not finite keeps its last state and is alive no longer.
    """

    def one(carry, rates, own, shared, batch):
        state, alive = carry
        tx, _ = train.optimizer(cfg, rates["learning_rate"])
        step = train.make_step(objective, tx, cfg["accumulate"], rates["seed"])
        new, metrics = step(state, join(own, shared), batch["own"] | batch["shared"])
        alive = alive & jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        return (jax.tree.map(lambda a, b: jnp.where(alive, a, b), new, state), alive), metrics

    every = jax.vmap(one, in_axes=(0, 0, 0, None, {"own": 0, "shared": None}))
    return jax.jit(every, donate_argnums=0, out_shardings=(shardings, None))


def program_key(member):
    """What the program of a member is made of, as text: its config but for what may differ, every shape, the batch."""
    cfg = {k: v for k, v in member.cfg.items() if k not in ("seed", "data")}
    cfg["optimizer"] = {k: v for k, v in cfg["optimizer"].items() if k != "learning_rate"}
    rules = [(regex, *parse_rule(rule)) for regex, rule in cfg["method"]["kernels"]]
    rules = [(regex, name, {k: v for k, v in hp.items() if k not in ("rank", "alpha")}) for regex, name, hp in rules]
    cfg["method"] = {k: v for k, v in cfg["method"].items() if k != "name"} | {"kernels": rules}
    padded = cfg["optimizer"]["name"] in PADDED
    leaves = tree.flatten(member.parts["params"], is_leaf=is_kernel)
    shapes = {path: _shapes(leaf, padded) for path, leaf in leaves.items()}
    batch = {k: (v.shape, str(v.dtype)) for k, v in member.parts["data"]["train"].gather([0]).items()}
    return json.dumps([cfg, shapes, jax.tree.leaves(member.parts["mask"]), batch], sort_keys=True)


def _shapes(leaf, padded):
    """Shapes of a leaf as text; low-rank factors that can be padded without their rank."""
    if padded and isinstance(leaf, LowRank):
        return [type(leaf).__name__, _shapes(leaf.base, padded), leaf.a.shape[:-1], leaf.b.shape[-1:]]
    return str(jax.tree.map(jnp.shape, leaf))
