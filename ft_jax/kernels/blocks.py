"""Kernels whose change of W repeats one small block. Einsum letters: n row block, m column block, r and q inside them."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ft_jax.errors import UserError
from ft_jax.kernels.base import Kernel, dense, dot
from ft_jax.registry import register


@struct.dataclass
class Shards(Kernel):
    """W + [M; M; …], W frozen; M ``[..., r, d_out]`` repeated down the rows, or ``[..., r, c]`` along the columns too."""

    base: jax.Array | Kernel
    m: jax.Array

    trainable = ("m",)

    def dot(self, x):
        rows, columns = self.m.shape[-2:]
        padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % rows)])
        folded = padded.reshape(*x.shape[:-1], -1, rows).sum(-2)
        low = jnp.matmul(folded, self.m.astype(x.dtype))
        return dot(self.base, x) + jnp.tile(low, self.base.shape[-1] // columns)

    def dense(self):
        rows, columns = self.m.shape[-2:]
        d_in, d_out = self.base.shape[-2:]
        repeats = (1,) * (self.m.ndim - 2) + (-(-d_in // rows), d_out // columns)
        return dense(self.base) + jnp.tile(self.m, repeats)[..., :d_in, :]


@struct.dataclass
class BlockAffine(Kernel):
    """W_nm + M_m W_nm + M_m for every r x r block of W, W frozen; M ``[..., d_out / r, r, r]``."""

    base: jax.Array | Kernel
    m: jax.Array

    trainable = ("m",)

    def _whole(self):
        w, r = dense(self.base), self.m.shape[-1]
        *stack, d_in, d_out = w.shape
        blocks = w.reshape(*stack, d_in // r, r, d_out // r, r)
        change = jnp.einsum("...mrq,...nqms->...nrms", self.m, blocks, precision="highest")
        change = change + jnp.moveaxis(self.m, -3, -2)[..., None, :, :, :]
        return w + change.reshape(w.shape)

    def dot(self, x):
        # Not x W + x M W + …: every column of blocks would want a rotated copy of x of its own.
        return jnp.matmul(x, self._whole().astype(x.dtype))

    def dense(self):
        return self._whole()


@register("kernel", "miss", paper="arXiv:2409.15371", fit={"rank": 5})
def miss(w, rng, *, rank=64, mini=0):
    """MiSS: x W + (Σ of the ``rank``-wide pieces of x) M, M = 0; with ``mini`` > 0, M's mini columns are repeated too.

    rank · d_out parameters (rank · mini); the last piece is filled up with zeros. UserError for a rank above d_in and for
    a mini that does not divide d_out.
    """
    del rng
    *stack, d_in, d_out = w.shape
    if not 1 <= rank <= d_in:
        raise UserError(f"rank {rank} does not fit a {d_in}x{d_out} matrix; largest: {d_in}")
    if mini < 0 or mini and d_out % mini:
        fits = [m for m in range(1, d_out + 1) if d_out % m == 0]
        raise UserError(f"mini {mini} does not divide the {d_out} columns of a {d_in}x{d_out} matrix; nearest: "
                        f"{min(fits, key=lambda m: abs(m - mini))}")
    return Shards(w, jnp.zeros((*stack, rank, mini or d_out), jnp.float32))


@register("kernel", "bone", paper="arXiv:2409.15371", fit={"rank": 8}, flops=1.1)
def bone(w, rng, *, rank=64):
    """Bone with Bat: W_nm + M_m W_nm + M_m for every block of ``rank`` x ``rank``, M = 0, one M for a column of blocks.

    rank · d_out parameters; W is formed and its gradient too, so a step costs what full fine-tuning does. UserError for a
    rank that does not divide both sides.
    """
    del rng
    *stack, d_in, d_out = w.shape
    if rank < 1 or d_in % rank or d_out % rank:
        fits = [r for r in range(1, min(d_in, d_out) + 1) if np.gcd(d_in, d_out) % r == 0]
        raise UserError(f"blocks of {rank} do not divide a {d_in}x{d_out} matrix; nearest: {min(fits, key=lambda r: abs(r - rank))}")
    return BlockAffine(w, jnp.zeros((*stack, d_out // rank, rank, rank), jnp.float32))
