"""One matrix at a time into the tree: where a tensor of a checkpoint lies in stacked leaves, and kernels of a stack of layers."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np

from ft_jax import registry, tree
from ft_jax.errors import UserError
from ft_jax.io.peft_kinds import NEUTRAL, ON_BIAS, PADDED
from ft_jax.kernels import dense, is_kernel


def _place(config, flat):
    """The function from a row of the layout to ``(path, index in its stack or None)``."""
    depth = config.num_layers - next((w.shape[0] for p, w in flat.items() if p.startswith("layers/")), 0)

    def place(row):
        if row.layer is None:
            return row.path, None
        if row.layer < depth:
            return "frozen_" + row.path, row.layer
        return row.path, row.layer - depth

    return place


def matrix(config, params, row):
    """What the base holds at a row, float32, as the checkpoint stores it."""
    flat = tree.flatten(params, is_leaf=is_kernel)
    path, i = _place(config, flat)(row)
    leaf = flat[path] if i is None else jax.tree.map(lambda x: x[i], flat[path])
    array = np.asarray(dense(leaf), np.float32)
    return array.T if row.transposed else array


def apply(config, params, found, whole, start):
    """``params`` with ``found`` ``{row: (class, fields)}`` around their matrices and ``whole`` ``{row: array, or what makes it}`` in place."""
    flat = tree.flatten(params, is_leaf=is_kernel)
    place = _place(config, flat)
    for row, array in whole.items():
        path, i = place(row)
        if is_kernel(flat[path]):
            raise UserError(f"{path}: the adapter replaces it whole, but it already carries a kernel; load it first")
        if callable(array):  # what it was becomes what it is
            array = array(np.asarray(flat[path] if i is None else flat[path][i]))
        array = jnp.asarray(array.T if row.transposed else array)
        flat[path] = array if i is None else flat[path].at[i].set(array)
    grouped = collections.defaultdict(dict)
    for row, part in found.items():
        path, i = place(row)
        grouped[path][i] = part
    for path, layers in grouped.items():
        base = _moved(path, flat[path], layers, start) if start else flat[path]
        flat[path] = kernel = _around(path, base, layers)
        bias = path.removesuffix("kernel") + "bias"
        if type(kernel) in ON_BIAS and bias in flat:
            flat[bias] = ON_BIAS[type(kernel)][1](kernel, flat[bias])
    return tree.nest(flat)


def _moved(path, leaf, layers, start):
    """What PEFT leaves frozen when an adapter starts from a part of W: that of the same kernel here."""
    for i, (_, fields) in layers.items():
        rank, w = fields["a"].shape[-1], leaf if i is None else leaf[i] if not is_kernel(leaf) else leaf
        try:
            rest = registry.call("kernel", start, w, None, rank=rank, alpha=float(fields["scale"]) * rank).base
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        leaf = rest if i is None else leaf.at[i].set(rest)
    return leaf


def _around(path, leaf, layers):
    """The kernel of ``{layer (None outside the stack): (class, fields)}`` around a leaf."""
    kernel, fields = next(iter(layers.values()))
    if any(k is not kernel for k, _ in layers.values()):
        raise UserError(f"{path}: its layers carry adapters of different forms, which a stack of layers cannot hold")
    if None not in layers:
        held = [layers[i][1] if i in layers else _neutral(kernel, fields, leaf, i) for i in range(leaf.shape[0])]
        try:
            fields = jax.tree.map(functools.partial(_stack, kernel in PADDED), *held)
        except ValueError:
            raise UserError(f"{path}: its layers carry factors of different sizes, which a stack of layers cannot hold") from None
    return kernel(leaf, **jax.tree.map(jnp.asarray, fields))


def _neutral(kernel, fields, leaf, i):
    """The fields of a layer that the adapter leaves out, after those of one that it has."""
    zeros = {n: jax.tree.map(np.zeros_like, x) if n in kernel.trainable else x for n, x in fields.items()}
    return zeros | (NEUTRAL[kernel](fields, dense(jax.tree.map(lambda x: x[i], leaf))) if kernel in NEUTRAL else {})


def _stack(padded, *arrays):
    if padded:
        shape = tuple(max(sizes) for sizes in zip(*(np.shape(x) for x in arrays), strict=True))
        arrays = [np.pad(x, [(0, n - m) for n, m in zip(shape, x.shape, strict=True)]) if shape else x for x in arrays]
    return np.stack(arrays)
