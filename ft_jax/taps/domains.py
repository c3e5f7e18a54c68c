"""Mixture-of-domain-adapters (MixDA, arXiv:2306.05406): adapters beside the FFN's last matrix, weighed with it by a gate.

Stage 1, ``mixda_domain``, learns an adapter from a domain's texts; stage 2, ``mixda``, takes those of several runs, frozen,
and trains the gate with a task adapter. Both follow the published code: an adapter reads the FFN's hidden units (the paper:
its input), the gate weighs the FFN too, and in an encoder goes by the row's last position, padding or not. In a decoder,
which the code has not, a position has a gate of its own: the last one would tell it what follows. Left out: dropout in the
gate, and the choice of layers (7 and 11 of 24): every layer that trains has one. Einsum letters: b row, t position, n adapter,
f hidden unit of the FFN, m of an adapter, o feature.
"""

import jax
import jax.numpy as jnp
from flax import struct

from ft_jax.errors import UserError
from ft_jax.registry import Parents, register
from ft_jax.taps import Tap
from ft_jax.taps.adapters import ACTIVATIONS, check_size, lora_like, normal

ADAPTERS = ("down", "down_bias", "up", "up_bias")
GATE = ("gate_in", "gate_in_bias", "gate_mid", "gate_mid_bias", "gate_out", "gate_out_bias")
TASK = ("task_down", "task_down_bias", "task_up", "task_up_bias")


@struct.dataclass
class Mixed(Tap):
    """Σ_i g_i (gelu(h D_i + d_i) U_i + u_i) + g_n y; y the FFN's output, h its hidden units, g = softmax(MLP(h)) ``[…, n + 1]``.

    D ``[..., n, f, m]``, U ``[..., n, m, o]``; the MLP has three ReLU layers of one width: ``gate_mid`` holds two of them.
    """

    down: jax.Array
    down_bias: jax.Array
    up: jax.Array
    up_bias: jax.Array
    gate_in: jax.Array
    gate_in_bias: jax.Array
    gate_mid: jax.Array
    gate_mid_bias: jax.Array
    gate_out: jax.Array
    gate_out_bias: jax.Array
    by_token: bool = struct.field(pytree_node=False)

    static, reads = ("by_token",), ("ffn_hidden",)

    def gates(self, h):
        """float32 ``[B, T, n + 1]``, or ``[B, 1, n + 1]`` for all positions of a row; the FFN's weight is the last."""
        x = (h if self.by_token else h[:, -1:]).astype(jnp.float32)
        x = jax.nn.relu(x @ self.gate_in + self.gate_in_bias)
        for i in range(self.gate_mid.shape[0]):
            x = jax.nn.relu(x @ self.gate_mid[i] + self.gate_mid_bias[i])
        return jax.nn.softmax(x @ self.gate_out + self.gate_out_bias, axis=-1)

    def __call__(self, x, h):
        down, down_bias, up, up_bias, g = (w.astype(x.dtype) for w in (*(getattr(self, name) for name in ADAPTERS), self.gates(h)))
        inner = ACTIVATIONS["gelu"](jnp.einsum("btf,nfm->btnm", h, down) + down_bias) * g[..., :-1, None]
        return jnp.einsum("btnm,nmo->bto", inner, up) + g[..., :-1] @ up_bias + g[..., -1:] * x


@struct.dataclass
class Domain(Mixed):
    """`Mixed` of one adapter, all of which trains; weight ``[...]`` of the term that keeps the layer as it was, None without."""

    weight: jax.Array | None = None
    domain: int = struct.field(pytree_node=False, default=0)

    trainable, static = (*ADAPTERS, *GATE), ("by_token", "domain")
    term, sees = "keep", ("ffn_out/after", "block_out")

    def check_tasks(self, tasks):
        if not self.domain < tasks or tasks < 2:
            raise UserError(f"mixda_domain keeps the layers' outputs on other texts than those of source {self.domain}, and the data "
                            f"have {tasks or 'no'} sources with task ids; give them as data=DOMAIN+OTHER, or keep=0")

    def penalty(self, before, after, real, tasks):
        """The mean over the real tokens of other texts, and over features, of (layer's output with the tap - without)²."""
        other = real * (tasks != self.domain)[:, None]
        return (jnp.square(after - before).mean(-1) * other).sum() / jnp.maximum(other.sum(), 1)


@struct.dataclass
class Mixture(Mixed):
    """`Mixed` with its adapters frozen, and z = that of it: z + silu(h D + d) U + u, h what would follow z; the gate and these train."""

    task_down: jax.Array
    task_down_bias: jax.Array
    task_up: jax.Array
    task_up_bias: jax.Array

    trainable, reads = (*GATE, *TASK), ("ffn_hidden", "then")

    def __call__(self, x, h, then):
        mixed = Mixed.__call__(self, x, h)
        down, down_bias, up, up_bias = (getattr(self, name).astype(x.dtype) for name in TASK)
        return mixed + jax.nn.silu(then(mixed) @ down + down_bias) @ up + up_bias


def _sizes(name, site, shape, widths, reduction, width):
    if site != "ffn_out":
        raise UserError(f"{name}: domain adapters stand beside the FFN, at the site 'ffn_out', not at {site!r}")
    if reduction < 1:
        raise UserError(f"{name}: reduction {reduction} is below 1")
    *stack, features = shape
    check_size(name, widths["ffn_hidden"] // reduction, widths["ffn_hidden"])
    check_size(name, width, max(width, 1), "width")
    return stack, features, widths["ffn_hidden"]


def _linear(name, draw, rng, *shape, last=False):
    """A matrix and a bias of zeros."""
    return {name: draw(rng, shape, last), f"{name}_bias": jnp.zeros((*shape[:-2], shape[-1]), jnp.float32)}


def _gate(rng, stack, hidden, width, count):
    keys = jax.random.split(rng, 3)
    return (_linear("gate_in", lora_like, keys[0], *stack, hidden, width) | _linear("gate_mid", lora_like, keys[1], *stack, 2, width, width)
            | _linear("gate_out", lora_like, keys[2], *stack, width, count + 1))  # fmt: skip


@register("tap", "mixda_domain", paper="arXiv:2306.05406", sites="ffn_out", needs=("widths", "config"), start="moved", fit={"width": 8})
def mixda_domain(site, shape, rng, *, reduction=16, width=768, keep=2.0, domain=0, widths=None, config=None):
    """MixDA's stage 1: g_0 (gelu(h D + d) U + u) + g_1 y, and a term that keeps the layers' outputs on other sources' texts.

    For a run of a language model (objective mlm or causal_lm) on several sources: the loss is of the one numbered ``domain``,
    and ``keep`` times the mean square of what the tap changes of the layer's output is of the others (the published code: 0.5
    of the one, 1 of the other; 0: none, and all rows in the loss). f / ``reduction`` units, a gate of ``width``; D as torch
    draws it, U = 0, yet the gate takes about half of y away at the start, as published. Raises UserError away from ``ffn_out``,
    for a reduction above f, and without a second source.
    """
    stack, features, hidden = _sizes("mixda_domain", site, shape, widths, reduction, width)
    if keep < 0:
        raise UserError(f"mixda_domain: the weight {keep} of a loss term is negative; nearest: 0")
    first, second, size = *jax.random.split(rng), hidden // reduction
    adapter = _linear("down", lora_like, first, *stack, 1, hidden, size) | _linear("up", lora_like, first, *stack, 1, size, features, last=True)
    weight = jnp.full(stack, keep, jnp.float32) if keep else None
    return Domain(**adapter, **_gate(second, stack, hidden, width, 1), by_token=config.kind == "decoder", weight=weight, domain=domain)


def _adapters_of(taps):
    """The adapters of several runs side by side; of a single run its gate too, as in the published code."""
    sizes = {tap.down.shape[-1] for tap in taps}
    if len(sizes) > 1:
        raise UserError(f"adapters of {' and '.join(map(str, sorted(sizes)))} units cannot be mixed; train them with one reduction")
    axis = {"down": -3, "down_bias": -2, "up": -3, "up_bias": -2}
    out = {name: jnp.concatenate([getattr(tap, name) for tap in taps], axis[name]) for name in ADAPTERS}
    return out | ({name: getattr(taps[0], name) for name in GATE} if len(taps) == 1 else {})


@register("tap", "mixda", paper="arXiv:2306.05406", sites="ffn_out", needs=("widths", "config"), start="moved", fit={"width": 8},
          parents=Parents(Domain, "mixda_domain", _adapters_of, (*ADAPTERS, *GATE)))  # fmt: skip
def mixda(site, shape, rng, *, runs="", reduction=16, width=768, widths=None, config=None, start=None):
    """MixDA's stage 2: z = Σ_i g_i (gelu(h D_i + d_i) U_i + u_i) + g_n y of finished runs; then z + silu(r D + d) U + u.

    h the FFN's hidden units, y its output; the runs' adapters are frozen, r is what would follow z. The second part is a
    Pfeiffer adapter of o / ``reduction`` units, D, U ~ N(0, .02²): the published script's choice of task adapter. It trains
    with the gate, which is a single run's own and else a new one of ``width``. start: the adapters of ``mixda_domain`` on an
    axis n. Raises UserError away from ``ffn_out`` and for adapters of several sizes.
    """
    del runs
    stack, features, hidden = _sizes("mixda", site, shape, widths, reduction, width)
    check_size("mixda", size := features // reduction, features)
    first, second, third = jax.random.split(rng, 3)
    held = {name: jnp.asarray(array) for name, array in start.items()}
    task = (_linear("task_down", normal(0.02), first, *stack, features, size)
            | _linear("task_up", normal(0.02), second, *stack, size, features))  # fmt: skip
    return Mixture(**_gate(third, stack, hidden, width, held["down"].shape[-3]) | held, **task, by_token=config.kind == "decoder")
