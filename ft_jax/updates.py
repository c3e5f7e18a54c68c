"""Optimisers and schedules: ``update`` methods ``(**hp) -> optax.GradientTransformation``, and how a config picks one."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from ft_jax import registry, tree
from ft_jax.errors import UserError, nearest
from ft_jax.registry import register

SCHEDULES = {
    "constant": lambda lr, steps: optax.constant_schedule(lr),
    "linear": lambda lr, steps: optax.linear_schedule(lr, 0.0, steps),
    "cosine": lambda lr, steps: optax.cosine_decay_schedule(lr, steps),
}


@register("update", "adamw", paper="arXiv:1711.05101")
def adamw(*, learning_rate=1e-3, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0):
    """AdamW: decoupled weight decay."""
    return optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)


class PullState(NamedTuple):
    """The weights that a pull leads back to."""

    start: optax.Params


def _pull(l1):
    """Adds ``l1 · sign(θ − θ_0)`` to the gradient; θ_0 are the weights at init."""

    def init(params):
        return PullState(jax.tree.map(jnp.copy, params))  # a step donates the weights, and must not donate these twice

    def update(grads, state, params):
        return jax.tree.map(lambda g, x, x0: g + l1 * jnp.sign(x - x0), grads, params, state.start), state

    return optax.GradientTransformation(init, update)


@register("update", "adamw_l1", paper="arXiv:2302.06600")
def adamw_l1(*, learning_rate=1e-3, l1=1e-3, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0):
    """AdamW with an L1 pull to the starting weights θ_0: gradient + l1 · sign(θ − θ_0), added after clipping."""
    return optax.chain(_pull(l1), adamw(learning_rate=learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay))


@register("update", "lora_plus", paper="arXiv:2402.12354")
def lora_plus(*, learning_rate=1e-3, ratio=16.0, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0):
    """LoRA+: AdamW whose learning rate is ``ratio`` times larger for the factors B (paths that end in ``/b``).

    Raises UserError where no such factor trains: it would be plain AdamW.
    """

    def faster(moves, params):
        del params
        return tree.map_with_path(lambda path, x: ratio * x if path.endswith("/b") else x, moves)

    def init(params):
        if not any(path.endswith("/b") for path in tree.flatten(params)):
            raise UserError("update 'lora_plus' is for low-rank kernels, and none trains here; nearest: 'adamw'")
        return tx.init(params)

    tx = optax.chain(
        adamw(learning_rate=learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay), optax.stateless(faster)
    )
    return optax.GradientTransformation(init, tx.update)


@register("update", "sgd", paper="Robbins & Monro 1951")
def sgd(*, learning_rate=1e-3, momentum=0.0, weight_decay=0.0):
    """SGD with optional momentum; weight decay is added to the gradient."""
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(learning_rate, momentum or None))


@register("update", "adafactor", paper="arXiv:1804.04235")
def adafactor(*, learning_rate=1e-3, weight_decay=0.0):
    """Adafactor: factored second moments."""
    return optax.adafactor(learning_rate, weight_decay_rate=weight_decay or None)


@register("update", "lion", paper="arXiv:2302.06675")
def lion(*, learning_rate=1e-4, b1=0.9, b2=0.99, weight_decay=0.0):
    """Lion: the sign of an interpolated momentum."""
    return optax.lion(learning_rate, b1=b1, b2=b2, weight_decay=weight_decay)


def schedule(name, peak, steps, warmup):
    """Learning rate by step: linear warm-up over ``warmup`` (a share of steps below 1, else steps), then ``name``."""
    if name not in SCHEDULES:
        raise UserError(f"no schedule called {name!r}{nearest(name, SCHEDULES)}")
    if warmup < 0:
        raise UserError(f"warm-up is {warmup}; it is a share of the steps below 1, or a number of steps")
    rise = round(warmup * steps) if warmup < 1 else int(warmup)
    if rise >= steps > 0:
        raise UserError(f"warm-up of {rise} steps does not fit a run of {steps} steps")
    after = SCHEDULES[name](peak, max(steps - rise, 1))
    return optax.join_schedules([optax.linear_schedule(0.0, peak, rise), after], [rise]) if rise else after


def build(name, *, learning_rate, steps, schedule_name="linear", warmup=0.06, clip=0.0, **hp):
    """The whole chain: clipping by global norm, the optimiser under its schedule. Returns (transformation, schedule)."""
    lr = schedule(schedule_name, learning_rate, steps, warmup)
    tx = registry.call("update", name, learning_rate=lr, **hp)
    return (optax.chain(optax.clip_by_global_norm(clip), tx) if clip else tx), lr
