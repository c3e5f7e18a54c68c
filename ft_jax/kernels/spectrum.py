"""Kernels whose change of W is given in another basis: frequencies, wavelets, circulant blocks.

Einsum letters: n input block, m output block, f frequency inside them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.experimental.layout import Layout, with_layout_constraint

from ft_jax.errors import UserError
from ft_jax.kernels.base import Kernel, dense, dot, is_kernel
from ft_jax.kernels.sparse import Sparse, scatter
from ft_jax.registry import register


@functools.lru_cache(maxsize=64)
def places_of(seed, d_in, d_out, count):
    """The first ``count`` of torch's ``randperm(d_out · d_in)`` at a seed, as flat places of a ``[d_in, d_out]`` matrix.

    A Fisher-Yates shuffle by the 32-bit numbers of the Mersenne Twister, as in torch on a CPU: an adapter of PEFT's holds
    the seed and no places, and they are these.
    """
    draws, size = np.random.RandomState(seed).randint(0, 2**32, count, np.uint32), d_out * d_in
    moved, out = {}, []
    for i in range(count):
        j = i + int(draws[i]) % (size - i)
        out.append(moved.get(j, j))
        moved[j] = moved.get(i, i)
    rows, columns = np.divmod(np.asarray(out), d_in)
    return (columns * d_out + rows).astype(np.int32)


@struct.dataclass
class Frequencies(Sparse):
    """W + scale · Re F⁻¹(C), W frozen, C zero but for ``values`` at the flat ``places`` of a matrix of W's shape.

    F⁻¹ is the inverse discrete Fourier transform in two dimensions. values, places ``[..., n]``; scale, seed ``[...]``:
    the seed that the places were drawn by.
    """

    scale: jax.Array
    seed: jax.Array

    def dot(self, x):
        if is_kernel(self.base):
            return dot(self.base, x) + jnp.matmul(x, self.delta().astype(x.dtype))
        return jnp.matmul(x, self.dense().astype(x.dtype))

    def delta(self):
        return self.scale[..., None, None] * self._back(scatter(self.values, self.places, self.shape))

    def _back(self, spectrum):
        # XLA's FFT on a CPU wants rows in order and refuses what the partitioner may hand it otherwise.
        rows = Layout(major_to_minor=tuple(range(spectrum.ndim)))
        return jnp.fft.ifft2(with_layout_constraint(spectrum.astype(jnp.complex64), rows)).real


@struct.dataclass
class Wavelets(Frequencies):
    """As `Frequencies`, with the inverse Haar transform of one level; odd sides are one longer before it and cut after."""

    def _back(self, spectrum):
        d_in, d_out = spectrum.shape[-2:]
        halves = -(-d_in // 2), -(-d_out // 2)
        padding = [(0, 0)] * (spectrum.ndim - 2) + [(0, -d_in % 2), (0, -d_out % 2)]
        bands = jnp.pad(spectrum, padding)
        low, rows = bands[..., : halves[0], : halves[1]], bands[..., halves[0] :, : halves[1]]
        columns, both = bands[..., : halves[0], halves[1] :], bands[..., halves[0] :, halves[1] :]
        # PEFT has the bands of rows and columns the other way round; for places drawn at random it is all one.
        signs = [[low + rows + columns + both, low - rows + columns - both],
                 [low + rows - columns - both, low - rows - columns + both]]  # fmt: skip
        grid = jnp.stack([jnp.stack(row, -1) for row in signs], -3) / 2
        return grid.reshape(*spectrum.shape[:-2], 2 * halves[0], 2 * halves[1])[..., :d_in, :d_out]


def _drawn(w, kernel, count, scale, seed):
    *stack, d_in, d_out = w.shape
    if not 1 <= count <= d_in * d_out:
        raise UserError(f"{count} coefficients do not fit a {d_in}x{d_out} matrix; largest: {d_in * d_out}")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed {seed} is none of torch's 32-bit ones; nearest: {min(max(seed, 0), 2**32 - 1)}")
    places = jnp.broadcast_to(places_of(seed, d_in, d_out, count), (*stack, count))
    values, full = jnp.zeros((*stack, count), jnp.float32), functools.partial(jnp.full, stack)
    return kernel(w, values, places, full(scale, jnp.float32), full(seed, jnp.uint32))


@register("kernel", "fourierft", paper="arXiv:2405.03003", fit={"count": 64}, flops=1.2)
def fourierft(w, rng, *, count=1000, scale=150.0, seed=777):
    """FourierFT: W + scale · Re F⁻¹(C), ``count`` coefficients of C train, 0 at the start, at places that ``seed`` draws.

    The places are the same in all matrices of a size, and PEFT's. A change of full rank: its gradient is that of W, so a
    step costs what full fine-tuning does and the transforms; state and file hold ``count`` numbers. UserError for more
    than W has entries.
    """
    del rng
    return _drawn(w, Frequencies, count, scale, seed)


@register("kernel", "waveft", paper="arXiv:2505.12532", fit={"count": 64}, flops=1.1)
def waveft(w, rng, *, count=2592, scale=25.0, seed=777):
    """WaveFT: W + scale · H⁻¹(C), H the Haar transform, ``count`` coefficients of C train, at places that ``seed`` draws.

    As `fourierft`, but a coefficient moves four neighbouring entries of W alone.
    """
    del rng
    return _drawn(w, Wavelets, count, scale, seed)


@struct.dataclass
class Circulant(Kernel):
    """W + Δ, W frozen; block (n, m) of Δ holds c_mn[(row − column) mod b] / d_in; c ``[..., d_out / b, d_in / b, b]``."""

    base: jax.Array | Kernel
    c: jax.Array

    trainable = ("c",)

    def dot(self, x):
        b = self.c.shape[-1]
        blocks = jnp.fft.rfft(x.astype(jnp.float32).reshape(*x.shape[:-1], -1, b))
        product = jnp.einsum("...nf,mnf->...mf", blocks, jnp.conj(jnp.fft.rfft(self.c)), precision="highest")
        change = jnp.fft.irfft(product, b).reshape(*x.shape[:-1], -1) / x.shape[-1]
        return dot(self.base, x) + change.astype(x.dtype)

    def dense(self):
        b, (d_in, d_out) = self.c.shape[-1], self.base.shape[-2:]
        where = (np.arange(b)[:, None] - np.arange(b)) % b
        blocks = jnp.moveaxis(self.c[..., where], -4, -2)  # [..., n, row, m, column]
        return dense(self.base) + blocks.reshape(*self.c.shape[:-3], d_in, d_out) / d_in


@register("kernel", "c3a", paper="arXiv:2407.19342", fit={"block": 8})
def c3a(w, rng, *, block=256):
    """C3A: W + Δ of circulant blocks of side ``block``, multiplied by FFT; d_in d_out / block parameters, 0 at the start.

    PEFT's default start is a small random one. Raises UserError for a block that does not divide both sides.
    """
    del rng
    *stack, d_in, d_out = w.shape
    if block < 1 or d_in % block or d_out % block:
        fits = [b for b in range(1, min(d_in, d_out) + 1) if d_in % b == 0 == d_out % b]
        near = min(fits, key=lambda b: abs(b - block))
        raise UserError(f"c3a: blocks of {block} do not divide a {d_in}x{d_out} matrix; nearest: {near}")
    return Circulant(w, jnp.zeros((*stack, d_out // block, d_in // block, block), jnp.float32))
