"""Optimisers and schedules: ``update`` methods ``(**hp) -> optax.GradientTransformation``, and how a config picks one.

The engine hands every update, beside the gradient, ``grad_fn(weights, i) -> gradient`` of the batch at other weights,
``each(fn) -> Σ fn(gradient of one example)`` and ``outputs() -> Σ |x W + b|`` by path; what an update does not call costs
nothing.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ft_jax import gated, masks, registry, tree
from ft_jax.errors import UserError, nearest
from ft_jax.io import hf
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


class EightBit(NamedTuple):
    """Numbers as codes of `dynamic_codes`, uint8 ``[blocks, 256]``, times the largest of their block, ``[blocks]``."""

    codes: jax.Array
    scale: jax.Array


BLOCK, SMALLEST = 256, 4096  # numbers that share a scale; leaves with fewer numbers than SMALLEST stay in float32


def dynamic_codes(signed):
    """The 256 values of dynamic 8-bit quantisation, ascending: 0, 1 and the middles of the bins of each decade below 1.

    10^-i · [0.1, 1] has 2^(6-i) equal bins where signed (and as many below 0), else 2^(7-i), i = 0 … 6.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1, 2 ** (6 - i + (not signed)) + 1) * 10.0**-i
        middles = (edges[1:] + edges[:-1]) / 2
        values += [*middles, *-middles] if signed else [*middles]
    return np.sort(np.asarray(values, np.float32))


def _quantise(x, signed):
    if x.size < SMALLEST:
        return x
    blocks = jnp.pad(x.reshape(-1), (0, -x.size % BLOCK)).reshape(-1, BLOCK)
    scale = jnp.abs(blocks).max(1)
    return EightBit(_nearest(blocks / jnp.maximum(scale, 1e-30)[:, None], signed).astype(jnp.uint8), scale)


def _nearest(x, signed):
    """Places in `dynamic_codes` of the values nearest to x in [-1, 1], by the bin in its decade; a binary search takes some twenty times as long."""
    codes = dynamic_codes(signed)
    codes, size = codes[codes >= 0], jnp.abs(x)
    counts = [1, *(2 ** (6 - i + (not signed)) for i in range(6, -1, -1)), 1]  # 0, the decades, 1
    place, low, bins, last = (jnp.zeros_like(size) for _ in range(4))  # those of 0
    for start, count in zip(np.cumsum(counts).tolist(), counts[1:]):
        width = float(codes[start + 1] - codes[start]) if count > 1 else 1.0
        above, own = size > (codes[start] + codes[start - 1]) / 2, (start, float(codes[start]) - width / 2, 1 / width, count - 1)
        place, low, bins, last = (jnp.where(above, new, old) for new, old in zip(own, (place, low, bins, last)))
    place += jnp.clip(jnp.floor((size - low) * bins), 0, last)
    return jnp.where(x < 0, 127 - jnp.minimum(place, 127), 127 + place) if signed else place


def _dequantise(x, like, signed):
    if not isinstance(x, EightBit):
        return x
    values = jnp.asarray(dynamic_codes(signed))[x.codes] * x.scale[:, None]
    return values.reshape(-1)[: like.size].reshape(like.shape)


@register("update", "adamw_8bit", paper="arXiv:2110.02861")
def adamw_8bit(*, learning_rate=1e-3, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0):
    """AdamW whose moments are kept in 8 bits: block-wise dynamic quantisation, decoded and coded again each step.

    About 2.03 bytes of state a weight instead of 8; leaves of under 4096 numbers keep float32 moments.
    """

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        held = (jax.tree.map(functools.partial(_quantise, signed=s), zeros) for s in (True, False))
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), *held)

    def update(grads, state, params=None):
        del params
        mu, nu = (jax.tree.map(lambda g, m, s=s: _dequantise(m, g, s), grads, held)
                  for s, held in ((True, state.mu), (False, state.nu)))  # fmt: skip
        plain = optax.scale_by_adam(b1, b2, eps)
        moves, new = plain.update(grads, optax.ScaleByAdamState(state.count, mu, nu))
        mu, nu = (jax.tree.map(functools.partial(_quantise, signed=s), m) for s, m in ((True, new.mu), (False, new.nu)))
        return moves, optax.ScaleByAdamState(new.count, mu, nu)

    return optax.chain(optax.GradientTransformation(init, update), optax.add_decayed_weights(weight_decay),
                       optax.scale_by_learning_rate(learning_rate))  # fmt: skip


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


@register("update", "adamw_l1", paper="arXiv:2302.06600", whole=True)
def adamw_l1(*, learning_rate=1e-3, l1=1e-3, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0):
    """AdamW with an L1 pull to the starting weights θ_0: gradient + l1 · sign(θ − θ_0), added after clipping."""
    return optax.chain(_pull(l1), adamw(learning_rate=learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay))


def _needs_low_rank(name, tx):
    """``tx`` that is refused where no factor B of a low-rank kernel trains."""

    def init(params):
        if not any(path.endswith("/b") for path in tree.flatten(params)):
            raise UserError(f"update {name!r} is for low-rank kernels, and none trains here; nearest: 'adamw'")
        return tx.init(params)

    return optax.GradientTransformation(init, tx.update)


@register("update", "lora_plus", paper="arXiv:2402.12354", whole=True)
def lora_plus(*, learning_rate=1e-3, ratio=16.0, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0):
    """LoRA+: AdamW whose learning rate is ``ratio`` times larger for the factors B (paths that end in ``/b``).

    Raises UserError where no such factor trains: it would be plain AdamW.
    """

    def faster(moves, params):
        del params
        return tree.map_with_path(lambda path, x: ratio * x if path.endswith("/b") else x, moves)

    plain = adamw(learning_rate=learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    return _needs_low_rank("lora_plus", optax.chain(plain, optax.stateless(faster)))


@register("update", "allora", paper="arXiv:2410.09692", whole=True)
def allora(*, learning_rate=1e-3, eta=1.0, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0):
    """ALLoRA: gradient · 1 / sqrt(‖row‖ + 1/eta²) for the factors of low-rank kernels, then AdamW.

    A row is what meets one input unit in A, one output unit in B. The paper has neither dropout nor a scale: take
    alpha = rank. The exact form is from a secondary source. Raises UserError where no low-rank factor trains.
    """

    def scaled(grads, params):
        def one(path, g, x):
            axis = {"/a": -1, "/b": -2}.get(path[-2:])
            return g if axis is None else g * jax.lax.rsqrt(jnp.linalg.norm(x, axis=axis, keepdims=True) + eta**-2)

        return tree.map_with_path(one, grads, params)

    plain = adamw(learning_rate=learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    return _needs_low_rank("allora", optax.chain(optax.stateless(scaled), plain))


@register("update", "layerwise_decay", paper="arXiv:1801.06146", whole=True)
def layerwise_decay(*, learning_rate=1e-3, decay=0.8, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0):
    """Layer-wise decay: AdamW at rate · decay^d, d = 0 for the head, 1 for the top layer, L + 1 for the embeddings.

    L counts the layers that train: with the lowest ones frozen the others keep their rates. Weight decay follows.
    """
    if not 0 < decay <= 1:
        raise UserError(f"update 'layerwise_decay': decay is {decay}; it is a factor above 0 and up to 1")

    def slower(moves, params):
        del params
        depth = next((x.shape[0] for p, x in tree.flatten(moves).items() if p.startswith("layers/")), 0)

        def one(path, x):
            if path.startswith("embed/"):
                return x * decay ** (depth + 1)
            factors = decay ** jnp.arange(depth, 0, -1, dtype=x.dtype)
            return x * masks.spread(factors, x) if path.startswith("layers/") else x

        return tree.map_with_path(one, moves)

    plain = adamw(learning_rate=learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    return optax.chain(plain, optax.stateless(slower))


@register("update", "sam", paper="arXiv:2010.01412", whole=True)
def sam(*, learning_rate=1e-3, rho=0.05, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0):
    """SAM: AdamW on the gradient taken at θ + rho · g / ‖g‖, two gradients a step."""
    plain = adamw(learning_rate=learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    both = optax.contrib.sam(plain, optax.chain(optax.contrib.normalize(), optax.sgd(rho)), opaque_mode=True)

    def update(grads, state, params=None, *, grad_fn, **extra):
        del extra
        return both.update(grads, state, params, grad_fn=grad_fn)

    return optax.GradientTransformationExtraArgs(both.init, update)


class PriorState(NamedTuple):
    """The unit directions Δ / ‖Δ‖ of a drift, None where there is none."""

    towards: optax.Params


@register("update", "drift", paper="arXiv:2510.15050", whole=True)
def drift(*, learning_rate=1e-3, prior="", alpha=1.0, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0):
    """DRIFT: gradient - alpha · ‖gradient‖ · Δ/‖Δ‖ for attention's and MLP's matrices and biases, Δ = prior - θ_0; AdamW.

    prior: a model folder or asset of the same shape. Norms are of one layer's matrix; where Δ = 0 nothing is added.
    Raises UserError without a prior, or where its shapes differ.
    """
    if not prior:
        raise UserError("update 'drift' needs prior=FOLDER, the model whose weights the gradient is drawn towards")

    def norm(x):
        return jnp.sqrt(jnp.square(x).sum(tuple(range(1, x.ndim)), keepdims=True))

    def init(params):
        held = tree.flatten(hf.load(prior, head="none")[1])

        def one(path, x):
            if not path.startswith(("layers/attn/", "layers/mlp/")):
                return jnp.zeros((), x.dtype)
            if path not in held or held[path].shape != x.shape:
                raise UserError(f"update 'drift': {prior!r} has no {path} of shape {x.shape}; it is for plain weights, "
                                "and the prior a model of the same shape")
            delta = held[path] - x
            return delta / jnp.maximum(norm(delta), 1e-12)

        return PriorState(tree.map_with_path(one, params))

    def update(grads, state, params=None):
        del params
        pulled = jax.tree.map(lambda g, d: g - alpha * norm(g) * d if d.ndim else g, grads, state.towards)
        return pulled, state

    plain = adamw(learning_rate=learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    return optax.chain(optax.GradientTransformation(init, update), plain)


class NoiseState(NamedTuple):
    """Noisy sums so far: the noise of the next one is a function of the seed and of this."""

    count: jax.Array


def _private(max_norm, noise, seed):
    """(Σ_i g_i · min(1, C/‖g_i‖) + noise · C · N(0, I)) / B over the B examples of a batch, C = max_norm."""
    if max_norm <= 0 or noise < 0:
        raise UserError(f"privacy needs max_norm > 0 and noise >= 0, not max_norm={max_norm} and noise={noise}")

    def clipped(grads):
        factor = jnp.minimum(1.0, max_norm / jnp.maximum(optax.global_norm(grads), 1e-12))
        return jax.tree.map(lambda g: g * factor, grads)

    def update(grads, state, params=None, *, each, **extra):
        del params, extra
        total, examples = each(clipped)
        key = jax.random.fold_in(jax.random.key(seed), state.count)
        leaves, structure = jax.tree.flatten(total)
        keys = jax.random.split(key, len(leaves))
        drawn = (noise * max_norm * jax.random.normal(k, g.shape, g.dtype) for g, k in zip(leaves, keys))
        noisy = [(g + n) / examples for g, n in zip(leaves, drawn)]
        return jax.tree.unflatten(structure, noisy), NoiseState(state.count + 1)

    return optax.GradientTransformationExtraArgs(lambda params: NoiseState(jnp.zeros((), jnp.int32)), update)


@register("update", "dp_sgd", paper="arXiv:1607.00133", whole=True)
def dp_sgd(*, learning_rate=1e-2, max_norm=1.0, noise=1.0, momentum=0.0, seed=0):
    """DP-SGD: SGD on (Σ_i g_i · min(1, C/‖g_i‖) + noise · C · N(0, I)) / B, g_i of one example, C = ``max_norm``.

    Spends `epsilon`. Needs optimizer.clip = 0: the mean gradient is not clipped again. The log is not private: it holds
    the loss and the norm of the plain gradient.
    """
    return optax.chain(_private(max_norm, noise, seed), optax.sgd(learning_rate, momentum or None))


@register("update", "dp_adamw", paper="arXiv:2110.05679", whole=True)
def dp_adamw(*, learning_rate=1e-3, max_norm=1.0, noise=1.0, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, seed=0):
    """DP-Adam: AdamW on the clipped, noisy mean of `dp_sgd`; the same privacy for the same noise and steps."""
    plain = adamw(learning_rate=learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    return optax.chain(_private(max_norm, noise, seed), plain)


PRIVATE = ("dp_sgd", "dp_adamw")


def epsilon(noise, batch_size, examples, steps, delta=1e-5):
    """ε of (ε, δ)-differential privacy that `dp_sgd` spends, by dp-accounting's Rényi accountant (arXiv:1908.10530).

    It accounts for batches that hold each example with probability batch_size / examples; batches here are drawn
    without replacement from a shuffled epoch, for which that is the customary approximation. Infinite without noise.
    """
    import dp_accounting

    if noise == 0:
        return float("inf")
    if not 0 < batch_size <= examples:
        raise UserError(f"a batch of {batch_size} cannot be drawn from {examples} examples")
    step = dp_accounting.PoissonSampledDpEvent(batch_size / examples, dp_accounting.GaussianDpEvent(noise))
    accountant = dp_accounting.rdp.RdpAccountant()
    return float(accountant.compose(dp_accounting.SelfComposedDpEvent(step, steps)).get_epsilon(delta))


def spent(optimizer, batch_size, examples, steps):
    """What the summary of a run says of privacy: ``{"epsilon": …, "delta": 1 / examples}``, empty without DP."""
    if optimizer["name"] not in PRIVATE:
        return {}
    defaults = registry.get("update", optimizer["name"]).hyperparameters
    noise, delta = (defaults | optimizer["hp"])["noise"], 1 / examples
    value = epsilon(noise, batch_size, examples, steps, delta)
    return {"epsilon": value if value < float("inf") else None, "delta": delta}


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


def build(name, *, learning_rate, steps, schedule_name="linear", warmup=0.06, clip=0.0, mask="rules", **hp):
    """The chain: gates, clipping by global norm, the optimiser under its schedule. Returns (transformation, schedule).

    ``mask`` is that of the config: its gates stand around clipping and optimiser. Raises UserError for an update that
    sees the tree as a whole under a mask that draws layers, and for a private one that would be clipped twice.
    """
    lr, gates = schedule(schedule_name, learning_rate, steps, warmup), masks.gates(mask)
    if "steps" in registry.get("update", name).hyperparameters:  # an update with a schedule of its own
        hp["steps"] = steps
    make = functools.partial(registry.call, "update", name, **hp)
    if clip and name in PRIVATE:
        raise UserError(f"update {name!r} clips each example; set optimizer.clip to 0, it is {clip}")
    if gates and gates.drawn:
        if registry.get("update", name).traits["whole"]:
            raise UserError(f"update {name!r} sees the tree as a whole, and mask {gates.drawn[0]!r} draws layers anew; "
                            "nearest: 'adamw'")
        tx = gated.drawn(make, lr, clip, *gates.drawn)
    else:
        tx = make(learning_rate=lr)
        tx = gated.clipped(clip, tx) if clip else tx
    return (gated.fixed(tx, gates.fixed) if gates and gates.fixed else tx), lr
