"""Where each of our leaves lies in a checkpoint: one row a tensor, made from the family's name table."""

import typing

from ft_jax import models, tree

PREFIX = {"bert": "bert.", "roberta": "roberta."}  # every other family: "model."
BARE_HEADS = ("none", "pooled", "prototype")  # saved as the bare model, whose names lack the prefix


class Tensor(typing.NamedTuple):
    """``path`` and ``layer`` (None outside the stack) on our side; ``name`` and ``shape`` as in the checkpoint."""

    path: str
    layer: int | None
    name: str
    shape: tuple[int, ...]
    transposed: bool


def prefix(config):
    """What task-model names put before the names of the bare model."""
    return PREFIX.get(config.family, "model.")


def tensors(config):
    """``[Tensor]`` of a model, in the order of its name table, names with the task-model prefix."""
    shapes = {path: s.shape for path, s in tree.flatten(models.Model(config).shapes()).items()}
    rows = []
    for path, name in models.names(config).items():
        shape, transposed = shapes.pop(path), path.endswith("/kernel")
        stacked = "{i}" in name
        shape = shape[1:] if stacked else shape
        shape = shape[::-1] if transposed else shape
        for i in range(config.num_layers) if stacked else (None,):
            rows.append(Tensor(path, i, name.format(i=i), shape, transposed))
    if shapes:
        raise ValueError(f"{config.family}: no checkpoint name for {', '.join(shapes)}")
    return rows


def saved_name(config, name):
    """The name under which a tensor is saved: bare for heads that are not task models of their own."""
    return name.removeprefix(prefix(config)) if config.head in BARE_HEADS else name
