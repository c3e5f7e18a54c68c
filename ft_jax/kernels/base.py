"""The kernel protocol: ``dot(x)``, ``dense()``, ``shape``, ``dtype`` on a typed pytree leaf."""

import dataclasses

import jax.numpy as jnp


class Kernel:
    """A typed pytree leaf that stands for a matrix of shape ``[..., d_in, d_out]``.

    Subclasses are ``flax.struct.dataclass``es. The full-shaped array (or nested kernel) is the first field.
    ``trainable`` names the fields that a method trains; every other field stays frozen.
    """

    trainable: tuple[str, ...] = ()

    def dot(self, x):
        """``x @ W``; x ``[..., d_in]`` -> ``[..., d_out]``, without forming W."""
        raise TypeError(f"{type(self).__name__} lacks dot")

    def dense(self):
        """W itself, exact in float32."""
        raise TypeError(f"{type(self).__name__} lacks dense")

    @property
    def shape(self):
        return getattr(self, dataclasses.fields(self)[0].name).shape

    @property
    def dtype(self):
        return getattr(self, dataclasses.fields(self)[0].name).dtype


def is_kernel(x):
    return isinstance(x, Kernel)


def dot(w, x):
    """``x @ w`` for an array or a kernel, in the dtype of x."""
    if is_kernel(w):
        return w.dot(x)
    return jnp.matmul(x, w.astype(x.dtype))


def dense(w):
    """The array a leaf stands for."""
    return w.dense() if is_kernel(w) else w
