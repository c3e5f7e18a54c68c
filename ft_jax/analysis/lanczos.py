"""Top singular values and left vectors of a matrix by block Lanczos, with a bound on the error of each vector.

A matrix is ``(w, a, b)``: W + A B with w ``[..., d_in, d_out]``, a ``[..., d_in, r]``, b ``[..., r, d_out]`` (a and b
None for none), leading axes a batch; the product A B is never formed. Left vectors are directions of the output space
(see `spectral`). The iteration runs in float32 with numpy or, on an accelerator, with jax.numpy: one source, handed
the module as ``xp``. What it returns is judged in float64 on the host (`polish`), so no claim rests on float32.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_CHUNK = 1 << 22  # float64 numbers of a matrix that exist at one time
_FLOOR = 6e-7  # residual_j / (σ_1 σ_j) that float32 hardly gets under
GUARD = 6  # Ritz vectors kept beyond the k asked for: they separate the k-th from the rest
STEPS = 5  # block products between two Rayleigh-Ritz steps, enough from a good start


class Ritz(NamedTuple):
    """Approximate eigenpairs of WᵀW in float64: values ``[p]`` descending, vectors ``[d_out, p]``, residuals ``[p]``."""

    values: np.ndarray
    vectors: np.ndarray
    residuals: np.ndarray


def basis_size(k, steps=STEPS):
    """Columns that one round of `top` holds."""
    return (1 + steps) * (k + GUARD)


def _t(x):
    return x.swapaxes(-1, -2)


def forward(op, x):
    """``W x`` for x ``[..., d_out, p]``."""
    w, a, b = op
    return w @ x if a is None else w @ x + a @ (b @ x)


def backward(op, y):
    """``Wᵀ y`` for y ``[..., d_in, p]``."""
    w, a, b = op
    return _t(w) @ y if a is None else _t(w) @ y + _t(b) @ (_t(a) @ y)


def transposed(op):
    w, a, b = op
    return (_t(w), None, None) if a is None else (_t(w), _t(b), _t(a))


def _orthonormal(xp, t, against=None):
    """Orthonormal columns that span t, orthogonal to the columns of ``against``.

    Twice is enough where t has full rank. Where it has not, QR turns rounding into columns that may lie in the span of
    ``against`` but for a thousandth: a third pass makes them new directions. The second one tells, as it shrinks them.
    """
    for i in range(3):
        if against is not None:
            t = t / xp.maximum(xp.linalg.norm(t, axis=-2, keepdims=True), 1e-30)
            t = t - against @ (_t(against) @ t)
        t, r = xp.linalg.qr(t)
        if i and xp is np and np.abs(np.diagonal(r, axis1=-2, axis2=-1)).min() > 0.5:
            break
    return t


def _ritz(xp, basis, image, p):
    """Rayleigh-Ritz: ``(values [p], vectors [n, p], their images)`` of the span of ``basis``, largest first."""
    small = _t(basis) @ image
    values, turn = xp.linalg.eigh((small + _t(small)) / 2)
    values, turn = values[..., ::-1][..., :p], turn[..., ::-1][..., :p]
    return values, basis @ turn, image @ turn


def _begin(xp, op, start, p):
    basis = _orthonormal(xp, start)
    return _ritz(xp, basis, backward(op, forward(op, basis)), p)


def _round(xp, op, vectors, image, residual, steps):
    """Extends p Ritz vectors by ``steps`` blocks grown from their residuals; Ritz pairs of the whole."""
    basis, images, block = vectors, [image], residual
    for _ in range(steps):
        block = _orthonormal(xp, block, against=basis)
        basis = xp.concatenate([basis, block], axis=-1)
        block = backward(op, forward(op, block))
        images.append(block)
    return _ritz(xp, basis, xp.concatenate(images, axis=-1), vectors.shape[-1])


_jitted_begin = jax.jit(functools.partial(_begin, jnp), static_argnames="p")
_jitted_round = jax.jit(functools.partial(_round, jnp), static_argnames="steps")


def angle_bounds(values, residuals, k):
    """sin of the angle between each of the first k Ritz vectors and the eigenvector it stands for: ``[k]``, at most 1.

    For a window of Ritz pairs a..c that holds j: sqrt(1 + (‖R‖/δ)²) ‖R‖ / gap, with R the window's residuals, δ the
    distance of value j to the others inside and gap to those outside (Saad, Numerical Methods for Large Eigenvalue
    Problems, theorem 4.6, with ‖(I−P) u‖ ≤ ‖R‖ / gap); the best window counts. A window of one is residual / gap.
    Holds if no eigenvalue above the last Ritz value was missed, which a start with random vectors makes sure of
    but for chance.
    """
    p, j = len(values), np.arange(k)
    first, last = np.arange(p)[:, None], np.arange(p)[None, :]
    squares = np.concatenate([[0.0], np.cumsum(residuals**2)])
    inside = np.sqrt(np.clip(squares[last + 1] - squares[first], 0, None))
    above = np.concatenate([[np.inf], (values - residuals)[:-1]])  # the nearest value over a window that begins here
    # What a Ritz vector stands for may lie anywhere within its residual, so one far from done hides a larger value.
    below = np.concatenate([np.maximum.accumulate((values + residuals)[:0:-1])[::-1], [np.inf]])
    gap = np.minimum(above[None, :, None] - values[:k, None, None], values[:k, None, None] - below[None, None, :])
    step = np.concatenate([[np.inf], values[:-1] - values[1:], [np.inf]])
    up = np.where(first[None] < j[:, None, None], step[:k, None, None], np.inf)
    down = np.where(last[None] > j[:, None, None], step[1 : k + 1, None, None], np.inf)
    valid = (first[None] <= j[:, None, None]) & (j[:, None, None] <= last[None]) & (gap > 0)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        bound = np.sqrt(1 + np.square(inside / np.minimum(up, down))) * inside / gap
    return np.minimum(np.where(valid & ~np.isnan(bound), bound, 1.0).min(axis=(1, 2)), 1.0)


def angles(values, residuals, k):
    """What `top` drives under its tolerance: the worst of the first k `angle_bounds`."""
    return angle_bounds(values, residuals, k).max()


def value(values, residuals, k):
    """Instead of `angles`: the relative error of the k-th value, residual / value."""
    return residuals[k - 1] / max(values[k - 1], np.finfo(np.float64).tiny)


def _worst(error, values, residuals, k):
    """``(worst error of the first k, worst residual_j / (σ_1 σ_j) of all)`` Ritz pairs of every matrix of a batch."""
    values, residuals = np.asarray(values, np.float64), np.asarray(residuals, np.float64)
    rows = list(zip(values.reshape(-1, values.shape[-1]), residuals.reshape(-1, residuals.shape[-1])))
    size = max((r / np.sqrt(np.maximum(v[0] * v, np.finfo(np.float64).tiny))).max() for v, r in rows)
    return max(error(v, r, k) for v, r in rows), size


def top(op, start, k, *, tolerance=1e-3, error=angles, steps=STEPS, rounds=40, xp=np):
    """Top k + GUARD approximate left vectors ``[..., d_out, k + GUARD]`` of W, float32.

    Thick-restarted block Lanczos with full reorthogonalisation on the Gram matrix of the smaller side, from ``start``
    ``[..., d_out, ≥ k + GUARD]``, whose last columns should be random. Ends when the estimated ``error`` (`angles` or
    `value`) is within ``tolerance``, or residuals no longer fall, or after ``rounds``: the caller checks with `polish`.
    """
    wide = op[0].shape[-1] > op[0].shape[-2]
    small = transposed(op) if wide else op
    start = forward(op, start) if wide else start
    fast = xp is jnp
    begin = _jitted_begin if fast else functools.partial(_begin, np)
    advance = _jitted_round if fast else functools.partial(_round, np)
    values, vectors, image = begin(small, start, p=k + GUARD)
    best, stale = np.inf, 0
    for i in range(rounds):
        residual = image - vectors * values[..., None, :]
        worst, size = _worst(error, values, xp.linalg.norm(residual, axis=-2), k)
        best, stale = (size, 0) if size < 0.7 * best else (best, stale + 1)
        if i and (worst <= tolerance or size < _FLOOR or stale >= 3):  # the first round looks for what the start lacks
            break
        values, vectors, image = advance(small, vectors, image, residual, steps=steps)
    left = backward(op, vectors) if wide else vectors
    return left / xp.maximum(xp.linalg.norm(left, axis=-2, keepdims=True), 1e-30)


def polish(op, vectors):
    """Ritz pairs of WᵀW over the span of ``vectors`` ``[d_out, p]`` with residuals, products and sums in float64.

    One pass over one matrix (no batch), in chunks of rows.
    """
    w, a, b = (None if x is None else np.asarray(x) for x in op)
    basis = np.linalg.qr(np.asarray(vectors, np.float64))[0]
    step = max(1, _CHUNK // w.shape[1])
    small, image = 0.0, 0.0
    if a is not None:
        a, b = a.astype(np.float64), b.astype(np.float64)
        low, mixed = b @ basis, 0.0
    for at in range(0, w.shape[0], step):
        part = w[at : at + step].astype(np.float64)
        out = part @ basis
        if a is not None:
            out += a[at : at + step] @ low
            mixed = mixed + a[at : at + step].T @ out
        small, image = small + out.T @ out, image + part.T @ out
    if a is not None:
        image += b.T @ mixed
    values, turn = np.linalg.eigh(small)
    values, turn = values[::-1], turn[:, ::-1]
    vectors = basis @ turn
    return Ritz(values, vectors, np.linalg.norm(image @ turn - vectors * values, axis=0))
