"""Low-rank kernels. Einsum letters: l layer, i input, o output, r rank."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ft_jax.errors import UserError
from ft_jax.kernels.base import Kernel, dense, dot, is_kernel
from ft_jax.registry import register


@struct.dataclass
class LowRank(Kernel):
    """W + scale · A B with W frozen; A ``[..., d_in, r]``, B ``[..., r, d_out]``, scale ``[...]``."""

    base: jax.Array | Kernel
    a: jax.Array
    b: jax.Array
    scale: jax.Array

    trainable = ("a", "b")

    def dot(self, x):
        # scaled where it is narrow: no product of the matrix's output with a number is kept for the backward pass
        return dot(self.base, x) + dot(self.b, dot(self.a, x) * self.scale.astype(x.dtype))

    def dense(self):
        low = jnp.einsum("...ir,...ro->...io", self.a, self.b, precision="highest")
        return dense(self.base) + self.scale[..., None, None] * low


@struct.dataclass
class LowRankB(LowRank):
    """W + scale · A B with W and A frozen."""

    trainable = ("b",)


@struct.dataclass
class Dora(Kernel):
    """m ⊙ (W + scale · A B) / n by columns, n their norms, W frozen; shapes as in `LowRank`, m ``[..., d_out]``."""

    base: jax.Array | Kernel
    a: jax.Array
    b: jax.Array
    scale: jax.Array
    magnitude: jax.Array

    trainable = ("a", "b", "magnitude")

    def norms(self):
        """‖W + s A B‖ of each column: √(‖W‖² + 2 s ⟨Aᵀ W, B⟩ + s² ⟨Aᵀ A B, B⟩), no product of W's size; a constant to
        the gradient, as in the paper's section 4.3."""
        low = LowRank(self.base, self.a, self.b, self.scale)
        base, a, b, scale = jax.lax.stop_gradient((low.base, low.a, low.b, low.scale[..., None]))
        at = jnp.swapaxes(a, -1, -2)
        with jax.default_matmul_precision("highest"):
            cross = jnp.sum(_times(at, base) * b, -2)
            square = jnp.sum(jnp.matmul(jnp.matmul(at, a), b) * b, -2)
        found = jnp.sum(jnp.square(dense(base).astype(jnp.float32)), -2) + 2 * scale * cross + scale**2 * square
        return jnp.sqrt(jnp.maximum(found, jnp.finfo(jnp.float32).tiny))

    def dot(self, x):
        return LowRank(self.base, self.a, self.b, self.scale).dot(x) * (self.magnitude / self.norms()).astype(x.dtype)

    def dense(self):
        return LowRank(self.base, self.a, self.b, self.scale).dense() * (self.magnitude / self.norms())[..., None, :]


def _times(x, w):
    """``x @ w`` for a stack of both, which `dot` does not promise of a kernel."""
    return jax.vmap(_times)(x, w) if x.ndim > 2 else dot(w, x)


def _sizes(w, rank):
    *stack, d_in, d_out = w.shape
    if not 1 <= rank <= min(d_in, d_out):
        raise UserError(f"rank {rank} does not fit a {d_in}x{d_out} matrix; largest: {min(d_in, d_out)}")
    return stack, d_in, d_out


def _draw(sampler, rng, shape):
    """``sampler(rng, shape)``, drawn together with what a larger rank would get, and cut.

    A grid of ranks then compiles one draw; the numbers are those of the plain call, which depend on their position alone.
    """
    *stack, d_in, rank = shape
    room = max(16, 1 << (rank - 1).bit_length())
    return sampler(rng, (math.prod(stack) * d_in * room,))[: math.prod(shape)].reshape(shape)


def _plain(w, a, scale, kernel):
    """``kernel`` of W, A and scale with B = 0."""
    *stack, _, d_out = w.shape
    b, scales = np.zeros((*stack, a.shape[-1], d_out), np.float32), np.full(stack, scale, np.float32)
    return kernel(w, a, jnp.asarray(b), jnp.asarray(scales))


def _low_rank(w, rng, rank, scale_of, kernel=LowRank):
    stack, d_in, _ = _sizes(w, rank)
    bound = d_in**-0.5  # Kaiming-uniform with a = sqrt(5), what PEFT and the reference code start from
    a = _draw(lambda key, n: jax.random.uniform(key, n, jnp.float32, -bound, bound), rng, (*stack, d_in, rank))
    return _plain(w, a, scale_of(rank), kernel)


@register("kernel", "lora", paper="arXiv:2106.09685")
def lora(w, rng, *, rank=8, alpha=16.0):
    """LoRA: W + (alpha / rank) · A B, A Kaiming-uniform, B = 0."""
    return _low_rank(w, rng, rank, lambda r: alpha / r)


@register("kernel", "rslora", paper="arXiv:2312.03732")
def rslora(w, rng, *, rank=8, alpha=16.0):
    """Rank-stabilised LoRA: W + (alpha / sqrt(rank)) · A B."""
    return _low_rank(w, rng, rank, lambda r: alpha / r**0.5)


@register("kernel", "lora_fa", paper="arXiv:2308.03303")
def lora_fa(w, rng, *, rank=8, alpha=16.0):
    """LoRA-FA: LoRA with A frozen at its random start, B alone trained: W + (alpha / rank) · A B, B = 0."""
    return _low_rank(w, rng, rank, lambda r: alpha / r, LowRankB)


@register("kernel", "dora", paper="arXiv:2402.09353", start="rounded")
def dora(w, rng, *, rank=8, alpha=16.0):
    """DoRA: m ⊙ (W + (alpha / rank) · A B) / ‖W + (alpha / rank) · A B‖ by columns, m = ‖W‖; A, B as in LoRA, m trained."""
    low = _low_rank(w, rng, rank, lambda r: alpha / r)
    *stack, _, d_out = w.shape
    start = Dora(low.base, low.a, low.b, low.scale, jnp.zeros((*stack, d_out), jnp.float32))
    return start.replace(magnitude=start.norms())


@register("kernel", "lora_b", paper="arXiv:2410.21228")
def lora_b(w, rng, *, rank=8, alpha=16.0):
    """LoRA with A frozen at random orthonormal columns (AᵀA = I) and B alone trained: W + (alpha / rank) · A B, B = 0."""
    stack, d_in, _ = _sizes(w, rank)
    a, r = jnp.linalg.qr(_draw(jax.random.normal, rng, (*stack, d_in, rank)))
    # QR leaves the signs to the library; a run is rebuilt on other machines, so R's diagonal is made positive.
    a = a * jnp.sign(jnp.diagonal(r, axis1=-2, axis2=-1))[..., None, :]
    return _plain(w, a, alpha / rank, LowRankB)


def _take_apart(name, w, rank, scale, factors):
    """W = s A B + what is left, frozen; ``factors(w) -> (A, B)`` of the plain float32 matrix."""
    if is_kernel(w):
        raise UserError(f"{name} takes a plain matrix apart and cannot stand around a {type(w).__name__} kernel")
    stack, _, _ = _sizes(w, rank)
    return without(w, *factors(w.astype(jnp.float32)), jnp.full(stack, scale, jnp.float32))


def without(w, a, b, scale):
    """s A B around W − s A B, frozen: W itself, up to rounding."""
    part = scale[..., None, None] * jnp.einsum("...ir,...ro->...io", a, b, precision="highest")
    return LowRank((w - part).astype(w.dtype), a, b, scale)


@register("kernel", "pissa", paper="arXiv:2404.02948", start="rounded", plain=True)
def pissa(w, rng, *, rank=8, alpha=16.0):
    """PiSSA: W = U S Vᵀ; s A B = its top ``rank`` part, A = U √(S/s), B = √(S/s) Vᵀ, s = alpha / rank; the residual frozen.

    The singular values are shared by A and B after division by the scale s, as PEFT does; exact SVD in float32.
    Raises UserError around another kernel: the frozen residual has to be a matrix.
    """
    del rng
    scale = alpha / rank if rank else 0.0

    def factors(w):
        u, sizes, v = jnp.linalg.svd(w, full_matrices=False)
        root = jnp.sqrt(sizes[..., :rank] / scale)
        return u[..., :rank] * root[..., None, :], root[..., None] * v[..., :rank, :]

    return _take_apart("pissa", w, rank, scale, factors)


@register("kernel", "olora", paper="arXiv:2406.01775", start="rounded", plain=True)
def olora(w, rng, *, rank=8, alpha=16.0):
    """OLoRA: Wᵀ = Q R; B = the first ``rank`` columns of Q, A = those rows of R; W − s A B frozen, s = alpha / rank.

    The published update is s A B with A and B unscaled, as PEFT has it. Raises UserError around another kernel.
    """
    del rng

    def factors(w):
        q, r = jnp.linalg.qr(jnp.swapaxes(w, -1, -2))
        return jnp.swapaxes(r[..., :rank, :], -1, -2), jnp.swapaxes(q[..., :rank], -1, -2)

    return _take_apart("olora", w, rank, alpha / rank if rank else 0.0, factors)
