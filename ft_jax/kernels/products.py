"""Products of small or shared factors. Einsum letters: i input, o output, r and q ranks, m and n input, l and k output parts.

A random projection that a paper shares among all layers is drawn from a ``seed`` by position, so that every matrix holds
the same numbers, cut to its size; a stack holds a copy for each layer, for layers are scanned.
"""

import math

import jax
import jax.numpy as jnp
from flax import struct

from ft_jax.errors import UserError
from ft_jax.kernels.base import Kernel, dense, dot
from ft_jax.registry import register


def _plus(base, x, left, right, scale):
    """``x @ (base + scale · left @ right)``; the sum is formed where a step is cheaper so: for few tokens or a small rank it is not."""
    tokens, (d_in, inner), d_out = math.prod(x.shape[:-1]), left.shape, right.shape[-1]
    # Three products of x's length with each factor, or three of the factors and the gradient of the sum.
    if 3 * tokens * inner * (d_in + d_out) <= d_in * d_out * (tokens + 3 * inner):
        low = jnp.matmul(jnp.matmul(x, left.astype(x.dtype)), right.astype(x.dtype))
        return dot(base, x) + low * scale.astype(x.dtype)
    change = scale * jnp.matmul(left, right)
    if isinstance(base, Kernel):
        return dot(base, x) + jnp.matmul(x, change.astype(x.dtype))
    return jnp.matmul(x, (base + change).astype(x.dtype))


def _uniform(rng, shape, bound):
    return jax.random.uniform(rng, shape, jnp.float32, -bound, bound)


def _shared(seed, part, rows, columns):
    """U(−1, 1) ``[rows, columns]``; a smaller draw is the corner of a larger one."""
    key = jax.random.fold_in(jax.random.key(seed), part)
    return jax.vmap(lambda i: _uniform(jax.random.fold_in(key, i), (columns,), 1.0))(jnp.arange(rows))


def _positive(rank, w):
    if rank < 1:
        raise UserError(f"rank {rank} does not fit a {w.shape[-2]}x{w.shape[-1]} matrix; smallest: 1")
    return w.shape


@struct.dataclass
class Hadamard(Kernel):
    """W + scale · (A1 B1) ⊙ (A2 B2), W frozen; A1, A2 ``[..., d_in, r]``, B1, B2 ``[..., r, d_out]``, scale ``[...]``."""

    base: jax.Array | Kernel
    a1: jax.Array
    b1: jax.Array
    a2: jax.Array
    b2: jax.Array
    scale: jax.Array

    trainable = ("a1", "b1", "a2", "b2")

    def dot(self, x):
        # (A1 B1) ⊙ (A2 B2) has rank r²: its factors hold the products of columns of A1 and A2, of rows of B1 and B2.
        left = jnp.einsum("ir,iq->irq", self.a1, self.a2).reshape(self.a1.shape[0], -1)
        right = jnp.einsum("ro,qo->rqo", self.b1, self.b2).reshape(-1, self.b1.shape[-1])
        return _plus(self.base, x, left, right, self.scale)

    def dense(self):
        first, second = (jnp.einsum("...ir,...ro->...io", a, b, precision="highest")
                         for a, b in ((self.a1, self.b1), (self.a2, self.b2)))  # fmt: skip
        return dense(self.base) + self.scale[..., None, None] * first * second


@register("kernel", "loha", paper="arXiv:2108.06098", flops=0.8)
def loha(w, rng, *, rank=8, alpha=8.0):
    """LoHa (FedPara): W + (alpha / rank) · (A1 B1) ⊙ (A2 B2), Kaiming-uniform but A2 = 0.

    2 rank (d_in + d_out) parameters for a change of rank up to rank²; a step costs what LoRA of rank² does.
    """
    *stack, d_in, d_out = _positive(rank, w)
    keys, inside = jax.random.split(rng, 3), rank**-0.5
    a1 = _uniform(keys[0], (*stack, d_in, rank), d_in**-0.5)
    b1, b2 = (_uniform(key, (*stack, rank, d_out), inside) for key in keys[1:])
    return Hadamard(w, a1, b1, jnp.zeros_like(a1), b2, jnp.full(stack, alpha / rank, jnp.float32))


@struct.dataclass
class Kronecker(Kernel):
    """W + scale · C ⊗ D, W frozen; C ``[..., m, l]`` the product of the arrays in ``left``, D ``[..., n, k]`` of those in ``right``."""

    base: jax.Array | Kernel
    left: tuple
    right: tuple
    scale: jax.Array

    trainable = ("left", "right")

    def dot(self, x):
        part = x.reshape(*x.shape[:-1], self.left[0].shape[-2], self.right[0].shape[-2])
        for factor in self.right:
            part = jnp.matmul(part, factor.astype(x.dtype))
        part = jnp.swapaxes(part, -1, -2)
        for factor in self.left:
            part = jnp.matmul(part, factor.astype(x.dtype))
        low = jnp.swapaxes(part, -1, -2).reshape(*x.shape[:-1], -1)
        return dot(self.base, x) + low * self.scale.astype(x.dtype)

    def dense(self):
        c, d = (f[0] if len(f) == 1 else jnp.matmul(*f, precision="highest") for f in (self.left, self.right))
        change = jnp.einsum("...ml,...nk->...mnlk", c, d, precision="highest").reshape(self.base.shape)
        return dense(self.base) + self.scale[..., None, None] * change


def factorisation(size, factor=-1):
    """LyCORIS' split of a size into two factors, the first ``factor`` if that divides it, else the nearest to a square up to it."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = size if factor == -1 else factor
    first, best = 1, (1, size)
    while best[0] < best[1]:
        first = next(d for d in range(best[0] + 1, size + 1) if size % d == 0)
        if first + size // first > sum(best) or first > limit:
            break
        best = first, size // first
    return min(best), max(best)


@register("kernel", "lokr", paper="arXiv:2309.14859")
def lokr(w, rng, *, rank=8, alpha=8.0, factor=-1, both=False):
    """LoKr: W + (alpha / rank) · C ⊗ D with C = 0, D Kaiming-uniform, D = D1 D2 of ``rank`` where that is smaller.

    factor: the sizes of C (LyCORIS' decompose_factor; -1 near the square root). both: C is a product of that rank too.
    """
    *stack, d_in, d_out = _positive(rank, w)
    if factor < 1 and factor != -1:
        raise UserError(f"lokr: factor {factor}; it is a size above 0, or -1 for one near the square root")
    (m, n), (l, k) = factorisation(d_in, factor), factorisation(d_out, factor)  # noqa: E741
    keys = jax.random.split(rng, 3)

    def draw(key, *shape):  # Kaiming-uniform of the transposed matrix, as torch stores it
        return _uniform(key, (*stack, *shape), shape[0] ** -0.5)

    left, right = (jnp.zeros((*stack, m, l), jnp.float32),), (draw(keys[1], n, k),)
    if both and rank < max(m, l) / 2:
        left = draw(keys[0], m, rank), jnp.zeros((*stack, rank, l), jnp.float32)
    if rank < max(n, k) / 2:
        right = draw(keys[1], n, rank), draw(keys[2], rank, k)
    return Kronecker(w, left, right, jnp.full(stack, alpha / rank, jnp.float32))


@struct.dataclass
class SharedRank(Kernel):
    """W + A diag(d) B diag(o), W, A ``[..., d_in, r]`` and B ``[..., r, d_out]`` frozen; inner d ``[..., r]``, outer o ``[..., d_out]``."""

    base: jax.Array | Kernel
    a: jax.Array
    b: jax.Array
    inner: jax.Array
    outer: jax.Array

    trainable = ("inner", "outer")

    def dot(self, x):
        low = jnp.matmul(x, self.a.astype(x.dtype)) * self.inner.astype(x.dtype)
        return dot(self.base, x) + jnp.matmul(low, self.b.astype(x.dtype)) * self.outer.astype(x.dtype)

    def dense(self):
        low = jnp.einsum("...ir,...ro->...io", self.a * self.inner[..., None, :], self.b, precision="highest")
        return dense(self.base) + low * self.outer[..., None, :]


@register("kernel", "vera", paper="arXiv:2310.11454", flops=0.95)
def vera(w, rng, *, rank=256, inner=0.1, seed=0):
    """VeRA: W + A diag(d) B diag(o), A and B frozen, Kaiming-uniform, the same for all matrices; d = ``inner``, o = 0.

    rank + d_out parameters. The rank may exceed both sides, as in the paper; at 256 the frozen factors cost 40 % of a
    768x3072 base. seed: what A and B are drawn from, whatever the run's seed.
    """
    del rng
    *stack, d_in, d_out = _positive(rank, w)
    # torch's Kaiming-uniform for relu: sqrt(6 / fan_in).
    a = (6 / d_in) ** 0.5 * _shared(seed, 0, d_in, rank)
    b = (6 / rank) ** 0.5 * _shared(seed, 1, d_out, rank).T
    return SharedRank(w, jnp.broadcast_to(a, (*stack, d_in, rank)), jnp.broadcast_to(b, (*stack, rank, d_out)),
                      jnp.full((*stack, rank), inner, jnp.float32), jnp.zeros((*stack, d_out), jnp.float32))  # fmt: skip


@struct.dataclass
class RandomBases(Kernel):
    """W + scale · Σ_j B_j diag(λ_j) A diag(γ_j), or its transpose where d_in ≤ d_out; W, A, B frozen.

    a ``[..., r, min]`` the one small basis, b ``[..., max, J r]`` the large ones side by side, weights λ ``[..., r, J]``,
    columns γ ``[..., J, min]``, scale ``[...]``. Pair p = i J + j of the sum takes column p of b and row i of A, as in PEFT.
    """

    base: jax.Array | Kernel
    a: jax.Array
    b: jax.Array
    weights: jax.Array
    columns: jax.Array
    scale: jax.Array

    trainable = ("weights", "columns")

    def _factors(self):
        small = jnp.einsum("...rj,...ri,...ji->...rji", self.weights, self.a, self.columns)
        small = small.reshape(*small.shape[:-3], -1, small.shape[-1])
        if self.base.shape[-2] <= self.base.shape[-1]:
            return jnp.swapaxes(small, -1, -2), jnp.swapaxes(self.b, -1, -2)
        return self.b, small

    def dot(self, x):
        return _plus(self.base, x, *self._factors(), self.scale)

    def dense(self):
        left, right = self._factors()
        return dense(self.base) + self.scale[..., None, None] * jnp.matmul(left, right, precision="highest")


@register("kernel", "randlora", paper="arXiv:2502.00987", fit={"rank": 4, "alpha": 80.0}, flops=1.4)
def randlora(w, rng, *, rank=32, alpha=640.0, seed=0):
    """RandLoRA: W + (alpha / rank) · Σ_j B_j diag(λ_j) A diag(γ_j), J = ⌈min / rank⌉ random bases, λ = 0, γ = 1 / max(J, min).

    J (rank + min(d_in, d_out)) parameters, full rank; A and B are uniform of unit variance, the same for all matrices,
    drawn from ``seed``. A full-rank change is as dear as W: a step costs more than full fine-tuning.
    """
    del rng
    *stack, d_in, d_out = _positive(rank, w)
    small, large = sorted((d_in, d_out))
    count = -(-small // rank)
    a, b = 3**0.5 * _shared(seed, 0, small, rank).T, 3**0.5 * _shared(seed, 1, large, count * rank)
    return RandomBases(
        w, jnp.broadcast_to(a, (*stack, rank, small)), jnp.broadcast_to(b, (*stack, large, count * rank)),
        jnp.zeros((*stack, rank, count), jnp.float32), jnp.full((*stack, count, small), 1 / max(count, small), jnp.float32),
        jnp.full(stack, alpha / rank, jnp.float32),
    )  # fmt: skip


@struct.dataclass
class Bounded(Kernel):
    """W + bound / r · diag(norms) Σ_j a_j b_jᵀ / (‖a_j‖ ‖b_j‖), W frozen; A ``[..., d_in, r]``, B ``[..., r, d_out]``.

    norms ``[..., d_in]`` those of W's rows at the start, frozen; bound ``[...]``.
    """

    base: jax.Array | Kernel
    a: jax.Array
    b: jax.Array
    bound: jax.Array
    norms: jax.Array

    trainable = ("a", "b", "bound")

    def _factors(self):
        # Norms below 1e-4 count as that, as in PEFT: B starts from zero.
        squares = (jnp.maximum(jnp.square(y).sum(axis), 1e-8) for y, axis in ((self.a, -2), (self.b, -1)))
        sizes = self.bound[..., None] / self.a.shape[-1] * jax.lax.rsqrt(jnp.stack(list(squares))).prod(0)
        return self.norms[..., None] * self.a * sizes[..., None, :], self.b

    def dot(self, x):
        left, right = self._factors()
        return dot(self.base, x) + jnp.matmul(jnp.matmul(x, left.astype(x.dtype)), right.astype(x.dtype))

    def dense(self):
        return dense(self.base) + jnp.matmul(*self._factors(), precision="highest")


@register("kernel", "delora", paper="arXiv:2503.18225", fit={"bound": 0.5})
def delora(w, rng, *, rank=8, bound=15.0):
    """DeLoRA: W + bound / rank · diag(‖W rows‖) A Ξ B, Ξ = 1 / (‖a_j‖ ‖b_j‖): its norm is at most the bound, which trains too.

    A Kaiming-uniform, B = 0. Norms below 1e-4 count as that (PEFT's start; the paper subtracts a random B from W): the
    first steps of B then leave that ball at once, and the bound is what they change W by.
    """
    *stack, d_in, d_out = _positive(rank, w)
    a = _uniform(rng, (*stack, d_in, rank), d_in**-0.5)
    norms = jnp.sqrt(jnp.square(dense(w)).sum(-1))
    return Bounded(w, a, jnp.zeros((*stack, rank, d_out), jnp.float32), jnp.full(stack, bound, jnp.float32), norms)


@struct.dataclass
class Multiplied(Kernel):
    """W ⊙ (1 + A B), W frozen; A ``[..., d_in, r]``, B ``[..., r, d_out]``."""

    base: jax.Array | Kernel
    a: jax.Array
    b: jax.Array

    trainable = ("a", "b")

    def dot(self, x):
        # A product entry by entry with W has no factors of W's size, so the sum has to be formed.
        return jnp.matmul(x, (dense(self.base) * (1 + jnp.matmul(self.a, self.b))).astype(x.dtype))

    def dense(self):
        return dense(self.base) * (1 + jnp.matmul(self.a, self.b, precision="highest"))


@register("kernel", "hira", paper="ICLR 2025, TwJrTz9cRS", flops=1.1)
def hira(w, rng, *, rank=32):
    """HiRA: W ⊙ (1 + A B), A Kaiming-uniform, B = 0; rank (d_in + d_out) parameters for a change of high rank.

    A step costs what full fine-tuning does: the change is as large as W.
    """
    *stack, d_in, d_out = _positive(rank, w)
    a = _uniform(rng, (*stack, d_in, rank), d_in**-0.5)
    return Multiplied(w, a, jnp.zeros((*stack, rank, d_out), jnp.float32))
