"""Many short runs of tiny models with the one engine: steps under a scan, the learning rate an argument of the program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save

from ft_jax import kernels, train, tree, updates
from ft_jax.io import files

CHUNK = 10  # steps of one call; marks are multiples of it


@functools.lru_cache(maxsize=32)
def _program(objective, steps, warmup):
    def run(state, frozen, rate, batches):
        tx = _update(rate, steps, warmup)
        step = train.make_step(objective, tx, 1, 0)
        return jax.lax.scan(lambda s, batch: step(s, frozen, batch), state, batches)

    return jax.jit(run, donate_argnums=0)


def _update(rate, steps, warmup):
    """The papers' recipe: AdamW without decay, linear warm-up, cosine decay."""
    return updates.build("adamw", learning_rate=rate, steps=steps, schedule_name="cosine", warmup=warmup, clip=1.0)[0]


def fit(objective, params, draw, *, steps, rate, warmup=0.1, mask=None, marks=(), evaluate=None):
    """Trains ``params`` (the leaves that ``mask`` marks; all of them without) on the batches ``draw(count)`` stacks.

    Returns ``(params, {step: evaluate(params)})``, the second for the steps of ``marks``, multiples of `CHUNK`.
    """
    mask = jax.tree.map(lambda _: True, params) if mask is None else mask
    params = jax.tree.map(jnp.copy, params)  # the first step donates them
    trainable, frozen = tree.split(params, mask)
    state = train.TrainState(jnp.zeros((), jnp.int32), trainable, _update(rate, steps, warmup).init(trainable))
    run, seen, losses = _program(objective, steps, warmup), {}, []
    if 0 in marks:
        seen[0] = evaluate(params)
    for start in range(0, steps, CHUNK):
        count = min(CHUNK, steps - start)
        state, metrics = run(state, frozen, jnp.float32(rate), draw(count))
        losses.append(np.asarray(metrics["loss"]))
        if start + count in marks:
            seen[start + count] = evaluate(tree.join(state.trainable, frozen))
    losses = np.concatenate(losses)
    if not np.isfinite(losses).all():
        raise FloatingPointError(f"the loss is not finite at step {int(np.flatnonzero(~np.isfinite(losses))[0]) + 1}")
    return tree.join(state.trainable, frozen), seen, losses


def fresh(model, seed):
    """Random weights of a small model: matrices have standard deviation 1/√d_in instead of the 0.02 of large ones."""
    params = jax.jit(model.init)(jax.random.key(seed))
    return tree.map_with_path(lambda p, x: x * (x.shape[-2] ** -0.5 / 0.02) if p.endswith("/kernel") else x, params)


def lora(params, rank, seed):
    """``(params, mask)`` with LoRA of a rank, α = 2r, on every matrix of the layers."""
    adapted = kernels.adapt(params, [(r"layers/.*/kernel", f"lora(rank={rank}, alpha={2 * rank})")], jax.random.key(seed))
    mask = tree.map_with_path(lambda p, _: p.endswith(("/kernel/a", "/kernel/b")), adapted)
    return adapted, mask


def keep(path, params):
    """Writes a tree of plain arrays."""
    files.make_folder(path.parent)
    files.write(path, save({p: np.asarray(x) for p, x in tree.flatten(kernels.merge(params)).items()}))


def kept(path):
    return jax.tree.map(jnp.asarray, tree.nest(load_file(path)))
