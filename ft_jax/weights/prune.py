"""Pruning that removes what fine-tuning laid over a capability (arXiv:2311.12786, appendix D).

A score is ``{path: array}`` over the eligible leaves of a tree of plain arrays, larger for what should go. A unit is a
weight, or a neuron: one column of a ``[..., d_in, d_out]`` matrix (a row in torch's orientation). A mask is bool, of a
leaf's shape for weights and ``[..., d_out]`` for neurons.
"""

import jax.numpy as jnp
import numpy as np

from ft_jax import tree
from ft_jax.errors import UserError, nearest
from ft_jax.registry import register
from ft_jax.weights.graft import eligible_paths

ELIGIBLE = ((r"(frozen_)?layers/.*/kernel", True),)  # the matrices of the layers
UNITS = ("weight", "neuron")


def _pairs(first, second, eligible):
    """``(path, first leaf, second leaf)`` float32 of the eligible leaves; UserError where the trees differ."""
    one, two = tree.flatten(first), tree.flatten(second)
    for path in eligible_paths(first, eligible):
        if path not in two or np.shape(one[path]) != np.shape(two[path]):
            raise UserError(f"the two trees differ at {path!r}{'' if path in two else nearest(path, two)}")
        yield path, np.asarray(one[path], np.float32), np.asarray(two[path], np.float32)


def first_order(params, grads, eligible=ELIGIBLE):
    """θ ⊙ ∂L/∂θ: how much the loss L falls, to first order, when θ is set to zero (arXiv:1611.06440)."""
    return {path: w * g for path, w, g in _pairs(params, grads, eligible)}


def movement(base, tuned, eligible=ELIGIBLE):
    """θ_ft ⊙ (θ_ft − θ_pre): large where fine-tuning moved a weight away from zero (arXiv:2005.07683, of two checkpoints)."""
    return {path: w * (w - w0) for path, w0, w in _pairs(base, tuned, eligible)}


def of_units(scores, unit="neuron"):
    """Scores of weights as scores of units: a neuron's is the sum over its incoming weights."""
    if unit not in UNITS:
        raise UserError(f"no unit called {unit!r}{nearest(unit, UNITS)}")
    if unit == "weight":
        return scores
    if odd := [path for path in scores if not path.endswith("kernel")]:
        raise UserError(f"{odd[0]} is no matrix and has no neurons; choose …/kernel leaves, or unit 'weight'")
    return {path: s.sum(-2) for path, s in scores.items()}


def top(scores, count):
    """Mask of the ``count`` units with the largest scores, over all leaves at once; UserError for a count that does not fit."""
    flat = np.concatenate([s.reshape(-1) for s in scores.values()])
    if not 0 <= count <= flat.size:
        raise UserError(f"cannot prune {count} of {flat.size} units")
    chosen = np.zeros(flat.size, bool)
    if count:
        chosen[np.argpartition(flat, flat.size - count)[flat.size - count :]] = True
    cuts = np.split(chosen, np.cumsum([s.size for s in scores.values()])[:-1])
    return {path: part.reshape(s.shape) for (path, s), part in zip(scores.items(), cuts, strict=True)}


def random(scores, count, rng):
    """Mask of ``count`` units drawn uniformly: the control; ``rng`` is a ``numpy.random.Generator``."""
    return top({path: rng.random(s.shape) for path, s in scores.items()}, count)


def apply(params, mask):
    """The tree with the marked units set to zero."""

    def cut(path, leaf):
        if path not in mask:
            return leaf
        gone = mask[path]
        if gone.shape != leaf.shape and gone.shape != (*leaf.shape[:-2], leaf.shape[-1]):
            raise UserError(f"a mask of shape {gone.shape} marks neither weights nor neurons of {path} {leaf.shape}")
        return jnp.where(gone if gone.ndim == leaf.ndim else gone[..., None, :], 0, leaf)

    if odd := [path for path in mask if path not in tree.flatten(params)]:
        raise UserError(f"the tree has no leaf {odd[0]!r}{nearest(odd[0], tree.flatten(params))}")
    return tree.map_with_path(cut, params)


@register("edit", "prune_first_order", paper="arXiv:2311.12786")
def prune_first_order(params, requests, *, count=10, unit="neuron", eligible=ELIGIBLE):
    """Zeroes the ``count`` units with the largest Σ θ ∂L/∂θ; ``requests`` holds the gradients of the loss that should fall.

    With the loss of a pretrained capability it removes what hides it. ``params`` and ``requests``: trees of plain arrays of
    the same shapes. UserError where they differ, for an unknown unit, and for more units than there are.
    """
    return apply(params, top(of_units(first_order(params, requests, eligible), unit), count))


@register("edit", "prune_movement", paper="arXiv:2005.07683")
def prune_movement(params, requests, *, count=10, unit="neuron", eligible=ELIGIBLE):
    """Zeroes the ``count`` units of the tuned tree ``requests`` that moved farthest from zero since the base ``params``.

    Needs no data. UserError as `prune_first_order`.
    """
    return apply(requests, top(of_units(movement(params, requests, eligible), unit), count))
