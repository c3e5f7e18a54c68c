"""The kernel protocol: ``dot(x)``, ``dense()``, ``shape``, ``dtype`` on a typed pytree leaf."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from ft_jax.errors import UserError


class Kernel:
    """A typed pytree leaf that stands for a matrix of shape ``[..., d_in, d_out]``.

    Subclasses are ``flax.struct.dataclass``es. The full-shaped array (or nested kernel) is the first field.
    ``trainable`` names the fields that a method trains; every other field stays frozen.
    """

    trainable: tuple[str, ...] = ()
    term: str = ""  # the loss term that ``penalty`` is, for a class with a field ``weight`` (`ft_jax.objectives.terms`)
    reads: bool = False  # whether that looks at the kernel's inputs: ``penalty(x, real, tasks)``, not ``penalty()``
    learns_from: str = ""  # the field that holds a teacher's matrix: the term is how far the layers' outputs are from its

    def check_tasks(self, tasks):
        """UserError where a term that goes by the rows' tasks cannot do with as many (0: the data have no task ids)."""

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


def term_weight(value, stack):
    """The field ``weight`` of a kernel with a loss term: ``value`` for each matrix of a stack, None for 0."""
    if value < 0:
        raise UserError(f"the weight {value} of a loss term is negative; nearest: 0")
    return jnp.full(stack, value, jnp.float32) if value else None


def is_kernel(x):
    return isinstance(x, Kernel)


def dot(w, x):
    """``x @ w`` for an array or a kernel, in the dtype of x."""
    if is_kernel(w):
        return w.dot(x)
    w = w.astype(x.dtype)
    return _product(x, w) if w.ndim == 2 else jnp.matmul(x, w)


@jax.custom_vjp
def _product(x, w):
    """``x @ w``; the gradient of w is xᵀ g, of which JAX's own rule makes (gᵀ x)ᵀ: XLA on CPU would write g again, turned."""
    return jnp.matmul(x, w)


NOTHING = (0,)  # shape of what is not kept: JAX takes it that the backward pass is always handed one tree, so it is no None


def _product_forward(x, w):
    # Only what a wanted gradient needs is kept: a frozen matrix keeps no activations for the backward pass.
    gone = jnp.zeros(NOTHING, x.value.dtype)
    return jnp.matmul(x.value, w.value), (x.value if w.perturbed else gone, w.value if x.perturbed else gone)


def _product_backward(kept, g):
    x, w = kept
    if isinstance(g, SymbolicZero):
        return None, None
    return None if w.shape == NOTHING else jnp.matmul(g, w.T), None if x.shape == NOTHING else _outer(x, g)


def _outer(x, g):
    """xᵀ g over all rows; XLA on CPU writes the left operand turned, so a much narrower g is that one, though the product is turned too."""
    rows, tokens, (wide, narrow) = tuple(range(g.ndim - 1)), g.size // g.shape[-1], (x.shape[-1], g.shape[-1])
    if narrow * (tokens + wide) < tokens * wide:
        return jax.lax.dot_general(g, x, ((rows, rows), ((), ()))).T
    return jax.lax.dot_general(x, g, ((rows, rows), ((), ())))


_product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)


def dense(w):
    """The array a leaf stands for."""
    return w.dense() if is_kernel(w) else w
