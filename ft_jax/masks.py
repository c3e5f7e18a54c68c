"""Which leaves train: mask methods ``(params, step, **hp) -> tree of bool``, and the split of a layer stack."""

import jax

from ft_jax import tree
from ft_jax.errors import UserError
from ft_jax.registry import register


def _declares(x):
    return hasattr(type(x), "trainable")


@register("mask", "declared", paper="ft_jax")
def declared(params, step):
    """The fields that kernels and taps declare trainable, nothing else."""
    del step

    def mark(leaf):
        if not _declares(leaf):
            return False
        fields = {
            name: mark(value) if _declares(value) else jax.tree.map(lambda _, n=name: n in leaf.trainable, value)
            for name, value in vars(leaf).items()
        }
        return leaf.replace(**fields)

    return _keep_low_layers_frozen(jax.tree.map(mark, params, is_leaf=_declares))


def _keep_low_layers_frozen(mask):
    """What ``split_layers`` set apart never trains, whatever a method marks."""
    return tree.map_with_path(lambda p, m: m and not p.startswith("frozen_layers/"), mask)


@register("mask", "rules", paper="ft_jax")
def rules(params, step, *, trainable=()):
    """Ordered regex rules ``(pattern over paths, bool)``; the first full match decides, no match is frozen.

    Without rules: what kernels and taps declare plus the task head; if there are none, every leaf, but in a split
    stack not the embeddings (below the frozen layers: training them would send the backward pass through those).
    Fields that a kernel does not declare (its base, its scale) and frozen layers never train.
    """
    allowed = declared(params, step)
    special = any(_declares(x) for x in jax.tree.leaves(params, is_leaf=_declares))
    leaves = tree.flatten(params)
    if not trainable:
        below = ("embed",) if "frozen_layers" in params else ()
        chosen = {p: t in ("head", "pooler") if special else t not in below for p in leaves for t in [p.split("/")[0]]}
        mask = tree.map_with_path(lambda p, a: a or chosen[p], allowed)
    else:
        chosen = tree.match([(r, bool(v)) for r, v in trainable], leaves, what="trainable rule", default=False)
        mask = tree.map_with_path(lambda p, _: chosen[p], allowed)
    return _keep_low_layers_frozen(_keep_bases_frozen(params, mask, allowed))


def _keep_bases_frozen(params, mask, allowed):
    """Inside a kernel or tap only declared fields may train, whatever a rule's regex also catches."""
    return jax.tree.map(
        lambda leaf, m, a: jax.tree.map(lambda x, y: x and y, m, a) if _declares(leaf) else m,
        params, mask, allowed, is_leaf=_declares,
    )  # fmt: skip


@register("mask", "bitfit", paper="arXiv:2106.10199")
def bitfit(params, step):
    """BitFit: every bias and the task head."""
    del step
    marked = tree.map_with_path(lambda p, _: p.endswith("/bias") or p.split("/")[0] == "head", params)
    return _keep_low_layers_frozen(marked)


def split_layers(params, frozen):
    """Moves the lowest ``frozen`` layers of ``layers/`` to ``frozen_layers/``: the backward pass stops above them."""
    if frozen == 0:
        return params
    total = jax.tree.leaves(params["layers"])[0].shape[0]
    if not 0 < frozen < total:
        raise UserError(f"cannot freeze the lowest {frozen} of {total} layers; at most {total - 1}")
    low, high = (jax.tree.map(lambda x, s=s: x[s], params["layers"]) for s in (slice(0, frozen), slice(frozen, None)))
    return {**params, "frozen_layers": low, "layers": high}


def join_layers(params):
    """Inverse of ``split_layers``, for trees of plain arrays."""
    if "frozen_layers" not in params:
        return params
    rest = {k: v for k, v in params.items() if k != "frozen_layers"}
    joined = jax.tree.map(lambda a, b: jax.numpy.concatenate([a, b]), params["frozen_layers"], params["layers"])
    return {**rest, "layers": joined}
