"""Gates over single weights: a share of all weights, by chance, by size, or by scores from a file."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np

from ft_jax import tree
from ft_jax.errors import UserError
from ft_jax.io import safetensors
from ft_jax.registry import register

TASK = ("head", "pooler")  # task heads train whatever a gate picks


def _top(trainable, score, share):
    """True for the ``round(share · N)`` largest scores of all N weights together, task heads aside and always on.

    Of equal scores the first in tree order stay. ``score(path, leaf)`` gives an array of the leaf's shape.
    """
    if not 0 < share <= 1:
        raise UserError(f"share is {share}; it is a share of the weights above 0 and up to 1")
    scores = {p: score(p, x) for p, x in tree.flatten(trainable).items() if p.split("/")[0] not in TASK}
    if not scores:
        raise UserError("a mask picks among weights outside the task head, and none trains here")
    # Arrays from a file are ranked here and now: as constants of a compiled program XLA would sort them for minutes.
    xp = np if all(isinstance(x, np.ndarray) for x in scores.values()) else jnp
    flat = xp.concatenate([x.reshape(-1) for x in scores.values()])
    count = round(share * flat.size)
    if not count:
        raise UserError(f"share {share} of {flat.size} weights is not one of them; at least {1 / flat.size:.2g}")
    least = xp.sort(flat)[flat.size - count]
    above, equal = flat > least, flat == least
    on = above | (equal & (xp.cumsum(equal) <= count - above.sum()))
    ends = np.cumsum([x.size for x in scores.values()])[:-1]
    parts = {p: o.reshape(x.shape) for (p, x), o in zip(scores.items(), xp.split(on, ends), strict=True)}
    return tree.map_with_path(lambda p, _: parts.get(p, True), trainable)


def key_of(seed, path=""):
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))


@register("mask", "random", paper="arXiv:2405.02596", gate=True)
def random(trainable, step, *, share=0.01, seed=0):
    """Random masking: a share of the weights drawn uniformly without replacement, exactly round(share · N) of them."""
    del step
    return _top(trainable, lambda path, x: jax.random.uniform(key_of(seed, path), x.shape), share)


@register("mask", "magnitude", paper="arXiv:1506.02626", gate=True)
def magnitude(trainable, step, *, share=0.01, smallest=False):
    """Magnitude mask: the share of the weights with the largest |θ_0| of all (or the smallest)."""
    del step
    return _top(trainable, lambda _, x: -jnp.abs(x) if smallest else jnp.abs(x), share)


def scores_of(file, kind, trainable):
    """``{path: float32 array}`` for every leaf that trains outside the task head, from a file of `importance.save`."""
    if not file:
        raise UserError(f"this mask needs scores=FOLDER, scores of kind {kind!r} by python -m ft_jax.importance")
    held = safetensors.Checkpoint(file)
    if (found := held.metadata().get("scores")) != kind:
        raise UserError(f"{file}: holds scores of kind {found!r}, and this mask takes {kind!r}")
    wanted = {p: x.shape for p, x in tree.flatten(trainable).items() if p.split("/")[0] not in TASK}
    for path, shape in wanted.items():
        if held.shape(path) != shape:
            raise UserError(f"{file}: {path} has scores of shape {held.shape(path)}, its weights are {tuple(shape)}")
    return {path: held.read(path) for path in wanted}


@register("mask", "fisher", paper="arXiv:2111.09839", gate=True)
def fisher(trainable, step, *, share=0.01, scores=""):
    """FISH mask: the share of the weights with the largest Fisher information, the mean over examples of (∂L_i/∂θ)²."""
    del step
    held = scores_of(scores, "fisher", trainable)
    return _top(trainable, lambda path, _: held[path], share)


@register("mask", "movement", paper="arXiv:2005.07683", gate=True)
def movement(trainable, step, *, share=0.01, scores=""):
    """Movement mask: the share with the largest -θ · ∂L/∂θ: weights that the first step moves away from zero."""
    del step
    held = scores_of(scores, "gradient", trainable)
    return _top(trainable, lambda path, x: -x * held[path], share)


@register("mask", "lt_sft", paper="arXiv:2110.07560", gate=True)
def lt_sft(trainable, step, *, share=0.01, scores=""):
    """LT-SFT's second phase: the share with the largest |θ_full - θ_0| of a full run, trained again from θ_0.

    The run starts from the base like any other, so the rewind is that it does; phase one is a run of its own, and
    ``python -m ft_jax.importance --run`` writes its changes as scores.
    """
    del step
    held = scores_of(scores, "change", trainable)
    return _top(trainable, lambda path, _: held[path], share)
