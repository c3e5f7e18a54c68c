"""Optimisers and schedules: ``update`` methods ``(**hp) -> optax.GradientTransformation``, and how a config picks one."""

import optax

from ft_jax import registry
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
