"""Updates that go by what parts of matrices are worth: AdaLoRA's falling budget, MIGU's outputs, CoFiTune's soft mask."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ft_jax import masks, tree
from ft_jax.errors import UserError
from ft_jax.kernels import subspace
from ft_jax.registry import register
from ft_jax.updates import adamw

# Matrices whose outputs CoFiTune's soft mask goes by, and the site where a gate on them is felt.
GATED = {"layers/mlp/up/kernel": "ffn_hidden", "layers/mlp/down/kernel": "ffn_out"}


class BudgetState(NamedTuple):
    """Steps taken, AdaLoRA's smoothed sensitivity and uncertainty, the optimiser's state."""

    step: jax.Array
    seen: tuple
    inner: optax.OptState


def plan(steps, total, target, begin, end, every):
    """(budgets, due), each [steps + 1]: how many triplets may be left after a step, and whether they are cut there.

    Of ``total`` all stay up to ``begin`` · steps; then `subspace.budget_at` falls to ``target``, cut every ``every`` steps,
    and after ``end`` · steps at every one. Raises UserError for shares that leave no step in between.
    """
    first, last = round(begin * steps), round(end * steps)
    if not 0 <= first < last <= steps or every < 1:
        raise UserError(f"update 'adalora_adamw': begin {begin} and end {end} of {steps} steps, every {every}: the budget falls "
                        "between two shares of the steps, and is cut every step or more")  # fmt: skip
    at = {"start": total, "target": target, "warmup": first, "final": steps - last, "total": steps}
    taken = np.arange(steps + 1)
    return (np.asarray([subspace.budget_at(s, **at) for s in taken], np.int32),
            (taken > first) & ((taken > last) | (taken % every == 0)))  # fmt: skip


@register("update", "adalora_adamw", paper="arXiv:2303.10512", whole=True)
def adalora_adamw(*, learning_rate=1e-3, target=8.0, begin=0.1, end=0.7, every=10, beta1=0.85, beta2=0.85, steps=1000,
                  b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0):  # fmt: skip
    """AdaLoRA's allocation: AdamW, and Λ = 0 but for the b(t) triplets of the highest smoothed |w ∂L/∂w| of all matrices.

    b(t) falls with (1 - t)³ from all triplets to ``target`` a matrix on average, between the shares ``begin`` and ``end``
    of the run's steps. ``steps`` is filled in by the run. Raises UserError where no AdaLoRA kernel trains or fewer
    triplets than ``target``.
    """
    plain = adamw(learning_rate=learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)

    def planned(params):
        sizes = [fields["e"] for fields in subspace.triplets(params).values()]
        if not sizes:
            raise UserError("update 'adalora_adamw' is for AdaLoRA's kernels, and none trains here; nearest: 'adamw'")
        total, matrices = (sum(n) for n in zip(*((e.size, e.size // e.shape[-1]) for e in sizes)))
        if not 0 < target * matrices <= total:
            raise UserError(f"update 'adalora_adamw': target {target} is not above 0 and up to the mean rank {total / matrices:g}")
        return plan(steps, total, round(target * matrices), begin, end, every)

    def init(params):
        planned(params)
        seen = jax.tree.map(jnp.zeros_like, subspace.triplets(params))
        return BudgetState(jnp.zeros((), jnp.int32), (seen, seen), plain.init(params))

    def update(grads, state, params):
        budgets, due = (jnp.asarray(x) for x in planned(params))
        seen = subspace.importance(params, grads, state.seen, beta1=beta1, beta2=beta2)
        moves, inner = plain.update(grads, state.inner, params)
        step = state.step + 1
        moved = optax.apply_updates(params, moves)
        left = subspace.allocate(moved, seen, budgets[step])
        cut = jax.tree.map(lambda move, x, new, kept: jnp.where(due[step] & (new != kept), -x, move), moves, params, moved, left)
        return cut, BudgetState(step, seen, inner)

    return optax.GradientTransformation(init, update)


def quantile(x, q):
    """`torch.quantile(x, q)` along the last axis, which stays as one of size 1: linear between neighbours, in float32.

    As torch it goes from the lower neighbour by a weight: of equal numbers none comes to lie below the result.
    """
    ordered, rank = jnp.sort(x, axis=-1), np.float32(q) * np.float32(x.shape[-1] - 1)
    low, weight = int(rank), rank - np.floor(rank)
    a, b = ordered[..., low, None], ordered[..., int(np.ceil(rank)), None]
    return a + weight * (b - a) if weight < 0.5 else b - (1 - weight) * (b - a)


@register("update", "migu", paper="arXiv:2406.17245", whole=True)
def migu(*, learning_rate=1e-3, share=0.3, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0):
    """MIGU: AdamW on the gradient of the outputs whose Σ |x W + b| over a batch reaches a matrix's (1 - share)-quantile.

    For matrices of the layers, with their biases, and the B of low-rank kernels; the rest of the tree trains throughout.
    The quantile is that of the published code, which counts padding too where this one does not. Gradients are cut, as
    published; what momentum holds still moves. Raises UserError for a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise UserError(f"update 'migu': share is {share}; it is a share of a matrix's outputs above 0 and up to 1")
    plain = adamw(learning_rate=learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)

    def update(grads, state, params=None, *, outputs, **extra):
        del extra
        on = {}
        for path, size in outputs().items():
            on |= dict.fromkeys((path, path.removesuffix("kernel") + "bias", path + "/b"), size >= quantile(size, 1 - share))

        def cut(path, g):
            return g * (on[path][:, None] if g.ndim == 3 else on[path]).astype(g.dtype) if path in on else g

        return plain.update(tree.map_with_path(cut, grads), state, params)

    return optax.GradientTransformationExtraArgs(plain.init, update)


class SoftState(NamedTuple):
    """How open the gradient of each FFN unit is, by path, and the optimiser's state."""

    openness: dict
    inner: optax.OptState


@register("update", "cofitune_soft", paper="arXiv:2404.10306", whole=True)
def cofitune_soft(*, learning_rate=1e-3, scores="", b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0):
    """CoFiTune's soft mask: AdamW on (1 - I) · gradient, I = |tanh((s - mean) / std)|, s the slope of a gate on a unit.

    For the outputs of mlp/up and mlp/down, with their biases: mean and std (of n - 1) are over a layer's units of one of
    them, s keeps its sign. scores: a folder by ``python -m ft_jax.importance --kind=disagreement`` on general text.
    A unit's openness multiplies its own weights, as the paper has it; the published patch of its optimiser repeats it along
    the flat gradient instead, where it meets other units. Raises UserError without scores or where neither trains.
    """
    plain = adamw(learning_rate=learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)

    def init(params):
        held = tree.flatten(params)
        widths = {path: held[path].shape[:1] + held[path].shape[-1:] for path in GATED if path in held}
        if not widths:
            raise UserError(f"update 'cofitune_soft' goes by the units of {' and '.join(GATED)}, and neither trains here as a plain matrix")
        wanted = tree.nest({path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in widths.items()})
        at = {}
        for path, slope in masks.scores_of(scores, "disagreement", wanted).items():
            far = (slope - slope.mean(-1, keepdims=True)) / np.maximum(slope.std(-1, ddof=1, keepdims=True), 1e-30)
            free = jnp.asarray(1 - np.abs(np.tanh(far)))
            at |= {path: free[:, None], path.removesuffix("kernel") + "bias": free}
        return SoftState({path: x for path, x in at.items() if path in held}, plain.init(params))

    def update(grads, state, params=None):
        soft = tree.map_with_path(lambda path, g: g * state.openness[path] if path in state.openness else g, grads)
        moves, inner = plain.update(soft, state.inner, params)
        return moves, SoftState(state.openness, inner)

    return optax.GradientTransformation(init, update)
