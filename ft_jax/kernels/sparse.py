"""Sparse and sliced kernels: few entries, rows or columns of a matrix train. Einsum letters: i input, o output, r rank."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ft_jax import tree
from ft_jax.errors import UserError, nearest
from ft_jax.kernels.base import Kernel, dense, dot, is_kernel, term_weight
from ft_jax.kernels.lowrank import _sizes, lora
from ft_jax.registry import register

BLOCK = 64


@struct.dataclass
class Sparse(Kernel):
    """W + S, S zero but for ``values [..., n]`` at the flat ``places [..., n]`` int32 (row · d_out + column); W frozen."""

    base: jax.Array | Kernel
    values: jax.Array
    places: jax.Array

    trainable = ("values",)

    def dot(self, x):
        if is_kernel(self.base):
            return dot(self.base, x) + _times(x, self.values, self.places, self.shape[-1])
        return _moved(x, self.base, self.values, self.places)

    def dense(self):
        return dense(self.base) + self.delta()

    def delta(self):
        """S as a full matrix."""
        return scatter(self.values, self.places, self.shape)


@struct.dataclass
class Scattered(Sparse):
    """SHiRA's: `Sparse` at places that were drawn, which is a kind of its own in PEFT."""


@struct.dataclass
class SparseNorm(Sparse):
    """`Sparse` with SaRA's term ‖(W + S) ⊙ M‖_*, M the trained places: one SVD a matrix and step."""

    weight: jax.Array | None = None

    term = "nuclear_norm"

    def penalty(self):
        """``[...]``; gradients reach the values alone."""
        trained = jax.lax.stop_gradient(gather(dense(self.base), self.places)) + self.values
        return jnp.linalg.svd(scatter(trained, self.places, self.shape), compute_uv=False).sum(-1)


@struct.dataclass
class Factors(Kernel):
    """scale · A B and nothing else; A ``[..., d_in, r]``, B ``[..., r, d_out]``, both trained, scale ``[...]``."""

    a: jax.Array
    b: jax.Array
    scale: jax.Array

    trainable = ("a", "b")

    def dot(self, x):
        return jnp.matmul(jnp.matmul(x, self.a.astype(x.dtype)), self.b.astype(x.dtype)) * self.scale.astype(x.dtype)

    def dense(self):
        return self.scale[..., None, None] * jnp.einsum("...ir,...ro->...io", self.a, self.b, precision="highest")

    @property
    def shape(self):
        return (*self.a.shape[:-1], self.b.shape[-1])


@struct.dataclass
class Rows(Kernel):
    """W whose first rows move by ``values [..., s, d_out]``; W frozen."""

    base: jax.Array | Kernel
    values: jax.Array

    trainable = ("values",)

    def dot(self, x):
        return dot(self.base, x) + jnp.matmul(x[..., : self.values.shape[-2]], self.values.astype(x.dtype))

    def dense(self):
        return dense(self.base) + _padded(self.values, self.shape, -2)


@struct.dataclass
class Columns(Kernel):
    """W whose first columns move by ``values [..., d_in, s]``; W frozen."""

    base: jax.Array | Kernel
    values: jax.Array

    trainable = ("values",)

    def dot(self, x):
        moved = jnp.matmul(x, self.values.astype(x.dtype))
        return dot(self.base, x) + _padded(moved, (self.shape[-1],), -1)

    def dense(self):
        return dense(self.base) + _padded(self.values, self.shape, -1)


def _padded(x, shape, axis):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, shape[axis] - x.shape[axis])
    return jnp.pad(x, widths)


def scatter(values, places, shape):
    """The matrix ``shape`` with ``values [..., n]`` at flat ``places [..., n]`` and zeros elsewhere."""
    *stack, d_in, d_out = shape
    flat = jnp.zeros((*stack, d_in * d_out), values.dtype)
    return jnp.put_along_axis(flat, places, values, axis=-1, inplace=False).reshape(shape)


def gather(w, places):
    """``[..., n]``: the entries of ``w [..., d_in, d_out]`` at flat ``places``."""
    return jnp.take_along_axis(w.reshape(*w.shape[:-2], -1), places, axis=-1)


@jax.custom_vjp
def _moved(x, w, values, places):
    """x (W + S) as one product; the gradient of S is Σ_tokens x_row g_column at its places, n · tokens products and no matrix."""
    return jnp.matmul(x, _together(w, values, places, x.dtype))


def _together(w, values, places, dtype):
    """W + S, summed in float32: of a bfloat16 W a small S would round away."""
    return (w.astype(jnp.float32) + scatter(values.astype(jnp.float32), places, w.shape)).astype(dtype)


def _moved_forward(*args):
    return _moved(*args), args


def _moved_backward(kept, g):
    x, w, values, places = kept
    axes = tuple(range(x.ndim - 1))
    return (jnp.matmul(g, _together(w, values, places, x.dtype).T),
            jax.lax.dot_general(x, g, ((axes, axes), ((), ()))).astype(w.dtype), _at(x, g, places).astype(values.dtype), None)  # fmt: skip


def _at(x, g, places):
    """xᵀ g at ``places``, BLOCK tokens at a time: what is gathered stays in a cache, and n · BLOCK numbers are held."""
    rows, columns = jnp.divmod(places, g.shape[-1])
    tokens = x.size // x.shape[-1]
    cut = [jnp.pad(a.reshape(tokens, -1).astype(jnp.float32), ((0, -tokens % BLOCK), (0, 0))) for a in (x, g)]

    def block(total, part):
        one, other = (a.T for a in part)
        return total + (one[rows] * other[columns]).sum(-1), None

    return jax.lax.scan(block, jnp.zeros(places.shape), tuple(a.reshape(-1, BLOCK, a.shape[-1]) for a in cut))[0]


_moved.defvjp(_moved_forward, _moved_backward)


@functools.partial(jax.checkpoint, static_argnums=3)
def _times(x, values, places, d_out):
    """x S by gathering and summing whole columns of activations: n · tokens products, and no d_in x d_out one."""
    rows, columns = jnp.divmod(places, d_out)
    taken = jnp.moveaxis(x, -1, 0)[rows] * values.astype(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
    total = jnp.zeros((d_out, *x.shape[:-1]), jnp.float32).at[columns].add(taken.astype(jnp.float32))
    return jnp.moveaxis(total, 0, -1).astype(x.dtype)


def _count(share, size):
    if not 0 < share <= 1:
        raise UserError(f"share {share} of the weights is not above 0 and at most 1; nearest: {min(max(share, 1 / size), 1):g}")
    return max(1, round(share * size))


def _largest(scores, count):
    """Flat places ``[..., count]`` int32, ascending, of the largest scores ``[..., d_in, d_out]``."""
    flat = scores.reshape(*scores.shape[:-2], -1)
    return jnp.sort(jax.lax.top_k(flat, count)[1], axis=-1).astype(jnp.int32)


PICKS = {
    "random": lambda w, rng: jax.random.uniform(rng, w.shape),
    "largest": lambda w, rng: jnp.abs(dense(w)),
    "smallest": lambda w, rng: -jnp.abs(dense(w)),
}


def _sparse(w, rng, share, pick):
    if pick not in PICKS:
        raise UserError(f"pick {pick!r} is no way to choose weights{nearest(pick, PICKS)}")
    places = _largest(PICKS[pick](w, rng), _count(share, w.shape[-2] * w.shape[-1]))
    return Sparse(w, jnp.zeros(places.shape, jnp.float32), places)


@register("kernel", "sparse", paper="arXiv:2401.16405")
def sparse(w, rng, *, share=0.01, pick="largest"):
    """Sparse delta: W + S, S = 0 at first and trained at ``share`` of the places, the ``pick`` |W|: largest, smallest, random.

    ``regrow`` moves the places as SpIEL does; as it is, largest or smallest, this is Super-Tuning (arXiv:2607.09287), and
    ``supra`` puts LoRA beside it. A step holds 64 numbers for each of a matrix's places. Raises UserError for a
    share outside (0, 1] and an unknown pick.
    """
    return _sparse(w, rng, share, pick)


@register("kernel", "shira", paper="arXiv:2406.13175", fit={"rank": 4})
def shira(w, rng, *, rank=8):
    """SHiRA: W plus a sparse change at rank (d_in + d_out) random places drawn once, as many numbers as LoRA trains, all 0.

    As `sparse` in a step; PEFT's has the gradient of all W. UserError where the places outnumber the entries of W.
    """
    *stack, d_in, d_out = w.shape
    count, largest = rank * (d_in + d_out), d_in * d_out // (d_in + d_out)
    if not 1 <= rank <= largest:
        raise UserError(f"rank {rank} makes {count} places, a {d_in}x{d_out} matrix has {d_in * d_out}; largest rank: {largest}")

    def draw(key):
        return jnp.sort(jax.random.permutation(key, d_in * d_out)[:count]).astype(jnp.int32)

    places = jax.lax.map(draw, jax.random.split(rng, int(np.prod(stack)))).reshape(*stack, count)
    return Scattered(w, jnp.zeros((*stack, count), jnp.float32), places)


@register("kernel", "sara", paper="arXiv:2409.06633")
def sara(w, rng, *, share=0.05, norm=0.0):
    """SaRA: W + S, S = 0 at first and trained at the ``share`` smallest |W|; loss + norm · mean over W of ‖(W + S) ⊙ M‖_*.

    The published code takes one matrix a step at random, which is that mean on average, and leaves norm at 0. The
    progressive step is this method again on the merged matrix. Raises UserError for a share outside (0, 1].
    """
    low = _sparse(w, rng, share, "smallest")
    return SparseNorm(low.base, low.values, low.places, term_weight(norm, w.shape[:-2]))


@register("kernel", "dsee", paper="arXiv:2111.00160")
def dsee(w, rng, *, rank=8, alpha=16.0, entries=64, turns=10):
    """DSEE: W + (alpha / rank) · A B + S, S trained at the ``entries`` largest |W − L| of W ≈ L + S, rank L ≤ rank.

    The places come from ``turns`` of L = SVD_r(W − S), S = the entries of W − L (the paper's GreBsmo, exact steps).
    Raises UserError for a rank or a number of entries that the matrix does not have.
    """
    stack, d_in, d_out = _sizes(w, rank)
    if not 1 <= entries <= d_in * d_out:
        raise UserError(f"entries {entries} do not fit a {d_in}x{d_out} matrix; largest: {d_in * d_out}")
    places = _outliers(dense(w).astype(jnp.float32), rank, entries, turns)
    return Sparse(lora(w, rng, rank=rank, alpha=alpha), jnp.zeros((*stack, entries), jnp.float32), places)


def _outliers(w, rank, entries, turns):
    """Places of S in W ≈ L + S, rank L ≤ ``rank`` and ``entries`` numbers in S, after ``turns`` exact steps from S = 0."""

    def turn(_, s):
        u, sizes, v = jnp.linalg.svd(w - s, full_matrices=False)
        rest = w - jnp.einsum("...ir,...ro->...io", u[..., :rank] * sizes[..., None, :rank], v[..., :rank, :], precision="highest")
        places = _largest(jnp.abs(rest), entries)
        return scatter(gather(rest, places), places, w.shape)

    s = jax.lax.fori_loop(0, turns, turn, jnp.zeros_like(w))
    return _largest(jnp.abs(s), entries)


@register("kernel", "sltrain", paper="arXiv:2406.02214", start="moved")
def sltrain(w, rng, *, rank=8, alpha=16.0, share=0.03):
    """SLTrain: (alpha / rank) · A B + S in place of W, from scratch: S at random places, U(±1/√d_in), A Kaiming, B = 0.

    All of it trains; of W only the shape is kept. Raises UserError for a rank above the matrix and a share outside (0, 1].
    """
    stack, d_in, d_out = _sizes(w, rank)
    keys, bound = jax.random.split(rng, 3), d_in**-0.5
    places = _largest(jax.random.uniform(keys[0], w.shape), _count(share, d_in * d_out))
    values = jax.random.uniform(keys[1], places.shape, jnp.float32, -bound, bound)
    a = jax.random.uniform(keys[2], (*stack, d_in, rank), jnp.float32, -bound, bound)
    low = Factors(a, jnp.zeros((*stack, rank, d_out), jnp.float32), jnp.full(stack, alpha / rank, jnp.float32))
    return Sparse(low, values, places)


SIDES = {"in": (Rows, -2), "out": (Columns, -1)}


@register("kernel", "s2ft", paper="arXiv:2412.06289")
def s2ft(w, rng, *, share=0.05, side="in"):
    """S²FT: W + [V; 0] or W + [V 0], a dense slice V of ``share`` of the rows (side in) or columns (side out), V = 0.

    The slice comes first; ``co_permute`` brings chosen channels and heads there on both sides of a coupled pair, and
    side=out above, side=in below then train the same ones. Raises UserError for a share outside (0, 1], another side.
    """
    del rng
    if side not in SIDES:
        raise UserError(f"side {side!r} is no side of a matrix{nearest(side, SIDES)}")
    kernel, axis = SIDES[side]
    shape = list(w.shape)
    shape[axis] = _count(share, w.shape[axis])
    return kernel(w, jnp.zeros(shape, jnp.float32))


def regrow(kernel, gradient, count):
    """SpIEL's learned places (arXiv:2401.16405): drops the ``count`` smallest |values|, grows where |∂L/∂W| is largest.

    gradient: ``[..., d_in, d_out]``, accumulated, of the dense matrix. A dropped change is lost; a grown one starts at 0.
    """
    flat = gradient.reshape(*gradient.shape[:-2], -1)
    if not 0 <= count <= min(kernel.values.shape[-1], flat.shape[-1] - kernel.values.shape[-1]):
        raise UserError(f"cannot move {count} of {kernel.values.shape[-1]} places in a matrix of {flat.shape[-1]} weights")
    kept = jnp.sort(jax.lax.top_k(jnp.abs(kernel.values), kernel.values.shape[-1] - count)[1], axis=-1)
    values, places = (jnp.take_along_axis(x, kept, axis=-1) for x in (kernel.values, kernel.places))
    free = jnp.put_along_axis(jnp.abs(flat), kernel.places, -1.0, axis=-1, inplace=False)
    grown = jax.lax.top_k(free, count)[1].astype(jnp.int32)
    places = jnp.concatenate([places, grown], -1)
    order = jnp.argsort(places, axis=-1)
    values = jnp.concatenate([values, jnp.zeros(grown.shape, values.dtype)], -1)
    return kernel.replace(values=jnp.take_along_axis(values, order, -1), places=jnp.take_along_axis(places, order, -1))


# What reordering FFN channels and attention heads (with their queries) permutes: path -> axis of its kernel.
COUPLED = {
    "channels": {"mlp/up": -1, "mlp/gate": -1, "mlp/down": -2},
    "heads": {"attn/q": -1, "attn/k": -1, "attn/v": -1, "attn/out": -2},
}


def first(chosen, total):
    """A permutation ``[..., total]`` with ``chosen [..., s]`` first and the others after them in order."""
    chosen = np.asarray(chosen)
    rows = chosen.reshape(-1, chosen.shape[-1])
    order = [[*row, *sorted(set(range(total)) - set(row.tolist()))] for row in rows]
    if any(len(o) != total for o in order):
        raise UserError(f"the chosen {chosen.tolist()} are not different numbers below {total}")
    return np.asarray(order, np.int32).reshape(*chosen.shape[:-1], total)


def co_permute(params, **orders):
    """The same function with reordered units (S²FT, arXiv:2412.06289): ``channels [layers, d_ff]``, ``heads [layers, kv heads]``.

    Columns of q, k, v (up, gate) and their biases move with the rows of out (down); ``np.argsort(order)`` undoes it.
    Query heads move with the key/value head that they share. Raises UserError for an order that is no permutation.
    """
    moves = {}
    for kind, order in orders.items():
        if kind not in COUPLED:
            raise UserError(f"nothing is coupled by {kind!r}{nearest(kind, COUPLED)}")
        order = np.asarray(order)
        if (np.sort(order) != np.arange(order.shape[-1])).any():
            raise UserError(f"the order of {kind} is no permutation of 0 … {order.shape[-1] - 1} in each layer")
        for name, axis in COUPLED[kind].items():
            moves[f"layers/{name}/kernel"] = order, axis
            if axis == -1:
                moves[f"layers/{name}/bias"] = order, axis
    return tree.map_with_path(lambda p, x: _reordered(p, x, *moves[p]) if p in moves else x, params, is_leaf=is_kernel)


def _reordered(path, x, order, axis):
    layers, units = order.shape
    if is_kernel(x) or x.shape[0] != layers or x.shape[axis] % units:
        raise UserError(f"{path} (shape {x.shape}) is no stack of {layers} plain matrices with {units} units to reorder")
    width = x.shape[axis] // units
    places = (order[..., None] * width + np.arange(width)).reshape(layers, -1)
    return jax.vmap(lambda w, p: jnp.take(w, p, axis=axis))(x, jnp.asarray(places))
