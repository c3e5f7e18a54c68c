"""Blocks shared by encoder and decoder."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ft_jax import parallel
from ft_jax.kernels.base import Kernel, dot
from ft_jax.models import extend
from ft_jax.taps.words import averages

ACTIVATION_FNS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
INIT = nn.initializers.normal(0.02)
REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def weight(module, name, init, shape):
    """A float32 parameter; whatever typed kernel stands in its place is taken as it is."""
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, init, shape, jnp.float32)


class Dense(nn.Module):
    """x W + b; the kernel may be an array or any ``Kernel``."""

    features: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        y = dot(weight(self, "kernel", INIT, (x.shape[-1], self.features)), x)
        if self.use_bias:
            y = y + weight(self, "bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)
        return y


class Columns(nn.Module):
    """The columns ``ids`` of x W, without the others where W is a plain array."""

    features: int
    ids: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        kernel, ids = weight(self, "kernel", INIT, (x.shape[-1], self.features)), jnp.asarray(self.ids)
        return dot(kernel, x)[..., ids] if isinstance(kernel, Kernel) else dot(kernel[:, ids], x)


class Embed(nn.Module):
    size: int
    features: int

    @nn.compact
    def __call__(self, ids, dtype):
        return weight(self, "embedding", INIT, (self.size, self.features)).astype(dtype)[ids]


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) · scale + bias, in float32."""

    eps: float

    @nn.compact
    def __call__(self, x):
        def normed(x, scale, bias):
            y = x.astype(jnp.float32)
            y = y - y.mean(-1, keepdims=True)
            y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
            return (y * scale + bias).astype(x.dtype)

        scale = weight(self, "scale", nn.initializers.ones, (x.shape[-1],))
        return kept_inputs(normed, x, scale, weight(self, "bias", nn.initializers.zeros, (x.shape[-1],)))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · scale, in float32."""

    eps: float

    @nn.compact
    def __call__(self, x):
        def normed(x, scale):
            y = x.astype(jnp.float32)
            y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
            return (y * scale).astype(x.dtype)

        return kept_inputs(normed, x, weight(self, "scale", nn.initializers.ones, (x.shape[-1],)))


def kept_inputs(fn, *args):
    """``fn(*args)`` of which the backward pass keeps the arguments alone: for what is cheap to make again and large to keep."""
    return jax.checkpoint(fn, prevent_cse=False)(*args)  # in a scan, where it stands, nothing could be shared with the forward pass


def dropout(x, rate, rng):
    """Inverted dropout; the identity without an rng."""
    if rng is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(rng, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


class Tapped:
    """The taps of one stretch of the forward pass: moves the named activations, notes those asked for.

    A tap that ``reads`` is handed what passed those sites before; ``after`` stands for what would follow the site, ``then`` for
    the function that makes it. What is
    noted begins ``skip`` positions in: a prompt is no part of it. pool: a layer's modulators (`extend`) by site.
    """

    def __init__(self, taps, capture, skip=0, pool=None):
        self.taps, self.skip, self.pool = taps, skip, pool or {}
        self.asked, self.seen, self.passed = capture, {}, {}
        self.capture = tuple(dict.fromkeys((*capture, *(taps["side"].reads if "side" in taps else ()))))

    def __call__(self, site, x, after=None):
        if site in self.pool:
            x = extend.modulated(x, self.pool[site], self.passed["attn_in"])
        if f"{site}/after" in self.capture:
            self._note(f"{site}/after", after(x))
        if site in self.taps:
            own, here = self.taps[site], {"after": lambda: after(x), "then": lambda: after}
            x = own(x, *(here[name]() if name in here else self.passed[name] for name in own.reads))
        self.passed[site] = x
        if site in self.capture:
            self._note(site, x)
        return x

    def wants(self, site):
        """Whether a tap stands at a site or its activation was asked for."""
        return site in self.taps or site in self.capture

    def _note(self, site, x):
        self.seen[site] = x[:, self.skip :] if self.skip else x

    def side(self, x, seen, allowed):
        """The site ``side``: what its network reads is a constant to the gradient, so none goes down through the layers."""
        self.seen |= seen
        self.passed |= jax.lax.stop_gradient(self.seen) | {"allowed": allowed}
        return self("side", x)

    @property
    def noted(self):
        """What was asked for, without what only a side network reads."""
        return {site: value for site, value in self.seen.items() if site in self.asked}


def taps_of(module):
    return module.get_variable("params", "taps") if module.has_variable("params", "taps") else {}


def stack_size(stack):
    return jax.tree.leaves(stack)[0].shape[0]


def unfolded(stacks, taps):
    """``stacks`` with the ``shared`` ones among the model's taps spread over the layers that train."""
    per_layer = {site: tap.unfold() for site, tap in taps.items() if tap.shared}
    if not per_layer:
        return stacks
    return [*stacks[:-1], {**stacks[-1], "taps": {**stacks[-1].get("taps", {}), **per_layer}}]


def run_layers(layer, stacks, x, context, per_layer, rng, remat, given=None, mesh=None):
    """Scans one layer over stacked weights.

    Args:
      layer: unbound linen module, called as ``layer(x, context, (per_layer_slice, given_slice), rng) -> (x, captured)``.
      stacks: list of parameter trees with a leading layer axis, lowest layers first.
      per_layer: tree of arrays with a leading axis over all layers.
      given: tree of arrays with a leading axis over the layers of the last stack; those below have none.
      mesh: what x is laid out over between the layers.
    Returns:
      x and ``{site: [layers, ...]}`` of what the taps captured.
    """
    total = sum(stack_size(s) for s in stacks)
    keys = None if rng is None else jax.random.split(rng, total)

    def body(x, slices):
        params, extra, own, key = slices
        params = parallel.held(params, mesh)
        x, seen = layer.apply({"params": params}, parallel.spread(x, mesh), context, (extra, own), key)
        return parallel.spread(x, mesh), seen

    if remat != "none":
        body = jax.checkpoint(body, policy=REMAT[remat], prevent_cse=False)
    start, captured = 0, []
    for stack in stacks:
        part = slice(start, start + stack_size(stack))
        start = part.stop
        extra, key = jax.tree.map(lambda a, p=part: a[p], (per_layer, keys))
        own = given if stack is stacks[-1] else None  # else frozen layers would be differentiated through it
        x, seen = jax.lax.scan(body, x, (stack, extra, own, key))
        captured.append(seen)
    return x, jax.tree.map(lambda *parts: jnp.concatenate(parts), *captured)


def apart(params):
    """``params`` whose layers are a tuple of stacks of one, so that a loop around the model finds each layer's weights in one piece.

    A scan cuts them from the stack, which copies them: nothing beside the products of many tokens, and as much as those of a few.
    """
    stacks = [params[name] for name in ("frozen_layers", "layers") if name in params]
    each = tuple(jax.tree.map(lambda x, i=i: x[i : i + 1], stack) for stack in stacks for i in range(stack_size(stack)))
    return {name: value for name, value in params.items() if name != "frozen_layers"} | {"layers": each}


def stacked_params(module, layer, count, *args):
    """The layer stacks of a model: ``[frozen_layers, layers]`` if the stack is split, each layer's if it is `apart`, else ``[layers]``."""
    if module.has_variable("params", "layers"):
        names = [n for n in ("frozen_layers", "layers") if module.has_variable("params", n)]
        found = [module.get_variable("params", n) for n in names]
        return [*found[0]] if isinstance(found[0], tuple) else found

    def init(rng):
        return jax.vmap(lambda r: layer.init(r, *args)["params"])(jax.random.split(rng, count))

    return [module.param("layers", init)]


def mean_pool(x, mask):
    """Mean over real tokens, L2-normalised: [B,T,D], [B,T] -> [B,D] in float32 (sentence-transformers' pooling)."""
    weights = mask.astype(jnp.float32)[..., None]
    mean = (x.astype(jnp.float32) * weights).sum(1) / jnp.maximum(weights.sum(1), 1e-9)
    return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)


def at(x, places):
    """[B,T,D], places [B] -> [B,D]."""
    return jnp.take_along_axis(x, places[:, None, None], axis=1)[:, 0]


def by_class(config, logits, tap):
    """The logits of classes from those of their label words, by the mean; the words' own are there for a tap to read."""
    if config.head != "label_words":
        return logits
    tap.passed["words"] = logits
    counts = [len(ids) for ids in config.words]
    return logits if max(counts) == 1 else logits @ averages(counts)


def last_real(real):
    """[B]: the place of the last real token, on whichever side the padding is."""
    return real.shape[1] - 1 - jnp.argmax(real[:, ::-1], axis=1)


def real_tokens(inputs):
    """bool [B,T]: which tokens are real, from segment_ids or attention_mask (all of them without either)."""
    for key in ("segment_ids", "attention_mask"):
        if key in inputs:
            return inputs[key] > 0
    return jnp.ones(inputs["input_ids"].shape, bool)


def rope_frequencies(config):
    """(inverse frequencies [head_dim/2], factor on cos and sin) for each supported scaling.

    default: theta^(-2i/d); linear: / factor; llama3: Llama 3.1 report; yarn: arXiv:2309.00071.
    """
    dim, theta = config.head_dim, config.rope_theta
    inverse = theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    scaling = dict(config.rope_scaling)
    kind = scaling.get("rope_type", "default")
    if kind == "linear":
        return inverse / scaling["factor"], 1.0
    if kind == "llama3":
        factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
        original = scaling["original_max_position_embeddings"]
        smooth = np.clip((original * inverse / (2 * np.pi) - low) / (high - low), 0.0, 1.0)
        return inverse * ((1 - smooth) / factor + smooth), 1.0
    if kind == "yarn":
        factor, original = scaling["factor"], scaling["original_max_position_embeddings"]

        def dim_of(rotations):
            return dim * np.log(original / (rotations * 2 * np.pi)) / (2 * np.log(theta))

        low = max(np.floor(dim_of(scaling.get("beta_fast", 32))), 0)
        high = min(np.ceil(dim_of(scaling.get("beta_slow", 1))), dim - 1)
        ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0, 1)
        attention = scaling.get("attention_factor") or 0.1 * np.log(max(factor, 1.0)) + 1.0
        return inverse / factor * ramp + inverse * (1 - ramp), float(attention)
    return inverse, 1.0


def rope_tables(config, positions):
    """cos, sin ``[B,T,head_dim]`` in float32 for positions ``[B,T]``."""
    inverse, factor = rope_frequencies(config)
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(inverse, jnp.float32)
    angles = jnp.concatenate([angles, angles], -1)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x, cos, sin):
    """Rotary position embedding in the half-split form; x ``[B,T,heads,head_dim]``."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([-second, first], -1)
    return (x.astype(jnp.float32) * cos[:, :, None] + turned * sin[:, :, None]).astype(x.dtype)
