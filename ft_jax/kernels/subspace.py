"""Kernels that train few coordinates of a matrix: random subspaces, singular values, triplets whose rank is allocated.

Einsum letters: i input, o output, r rank, m all singular values.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ft_jax import tree
from ft_jax.errors import UserError, nearest
from ft_jax.kernels.base import Kernel, dense, dot, is_kernel, term_weight
from ft_jax.kernels.lowrank import LowRank, _sizes
from ft_jax.kernels.scale import ScaledOut
from ft_jax.kernels.sparse import Factors
from ft_jax.registry import register

_HADAMARD = functools.reduce(np.kron, [np.array([[1.0, 1.0], [1.0, -1.0]])] * 4)


@struct.dataclass
class Intrinsic(Kernel):
    """W + the first d_in · d_out numbers of P z; z ``[..., d]`` trained, P = √(n/D) H G Π H B as its parts.

    signs ``[..., d]`` (B), order int32 ``[..., n]`` (Π), gains ``[..., n]`` (G, Σ G² = n), H the orthonormal Hadamard
    matrix of size n, the next power of two above D = d_in · d_out. P takes eight bytes a number of n, all frozen.
    """

    base: jax.Array | Kernel
    z: jax.Array
    signs: jax.Array
    order: jax.Array
    gains: jax.Array

    trainable = ("z",)

    def dot(self, x):
        # z's gradient is Pᵀ of the whole ∂L/∂W, so that product cannot be avoided; one product with the sum is least.
        return jnp.matmul(x, self.dense().astype(x.dtype))

    def dense(self):
        return dense(self.base) + self.delta()

    def delta(self):
        """The change of W."""
        n, d = self.order.shape[-1], self.z.shape[-1]
        *stack, d_in, d_out = self.shape
        # H of a vector that is 0 from c on repeats H_c of its beginning: a transform of c numbers stands for one of n.
        c = 1 << (d - 1).bit_length()
        beginning = jnp.concatenate([self.z * self.signs, jnp.zeros((*stack, c - d), self.z.dtype)], -1)
        mixed = jnp.take_along_axis(hadamard(beginning) * (c / n) ** 0.5, self.order % c, axis=-1) * self.gains
        return (hadamard(mixed)[..., : d_in * d_out] * (n / (d_in * d_out)) ** 0.5).reshape(*stack, d_in, d_out)


@struct.dataclass
class StructuredIntrinsic(Intrinsic):
    """W + size · P z with a trained ``size [...]`` for each matrix."""

    size: jax.Array

    trainable = ("z", "size")

    def delta(self):
        return self.size[..., None, None] * Intrinsic.delta(self)


def hadamard(x):
    """H x over the last axis, of a power of two n, in n log n additions after a product with H of 16; H Hᵀ = I."""
    n, shape = x.shape[-1], x.shape
    half = min(n, 16)  # numbers nearer to each other than that are slow to add and subtract one by one
    x = jnp.matmul(x.reshape(*shape[:-1], -1, half), jnp.asarray(_HADAMARD[:half, :half], x.dtype), precision="highest")
    while half < n:
        pairs = x.reshape(*shape[:-1], -1, 2, half)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        x = jnp.stack([first + second, first - second], -2)
        half *= 2
    return x.reshape(shape) / n**0.5


def _fastfood(w, rng, d):
    """z = 0 and the parts of P for each matrix of ``w``."""
    *stack, d_in, d_out = w.shape
    n = 1 << (d_in * d_out - 1).bit_length()
    keys = jax.random.split(rng, 3)
    gains = jax.random.normal(keys[2], (*stack, n), jnp.float32)
    gains = gains * jax.lax.rsqrt(jnp.square(gains).mean(-1, keepdims=True))
    order = jnp.argsort(jax.random.uniform(keys[1], (*stack, n)), axis=-1).astype(jnp.int32)
    return jnp.zeros((*stack, d), jnp.float32), jax.random.rademacher(keys[0], (*stack, d), jnp.float32), order, gains


def _dimension(w, dimension, least):
    size = w.shape[-2] * w.shape[-1]
    if not least <= dimension <= size:
        raise UserError(f"dimension {dimension} does not fit a {w.shape[-2]}x{w.shape[-1]} matrix; it is {least} to {size}")


@register("kernel", "did", paper="arXiv:2012.13255", flops=1.05)
def did(w, rng, *, dimension=64):
    """Intrinsic dimension, DID: W + P z, z = 0 of ``dimension`` numbers, P a Fastfood transform H G Π H B.

    The paper has one z for the whole model; here each matrix has its own. Raises UserError for a dimension above the matrix.
    """
    _dimension(w, dimension, 1)
    return Intrinsic(w, *_fastfood(w, rng, dimension))


@register("kernel", "said", paper="arXiv:2012.13255", flops=1.05)
def said(w, rng, *, dimension=64):
    """Structure-aware intrinsic dimension, SAID: W + λ P z, λ = 1 and z = 0 together ``dimension`` numbers of each matrix.

    P as in ``did``. Raises UserError for a dimension above the matrix or below 2.
    """
    _dimension(w, dimension, 2)
    return StructuredIntrinsic(w, *_fastfood(w, rng, dimension - 1), jnp.ones(w.shape[:-2], jnp.float32))


@struct.dataclass
class Spectral(Kernel):
    """(U + ΔU) diag(sizes) (V + ΔV), ΔU and ΔV zero but for the ``picked`` vectors; U, V frozen, sizes, du, dv trained.

    a = U ``[..., d_in, m]``, b = V ``[..., m, d_out]``, sizes ``[..., m]``, du ``[..., d_in, r]``, dv ``[..., r, d_out]``,
    picked int32 ``[..., r]``.
    """

    a: jax.Array
    b: jax.Array
    sizes: jax.Array
    du: jax.Array
    dv: jax.Array
    picked: jax.Array

    trainable = ("sizes", "du", "dv")

    def dot(self, x):
        sizes = self.sizes.astype(x.dtype)
        du = _without_size(self.du, self.sizes[self.picked])
        dv = _without_size(self.dv.T, self.sizes[self.picked]).T
        on_left = jnp.matmul(x, self.a.astype(x.dtype))
        on_left = on_left.at[..., self.picked].add(jnp.matmul(x, du.astype(x.dtype))) * sizes
        on_picked = jnp.matmul(on_left[..., self.picked], dv.astype(x.dtype))
        return jnp.matmul(on_left, self.b.astype(x.dtype)) + on_picked

    def dense(self):
        add = jnp.vectorize(lambda w, d, p: w.at[:, p].add(d), signature="(i,m),(i,r),(r)->(i,m)")
        left = add(self.a, self.du, self.picked) * self.sizes[..., None, :]
        right = jnp.swapaxes(add(*(jnp.swapaxes(y, -1, -2) for y in (self.b, self.dv)), self.picked), -1, -2)
        return jnp.einsum("...im,...mo->...io", left, right, precision="highest")

    @property
    def shape(self):
        return (*self.a.shape[:-1], self.b.shape[-1])


@jax.custom_vjp
def _without_size(vectors, sizes):
    """``vectors [d, r]`` as they are; their gradient loses the factor ``sizes [r]`` (SST's enhanced gradient)."""
    return vectors


def _without_size_forward(vectors, sizes):
    return vectors, sizes


def _without_size_backward(sizes, g):
    return jnp.where(sizes == 0, 0.0, g / jnp.where(sizes == 0, 1.0, sizes)), jnp.zeros_like(sizes)


_without_size.defvjp(_without_size_forward, _without_size_backward)


@register("kernel", "sst", paper="arXiv:2405.15481", start="rounded", plain=True, flops=0.95)
def sst(w, rng, *, rank=8):
    """Sparse spectral training: W = U Σ Vᵀ, all of Σ trains and ``rank`` pairs u_j, v_j drawn with p ∝ σ_j.

    The vectors' gradients lack the factor σ_j, as the paper has them. A new round is this method again on the merged
    matrix. U and V are full, so a step is two products where W was one. Raises UserError around another kernel.
    """
    stack, d_in, d_out = _sizes(w, rank)
    _plain_only("sst", w)
    u, sizes, v = jnp.linalg.svd(w.astype(jnp.float32), full_matrices=False)
    chances = jnp.log(jnp.maximum(sizes, jnp.finfo(jnp.float32).tiny)) + jax.random.gumbel(rng, sizes.shape)
    picked = jnp.sort(jax.lax.top_k(chances, rank)[1], axis=-1).astype(jnp.int32)
    shapes = ((*stack, d_in, rank), (*stack, rank, d_out))
    return Spectral(u, v, sizes, *(jnp.zeros(s, jnp.float32) for s in shapes), picked)


def _plain_only(name, w):
    if is_kernel(w):
        raise UserError(f"{name} takes a plain matrix apart and cannot stand around a {type(w).__name__} kernel")


@struct.dataclass
class FactorsB(Factors):
    """scale · A B with A frozen."""

    trainable = ("b",)


@struct.dataclass
class Distilled(Factors):
    """`Factors` beside the frozen matrix ``original [..., d_in, d_out]`` of a teacher; weight ``[...]`` of the term."""

    original: jax.Array | None = None
    weight: jax.Array | None = None

    term, learns_from = "distillation", "original"


@struct.dataclass
class DistilledB(Distilled):
    """`Distilled` with A frozen."""

    trainable = ("b",)


TRAINED = {"both": (Factors, Distilled), "b": (FactorsB, DistilledB)}


@register("kernel", "pela", paper="arXiv:2310.10700", start="moved", plain=True)
def pela(w, rng, *, share=0.5, train="both", distil=0.0):
    """PELA: A B in place of W, A = U √S and B = √S Vᵀ of its top r, r (d_in + d_out) ≈ ``share`` · d_in d_out.

    train: both factors, or ``b`` alone with A frozen. With ``distil`` the loss has that times the mean squared difference of
    all layers' outputs from those of the model with W, which is kept and run beside. Raises UserError around another
    kernel, for a share outside (0, 1] and another ``train``.
    """
    del rng
    _plain_only("pela", w)
    *stack, d_in, d_out = w.shape
    if not 0 < share <= 1:
        raise UserError(f"share {share} of the weights is not above 0 and at most 1; nearest: {min(max(share, 0.01), 1):g}")
    if train not in TRAINED:
        raise UserError(f"train {train!r} is none of pela's{nearest(train, TRAINED)}")
    rank = max(1, round(share * d_in * d_out / (d_in + d_out)))
    u, sizes, v = jnp.linalg.svd(w.astype(jnp.float32), full_matrices=False)
    root = jnp.sqrt(sizes[..., :rank])
    a, b = u[..., :rank] * root[..., None, :], root[..., None] * v[..., :rank, :]
    low, weight = (a, b, jnp.ones(stack, jnp.float32)), term_weight(distil, stack)
    plain, distilled = TRAINED[train]
    return plain(*low) if weight is None else distilled(*low, w, weight)


@register("kernel", "ssf", paper="arXiv:2210.08823", start="moved")
def ssf(w, rng, *, spread=0.02):
    """SSF's scale: W diag(γ), γ ~ N(1, spread²) for each output; its shift β is the tap ``affine`` or the layer's bias.

    spread = 0 starts at W. Raises UserError for a negative spread.
    """
    if spread < 0:
        raise UserError(f"spread {spread} is negative; nearest: 0")
    return ScaledOut(w, 1 + spread * jax.random.normal(rng, (*w.shape[:-2], w.shape[-1]), jnp.float32))


@struct.dataclass
class Triplets(Kernel):
    """W + scale · A diag(e) B, W frozen; A ``[..., d_in, r]``, e ``[..., r]``, B ``[..., r, d_out]``, scale ``[...]``.

    weight ``[...]`` of the orthogonality term, None without it.
    """

    base: jax.Array | Kernel
    a: jax.Array
    e: jax.Array
    b: jax.Array
    scale: jax.Array
    weight: jax.Array | None = None

    trainable, term = ("a", "e", "b"), "orthogonality"

    def dot(self, x):
        low = jnp.matmul(x, self.a.astype(x.dtype)) * (self.e * self.scale).astype(x.dtype)
        return dot(self.base, x) + jnp.matmul(low, self.b.astype(x.dtype))

    def dense(self):
        left = self.a * (self.e * self.scale[..., None])[..., None, :]
        return dense(self.base) + jnp.einsum("...ir,...ro->...io", left, self.b, precision="highest")

    def penalty(self):
        """``[...]``: the mean of ‖AᵀA − I‖_F and ‖B Bᵀ − I‖_F."""
        grams = (jnp.einsum("...ir,...iq->...rq", self.a, self.a), jnp.einsum("...ro,...qo->...rq", self.b, self.b))
        # the root has no slope at zero, where factors are orthonormal
        return sum(jnp.sqrt(jnp.square(g - jnp.eye(g.shape[-1])).sum((-2, -1)) + 1e-12) for g in grams) / 2


@register("kernel", "adalora", paper="arXiv:2303.10512")
def adalora(w, rng, *, rank=12, alpha=16.0, orthogonality=0.5):
    """AdaLoRA: W + (alpha / rank) · P Λ Q, P and Q ~ N(0, .02²), Λ = 0; `adalora_adamw` zeroes the Λ of the least important.

    The loss has ``orthogonality`` times the mean of ‖PᵀP − I‖_F and ‖Q Qᵀ − I‖_F over all matrices, as the published code
    and PEFT have it; the paper squares and sums. Raises UserError for a rank above the matrix.
    """
    stack, d_in, d_out = _sizes(w, rank)
    keys = jax.random.split(rng)
    a = 0.02 * jax.random.normal(keys[0], (*stack, d_in, rank), jnp.float32)
    b = 0.02 * jax.random.normal(keys[1], (*stack, rank, d_out), jnp.float32)
    scale, weight = jnp.full(stack, alpha / rank, jnp.float32), term_weight(orthogonality, stack)
    return Triplets(w, a, jnp.zeros((*stack, rank), jnp.float32), b, scale, weight)


def triplets(params):
    """``{path: {field: array or None}}`` of all triplets in a tree, or in its trainable half or gradient."""
    leaves = tree.flatten(params, is_leaf=is_kernel)
    return {p: {f: getattr(k, f) for f in Triplets.trainable} for p, k in leaves.items() if isinstance(k, Triplets)}


def importance(params, grads, before=None, *, beta1=0.85, beta2=0.85):
    """AdaLoRA's smoothed sensitivity and uncertainty, ``(Ī, Ū)``, after one more step; before: those of the last step.

    I = |w ∂L/∂w|, Ī ← β1 Ī + (1 − β1) I, Ū ← β2 Ū + (1 − β2) |I − Ī|, for every number of every triplet.
    """
    values, slopes = triplets(params), triplets(grads)
    now = jax.tree.map(lambda w, g: jnp.abs(w * g), values, slopes)
    mean, spread = before or (jax.tree.map(jnp.zeros_like, now),) * 2
    mean = jax.tree.map(lambda m, i: beta1 * m + (1 - beta1) * i, mean, now)
    return mean, jax.tree.map(lambda u, m, i: beta2 * u + (1 - beta2) * jnp.abs(i - m), spread, mean, now)


def triplet_scores(state):
    """``{path: [..., r]}``: S = Ī Ū of e, plus the means of S over the vectors of A and B."""
    scores = jax.tree.map(jnp.multiply, *state)
    return {p: s["e"] + s["a"].mean(-2) + s["b"].mean(-1) for p, s in scores.items()}


def allocate(params, state, budget):
    """AdaLoRA's allocation: keeps the ``budget`` triplets of the highest scores over all matrices, zeroes the other e.

    state: from ``importance``; budget: int, may be traced. They may come back: e still trains. A pure function of its
    arguments, to be called every few steps with ``budget_at``.
    """
    scores = triplet_scores(state)
    flat = jnp.sort(jnp.concatenate([s.reshape(-1) for s in scores.values()]))
    edge = jnp.where(budget >= flat.size, -jnp.inf, flat[jnp.clip(flat.size - budget - 1, 0, flat.size - 1)])

    def cut(path, leaf):
        return leaf.replace(e=jnp.where(scores[path] > edge, leaf.e, 0.0)) if path in scores else leaf

    return tree.map_with_path(cut, params, is_leaf=is_kernel)


def budget_at(step, *, start, target, warmup, final, total):
    """AdaLoRA's cubic schedule of the number of triplets: ``start`` until warmup, ``target`` in the last ``final`` steps."""
    if not 0 <= warmup < total - final:
        raise UserError(f"no step is left between a warmup of {warmup} and the last {final} of {total}")
    left = 1 - (step - warmup) / (total - final - warmup)
    return start if step <= warmup else target if step > total - final else int((start - target) * left**3 + target)


def contributions(loss, base, tuned, *, steps=10):
    """What the change of each matrix did to ``loss(params)``: Σ |∫ ∂L/∂θ(θ + t Δ) dt ⊙ Δ|, ``{path: [layers] or []}``.

    The integrated gradients by which CoLoRA (arXiv:2408.01099) sizes its layers; ``steps`` midpoints of the way from
    ``base`` to ``tuned``, trees of plain arrays.
    """
    change = jax.tree.map(jnp.subtract, tuned, base)

    def add(total, t):
        slope = jax.grad(loss)(jax.tree.map(lambda w, d: w + t * d, base, change))
        return jax.tree.map(lambda a, g, d: a + g * d / steps, total, slope, change), None

    total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, base), (jnp.arange(steps) + 0.5) / steps)
    return {p: jnp.abs(x).sum((-2, -1)) for p, x in tree.flatten(total).items() if p.endswith("/kernel")}


def apportion(scores, budget, *, least=1, most=None):
    """Ranks in proportion to ``{path: [layers] or []}`` scores, Σ = ``budget``, each ``least`` to ``most``; the same shapes.

    CoLoRA's rank per matrix; the map from a contribution to a rank is ours. Raises UserError for a budget out of reach.
    """
    flat = np.concatenate([np.asarray(s, np.float64).reshape(-1) for s in scores.values()])
    most = budget if most is None else most
    if not least * flat.size <= budget <= most * flat.size:
        raise UserError(f"a budget of {budget} ranks is not {least} to {most} for each of {flat.size} matrices")
    ranks = np.full(flat.size, least)
    for _ in range(budget - ranks.sum()):
        # the next rank goes where a matrix has the most score for each rank it would hold (D'Hondt's rule)
        ranks[np.argmax(np.where(ranks < most, flat / (ranks + 1), -1))] += 1
    ends = np.cumsum([np.size(s) for s in scores.values()])
    parts = np.split(ranks, ends[:-1])
    return {p: r.reshape(np.shape(s)) for (p, s), r in zip(scores.items(), parts, strict=True)}


def with_ranks(params, ranks):
    """`LowRank` kernels cut to ``ranks {path: [layers] or []}``: what lies beyond is zero in A and B and stays zero.

    Raises UserError that names a leaf which is no `LowRank` of at least that rank.
    """

    def cut(path, leaf):
        if path not in ranks:
            return leaf
        wanted = np.asarray(ranks[path])
        if not isinstance(leaf, LowRank) or wanted.max() > leaf.a.shape[-1]:
            raise UserError(f"{path} is no low-rank kernel of rank {wanted.max()} or more")
        kept = jnp.asarray(np.arange(leaf.a.shape[-1]) < wanted[..., None], leaf.a.dtype)
        return leaf.replace(a=leaf.a * kept[..., None, :], b=leaf.b * kept[..., None])

    missing = sorted(set(ranks) - set(tree.flatten(params, is_leaf=is_kernel)))
    if missing:
        raise UserError(f"{missing[0]} is no leaf of this tree")
    return tree.map_with_path(cut, params, is_leaf=is_kernel)
