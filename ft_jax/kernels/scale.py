"""Kernels that scale the rows or columns of W."""

import jax
import jax.numpy as jnp
from flax import struct

from ft_jax.errors import UserError, nearest
from ft_jax.kernels.base import Kernel, dense, dot
from ft_jax.registry import register


@struct.dataclass
class ScaledOut(Kernel):
    """W diag(s), W frozen; s ``[..., d_out]``."""

    base: jax.Array | Kernel
    s: jax.Array

    trainable = ("s",)

    def dot(self, x):
        return dot(self.base, x) * self.s.astype(x.dtype)

    def dense(self):
        return dense(self.base) * self.s[..., None, :]


@struct.dataclass
class ScaledIn(Kernel):
    """diag(s) W, W frozen; s ``[..., d_in]``."""

    base: jax.Array | Kernel
    s: jax.Array

    trainable = ("s",)

    def dot(self, x):
        return dot(self.base, x * self.s.astype(x.dtype))

    def dense(self):
        return self.s[..., :, None] * dense(self.base)


SIDES = {"out": (ScaledOut, -1), "in": (ScaledIn, -2)}


@register("kernel", "ia3", paper="arXiv:2205.05638")
def ia3(w, rng, *, side="out"):
    """(IA)³: W diag(s) for keys and values (``side=out``), diag(s) W for what follows the activation (``side=in``); s = 1.

    The paper rescales the values of k and v and the hidden units of the MLP: rules put ``side=in`` on mlp/down. A layer's
    bias is not scaled. UserError for another side.
    """
    del rng
    if side not in SIDES:
        raise UserError(f"ia3: no side {side!r}{nearest(side, SIDES)}")
    kernel, axis = SIDES[side]
    return kernel(w, jnp.ones((*w.shape[:-2], w.shape[axis]), jnp.float32))
