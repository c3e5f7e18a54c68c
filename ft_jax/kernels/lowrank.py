"""Low-rank kernels. Einsum letters: l layer, i input, o output, r rank."""

import jax
import jax.numpy as jnp
from flax import struct

from ft_jax.errors import UserError
from ft_jax.kernels.base import Kernel, dense, dot
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
        low = jnp.matmul(jnp.matmul(x, self.a.astype(x.dtype)), self.b.astype(x.dtype))
        return dot(self.base, x) + low * self.scale.astype(x.dtype)

    def dense(self):
        low = jnp.einsum("...ir,...ro->...io", self.a, self.b, precision="highest")
        return dense(self.base) + self.scale[..., None, None] * low


def _low_rank(w, rng, rank, scale_of):
    *stack, d_in, d_out = w.shape
    if not 1 <= rank <= min(d_in, d_out):
        raise UserError(f"rank {rank} does not fit a {d_in}x{d_out} matrix; largest: {min(d_in, d_out)}")
    bound = d_in**-0.5  # Kaiming-uniform with a = sqrt(5), what PEFT and the reference code start from
    a = jax.random.uniform(rng, (*stack, d_in, rank), jnp.float32, -bound, bound)
    b = jnp.zeros((*stack, rank, d_out), jnp.float32)
    return LowRank(w, a, b, jnp.full(stack, scale_of(rank), jnp.float32))


@register("kernel", "lora", paper="arXiv:2106.09685")
def lora(w, rng, *, rank=8, alpha=16.0):
    """LoRA: W + (alpha / rank) · A B, A Kaiming-uniform, B = 0."""
    return _low_rank(w, rng, rank, lambda r: alpha / r)


@register("kernel", "rslora", paper="arXiv:2312.03732")
def rslora(w, rng, *, rank=8, alpha=16.0):
    """Rank-stabilised LoRA: W + (alpha / sqrt(rank)) · A B."""
    return _low_rank(w, rng, rank, lambda r: alpha / r**0.5)
