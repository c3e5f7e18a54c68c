"""Kernels whose change of W is made from W: products with it, projections of it, networks of it, turns in its main subspace.

Einsum letters: i input, o output, r rank.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ft_jax.errors import UserError, nearest
from ft_jax.kernels.base import Kernel, dense, dot
from ft_jax.kernels.lowrank import _sizes, lora
from ft_jax.kernels.orthogonal import cayley, coefficients, power_series
from ft_jax.kernels.sparse import Sparse, sparse
from ft_jax.registry import register


def _choice(name, what, value, table):
    if value not in table:
        raise UserError(f"{name}: {what} {value!r} is none of {', '.join(table)}{nearest(value, table)}")
    return table[value]


def _uniform(rng, shape, fan_in):
    """Kaiming-uniform with a = sqrt(5), as torch's linear layers start."""
    return jax.random.uniform(rng, shape, jnp.float32, -(fan_in**-0.5), fan_in**-0.5)


# GLoRA


@struct.dataclass
class Generalised(Kernel):
    """W ⊙ (1 + A B) + C D, W frozen; A and C ``[..., d_in, r]``, B and D ``[..., r, d_out]``."""

    base: jax.Array | Kernel
    a: jax.Array
    b: jax.Array
    c: jax.Array
    d: jax.Array

    trainable = ("a", "b", "c", "d")

    def dot(self, x):
        # The first product is entry by entry, so W has to be formed; the second is one with it then.
        return jnp.matmul(x, self._whole(None).astype(x.dtype))

    def dense(self):
        return self._whole("highest")

    def _whole(self, precision):
        return dense(self.base) * (1 + jnp.matmul(self.a, self.b, precision=precision)) + jnp.matmul(self.c, self.d, precision=precision)


@struct.dataclass
class GeneralisedByOutput(Kernel):
    """W diag(1 + s) + 1 tᵀ, W frozen; s and t ``[..., d_out]``, or ``[..., 1]`` for one number of each."""

    base: jax.Array | Kernel
    s: jax.Array
    t: jax.Array

    trainable = ("s", "t")

    def dot(self, x):
        return dot(self.base, x) * (1 + self.s).astype(x.dtype) + x.sum(-1, keepdims=True) * self.t.astype(x.dtype)

    def dense(self):
        return dense(self.base) * (1 + self.s)[..., None, :] + self.t[..., None, :]


FORMS = ("lora", "vector", "constant")


@register("kernel", "glora", paper="arXiv:2306.07967", flops=1.1)
def glora(w, rng, *, rank=8, form="lora"):
    """GLoRA: W ⊙ (1 + A B) + C D, A and C Kaiming-uniform, B = D = 0; 2 rank (d_in + d_out) parameters.

    form: ``vector`` has one number an output in the place of A B and of C D, ``constant`` one number. What the paper does to
    a layer's bias is the bias's own training here. With ``lora`` a step costs what full fine-tuning does. Raises UserError
    for a rank above the matrix and another form.
    """
    stack, d_in, d_out = _sizes(w, rank)
    _choice("glora", "form", form, dict.fromkeys(FORMS))
    if form != "lora":
        return GeneralisedByOutput(w, *(jnp.zeros((*stack, d_out if form == "vector" else 1), jnp.float32) for _ in "st"))
    a, c = (_uniform(key, (*stack, d_in, rank), d_in) for key in jax.random.split(rng))
    b, d = (jnp.zeros((*stack, rank, d_out), jnp.float32) for _ in "bd")
    return Generalised(w, a, b, c, d)


# DEFT and PaRa


@struct.dataclass
class Removed(Kernel):
    """W − W relu(P) Pᵀ, W frozen; P ``[..., d_out, r]``."""

    base: jax.Array | Kernel
    p: jax.Array

    trainable = ("p",)

    def directions(self):
        """Q and N of the projector N Qᵀ of outputs, both ``[..., d_out, r]``."""
        return self.p, jax.nn.relu(self.p)

    def _put(self, x):
        """What comes in the place of x W N; x ``[..., d_in]``, None for the unit matrix."""
        return 0.0

    def dot(self, x):
        q, n = (y.astype(x.dtype) for y in self.directions())
        y = dot(self.base, x)
        return y + jnp.matmul(self._put(x) - jnp.matmul(y, n), q.T)

    def dense(self):
        (q, n), w = self.directions(), dense(self.base)
        with jax.default_matmul_precision("highest"):
            return w + (self._put(None) - w @ n) @ jnp.swapaxes(q, -1, -2)


def orthonormal(p):
    """Q of P = Q R with R's diagonal positive: the same on every machine, where a library chooses the signs."""
    q, r = jnp.linalg.qr(p)
    return q * jnp.where(jnp.diagonal(r, axis1=-2, axis2=-1) < 0, -1.0, 1.0)[..., None, :]


@struct.dataclass
class RemovedOrthogonal(Removed):
    """W (I − Q Qᵀ), Q orthonormal columns that span those of P."""

    def directions(self):
        q = orthonormal(self.p)
        return q, q


@struct.dataclass
class Replaced(Removed):
    """`Removed` plus scale · R Pᵀ; R ``[..., d_in, r]``, scale ``[...]``."""

    r: jax.Array
    scale: jax.Array

    trainable = ("p", "r")

    def _put(self, x):
        if x is None:
            return self.r * self.scale[..., None, None]
        return jnp.matmul(x, self.r.astype(x.dtype)) * self.scale.astype(x.dtype)


@struct.dataclass
class ReplacedOrthogonal(Replaced):
    """`RemovedOrthogonal` plus scale · R Qᵀ."""

    directions = RemovedOrthogonal.directions


PROJECTIONS = {"relu": (Removed, Replaced), "qr": (RemovedOrthogonal, ReplacedOrthogonal)}


def _directions(w, rng, rank):
    stack, _, d_out = _sizes(w, rank)
    return stack, 0.02 * jax.random.normal(rng, (*stack, d_out, rank), jnp.float32)


@register("kernel", "para", paper="arXiv:2406.05641", start="moved")
def para(w, rng, *, rank=8, projection="qr"):
    """PaRa: W (I − Q Qᵀ), Q the orthonormal columns of P ~ N(0, .02²): ``rank`` directions of the output are removed.

    rank · d_out parameters; never W itself, at the start neither. projection: ``relu`` has relu(P) Pᵀ for Q Qᵀ, as PEFT may.
    Raises UserError for a rank above the matrix and another projection.
    """
    _, p = _directions(w, rng, rank)
    return _choice("para", "projection", projection, PROJECTIONS)[0](w, p)


@register("kernel", "deft", paper="arXiv:2509.22793", start="rounded")
def deft(w, rng, *, rank=8, scale=1.0, projection="relu"):
    """DEFT: W (I − relu(P) Pᵀ) + scale · R Pᵀ, P ~ N(0, .02²), R = W relu(P) / scale, so that it starts at W.

    rank (d_in + d_out) parameters. projection: ``qr`` has orthonormal columns Q of P in the place of both. Raises UserError
    for a rank above the matrix, a scale of 0 and another projection.
    """
    stack, p = _directions(w, rng, rank)
    if not scale:
        raise UserError("deft: a scale of 0 leaves nothing to put in the place of what is removed; nearest: 1")
    kernel = _choice("deft", "projection", projection, PROJECTIONS)[1]
    empty = kernel(w, p, jnp.zeros((*w.shape[:-1], rank), jnp.float32), jnp.full(stack, scale, jnp.float32))
    with jax.default_matmul_precision("highest"):
        return empty.replace(r=dense(w) @ empty.directions()[1] / scale)


# PEANuT


@struct.dataclass
class Peanut(Kernel):
    """W + scale · H B, H a network with relu of W's rows; A ``[..., d_out, r]``, B ``[..., r, d_out]``, scale ``[...]``.

    H₀ = σ(W A); Hₖ = σ(Hₖ₋₁ Eₖ) down the encoders, then H ← σ(H Dₖ) + the H that the encoder at its height began from;
    encoders and decoders are as many arrays ``[..., r, r]``.
    """

    base: jax.Array | Kernel
    a: jax.Array
    encoders: tuple
    decoders: tuple
    b: jax.Array
    scale: jax.Array

    trainable = ("a", "encoders", "decoders", "b")
    activation = staticmethod(jax.nn.relu)

    def _hidden(self):
        """H ``[..., d_in, r]``: rank products with W and none of the tokens."""
        with jax.default_matmul_precision("highest"):
            hidden, held = self.activation(dense(self.base) @ self.a), []
            for encoder in self.encoders:
                held.append(hidden)
                hidden = self.activation(hidden @ encoder)
            for decoder in self.decoders:
                hidden = self.activation(hidden @ decoder) + held.pop()
        return hidden * self.scale[..., None, None]

    def dot(self, x):
        return dot(self.base, x) + jnp.matmul(jnp.matmul(x, self._hidden().astype(x.dtype)), self.b.astype(x.dtype))

    def dense(self):
        return dense(self.base) + jnp.matmul(self._hidden(), self.b, precision="highest")


@struct.dataclass
class PeanutGelu(Peanut):
    """`Peanut` with the exact gelu."""

    activation = staticmethod(lambda x: jax.nn.gelu(x, approximate=False))


@struct.dataclass
class PeanutSilu(Peanut):
    """`Peanut` with x · sigmoid(x)."""

    activation = staticmethod(jax.nn.silu)


@struct.dataclass
class PeanutTanh(Peanut):
    """`Peanut` with tanh."""

    activation = staticmethod(jnp.tanh)


ACTIVATIONS = {"relu": Peanut, "gelu": PeanutGelu, "silu": PeanutSilu, "tanh": PeanutTanh}


@register("kernel", "peanut", paper="arXiv:2410.01870", fit={"rank": 8, "depth": 1})
def peanut(w, rng, *, rank=32, depth=0, activation="relu", scale=1.0):
    """PEANuT: W + scale · σ(W A) B, the change a small network of W itself; A Kaiming-uniform, B = 0.

    depth: that many rank x rank layers down and up again between the two, with residuals. 2 rank d_out + 2 depth rank²
    parameters. Raises UserError for a rank above the matrix, a negative depth and another activation.
    """
    stack, _, d_out = _sizes(w, rank)
    kernel = _choice("peanut", "activation", activation, ACTIVATIONS)
    if depth < 0:
        raise UserError(f"peanut: depth {depth} is negative; nearest: 0")
    keys = jax.random.split(rng, 2 * depth + 1)
    square = tuple(_uniform(key, (*stack, rank, rank), rank) for key in keys[1:])
    a, b = _uniform(keys[0], (*stack, d_out, rank), d_out), jnp.zeros((*stack, rank, d_out), jnp.float32)
    return kernel(w, a, square[:depth], square[depth:], b, jnp.full(stack, scale, jnp.float32))


# PSOFT


@struct.dataclass
class Subspace(Kernel):
    """W + L (M − I) R, L R the top part of W's SVD, all frozen; M the Cayley transform of a skew matrix, r x r.

    left ``[..., d_in, r]``, right ``[..., r, d_out]``, skew ``[..., r (r − 1) / 2]`` its upper triangle, by rows. With
    ``series [..., t]`` M is Σ_t c_t (−S)ᵗ, as OFTv2 has it.
    """

    base: jax.Array | Kernel
    left: jax.Array
    right: jax.Array
    skew: jax.Array
    series: jax.Array | None = None

    trainable = ("skew",)

    def turn(self):
        """M ``[..., r, r]``, float32."""
        rank = self.left.shape[-1]
        upper = jnp.zeros((*self.skew.shape[:-1], rank, rank), jnp.float32)
        upper = upper.at[(..., *np.triu_indices(rank, 1))].set(self.skew)
        skew = upper - jnp.swapaxes(upper, -1, -2)
        return cayley(skew) if self.series is None else power_series(-skew, self.series)

    def _change(self):
        return self.turn() - jnp.eye(self.left.shape[-1])

    def dot(self, x):
        low = jnp.matmul(jnp.matmul(x, self.left.astype(x.dtype)), self._change().astype(x.dtype))
        return dot(self.base, x) + jnp.matmul(low, self.right.astype(x.dtype))

    def dense(self):
        with jax.default_matmul_precision("highest"):
            return dense(self.base) + self.left @ self._change() @ self.right


@struct.dataclass
class SubspaceScaled(Subspace):
    """`Subspace` with diag(into) M diag(out) in M's place; into and out ``[..., r]``."""

    into: jax.Array | None = None
    out: jax.Array | None = None

    trainable = ("skew", "into", "out")

    def turn(self):
        return self.into[..., None] * Subspace.turn(self) * self.out[..., None, :]


def principal(w, rank, even=False):
    """L and R with L R the top ``rank`` part of W's SVD; L's columns orthonormal, or R's singular values shared by both.

    The sign of each pair of vectors, which a library leaves open, makes the largest entry of L's column positive: M acts
    between the pairs, so that it has to be the same wherever a run is rebuilt.
    """
    u, sizes, v = jnp.linalg.svd(w.astype(jnp.float32), full_matrices=False)
    u, sizes, v = u[..., :rank], sizes[..., :rank], v[..., :rank, :]
    largest = jnp.take_along_axis(u, jnp.abs(u).argmax(-2, keepdims=True), -2)
    signs = jnp.where(largest < 0, -1.0, 1.0)
    u, v = u * signs, v * jnp.swapaxes(signs, -1, -2)
    if even:
        root = jnp.sqrt(sizes)
        return u * root[..., None, :], root[..., None] * v
    return u, sizes[..., None] * v


@register("kernel", "psoft", paper="arXiv:2505.11235", fit={"rank": 8})
def psoft(w, rng, *, rank=32, even=False, scales=True, terms=0):
    """PSOFT: W + U (diag(α) M diag(β) − I) S Vᵀ, U S Vᵀ the top ``rank`` part of W, M a Cayley transform, the identity.

    Turns the main subspace of W and no more: rank (rank − 1) / 2 parameters, and 2 rank for α = β = 1 with ``scales``.
    even: √S on both sides. terms: 0 is the exact transform, else a series as in OFTv2. Raises UserError for a rank above
    the matrix or below 2, and for a series of 1 term.
    """
    del rng
    stack, _, _ = _sizes(w, rank)
    if rank < 2:
        raise UserError(f"psoft: rank {rank} leaves nothing to turn; nearest: 2")
    if terms < 0 or terms == 1:
        raise UserError(f"psoft: a series of {terms} terms holds no rotation; 0 is the exact transform, 5 is usual")
    skew = jnp.zeros((*stack, rank * (rank - 1) // 2), jnp.float32)
    series = jnp.broadcast_to(jnp.asarray(coefficients(terms)), (*stack, terms)) if terms else None
    parts = w, *principal(dense(w), rank, even), skew, series
    return SubspaceScaled(*parts, *(jnp.ones((*stack, rank), jnp.float32) for _ in "io")) if scales else Subspace(*parts)


# Supra


@struct.dataclass
class Supra(Sparse):
    """`Sparse` + scale · A B; A ``[..., d_in, r]``, B ``[..., r, d_out]``, scale ``[...]``."""

    a: jax.Array
    b: jax.Array
    scale: jax.Array

    trainable = ("values", "a", "b")

    def dot(self, x):
        low = jnp.matmul(jnp.matmul(x, self.a.astype(x.dtype)), self.b.astype(x.dtype))
        return Sparse.dot(self, x) + low * self.scale.astype(x.dtype)

    def dense(self):
        low = jnp.einsum("...ir,...ro->...io", self.a, self.b, precision="highest")
        return Sparse.dense(self) + self.scale[..., None, None] * low


@register("kernel", "supra", paper="arXiv:2607.09287")
def supra(w, rng, *, share=0.01, pick="largest", rank=8, alpha=16.0):
    """Supra: W + S + (alpha / rank) · A B, S trained at the ``share`` of places with the ``pick`` |W|, S = B = 0.

    Super-Tuning without the low rank is ``sparse``. Raises UserError for a rank above the matrix, a share outside (0, 1]
    and an unknown pick.
    """
    places, low = sparse(w, rng, share=share, pick=pick), lora(w, rng, rank=rank, alpha=alpha)
    return Supra(w, places.values, places.places, low.a, low.b, low.scale)
