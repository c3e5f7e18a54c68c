"""Intruder dimensions without a full factorisation of the tuned matrix.

Only the top k of the tuned matrix are computed (`lanczos.top`, from the base's top vectors, the directions of a
low-rank change and random ones), and checked in float64: each vector comes with a bound on its angle to the true one.
Where the bound leaves a count open, or a cosine less sure than ``tolerance``, the matrix falls back to the full
computation of `spectral`. The base's left vectors come from `svd_cache`, so max_i |cos(u0_i, u_j)| is one product.
"""

import concurrent.futures
import contextlib
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import threadpoolctl

from ft_jax import tree
from ft_jax.analysis import lanczos, spectral, svd_cache
from ft_jax.errors import UserError
from ft_jax.kernels import LowRank, dense, is_kernel

MIN_SIDE = 192  # under it a full factorisation is as quick


def parts(w):
    """``(w, a, b)`` of an array or kernel, float32: W + A B, a and b None unless the kernel is low-rank."""
    if isinstance(w, LowRank) and w.a.shape[-1] <= min(w.shape[-2:]) // 4:
        w0, scale = dense(w.base), w.scale[..., None, None]
        return tuple(x.astype(np.float32, copy=False) for x in (w0, w.a * scale, w.b))
    w = dense(w)
    return (w if isinstance(w, jax.Array) else np.asarray(w)).astype(np.float32, copy=False), None, None


def check(base, tuned):
    """UserError unless base and tuned (arrays or kernels) are finite matrices of one shape."""
    if tuple(base.shape) != tuple(tuned.shape) or len(base.shape) < 2 or 0 in base.shape:
        raise UserError(f"two matrices of one shape are needed, not {tuple(base.shape)} and {tuple(tuned.shape)}")
    for name, w in (("base", base), ("tuned", tuned)):
        if not all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(w)):
            raise UserError(f"the {name} matrix of shape {tuple(w.shape)} holds NaN or infinity")


def cosine_interval(cosine, sine):
    """Bounds ``(lower, upper)`` of |cos| when one of the vectors is off by an angle of that sine."""
    angle, off = np.arccos(np.clip(cosine, 0, 1)), np.arcsin(np.clip(sine, 0, 1))
    lower = np.where(angle + off < np.pi / 2, np.cos(np.minimum(angle + off, np.pi / 2)), 0.0)
    return lower, np.cos(np.maximum(angle - off, 0.0))


def update_directions(a, b, count):
    """Left vectors of A B ``[d_out, ≤count]``, strongest first: where a low-rank change points."""
    mixed = np.linalg.qr(a)[1] @ b
    values, vectors = np.linalg.eigh(mixed @ mixed.T)
    return mixed.T @ vectors[:, ::-1][:, :count]


def start_block(op, known, k, rng):
    """First block ``[d_out, m]`` for one matrix: known directions, those of the low-rank change, random ones."""
    d_out = op[0].shape[-1]
    blocks = [known[:, : k + 2]]
    if op[1] is not None:
        blocks.append(update_directions(np.asarray(op[1]), np.asarray(op[2]), k))
    random = max(lanczos.GUARD - 2, k + lanczos.GUARD - sum(x.shape[1] for x in blocks))
    blocks.append(rng.standard_normal((d_out, random), np.float32))
    return np.concatenate(blocks, axis=1).astype(np.float32)


def _device(*leaves):
    """jax.numpy when the tuned weights lie on an accelerator, else numpy: its BLAS needs no compilation."""
    on = [x for x in leaves if isinstance(x, jax.Array)]
    return jnp if on and next(iter(on[0].devices())).platform != "cpu" else np


def exact(base, tuned, k, left):
    """``(cosine, σ, vectors, error)`` by the full computation in float64; left: every left vector of the base."""
    w = np.asarray(dense(tuned), np.float32)
    sigma, vectors = spectral.top_left(w, k)
    cosine = np.minimum(np.abs(left @ vectors.astype(np.float32)).max(axis=0), 1.0)
    if np.array_equal(base, w):
        cosine = np.ones_like(cosine)
    return np.where(sigma > spectral.NULL * sigma[0], cosine, 1.0), sigma, vectors, np.zeros_like(sigma)


def _row(base, op, tuned, vectors, k, thresholds, tolerance, left):
    """``(cosine, σ, vectors, error), fell_back`` of one matrix from its Lanczos vectors."""
    ritz = lanczos.polish(op, vectors)
    sine = lanczos.angle_bounds(ritz.values, ritz.residuals, k)
    found = ritz.vectors[:, :k]
    cosine = np.minimum(np.abs(left @ found.astype(np.float32)).max(axis=0), 1.0)
    lower, upper = cosine_interval(cosine, sine)
    null = ritz.values[:k] <= spectral.NULL**2 * ritz.values[0]
    cosine, lower, upper = (np.where(null, 1.0, x) for x in (cosine, lower, upper))
    error = np.maximum(cosine - lower, upper - cosine)
    open_ = any(((lower < eps) & (upper >= eps)).any() for eps in thresholds)
    if open_ or error.max() > tolerance:
        return exact(base, tuned, k, left), True
    return (cosine, np.sqrt(np.clip(ritz.values[:k], 0, None)), found, error), False


def _copy(base, k, left, sigma):
    return (np.ones(k), sigma[:k].astype(np.float64), left[:k].T.astype(np.float64), np.zeros(k)), False


def same(base, op):
    """Whether W + A B is a copy of the base."""
    w, a, b = op
    return np.array_equal(base, w) and (a is None or not a.any() or not b.any())


_blas = functools.cache(threadpoolctl.ThreadpoolController)


def _each(fn, items):
    """``[fn(x) for x in items]``, a thread for each core: hashing, reading and small factorisations know no other way.

    BLAS gets the cores that are left over, as its threads would wait for one another.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(cores, len(items))
    if workers < 2:
        return [fn(x) for x in items]
    with _blas().limit(limits=cores // workers, user_api="blas"), concurrent.futures.ThreadPoolExecutor(workers) as pool:
        return list(pool.map(fn, items))


def _slice(w, i, lead):
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[lead:])[i], w)


def intruders(base, tuned, *, k=10, eps=0.5, sweep=(), tolerance=1e-3, left=False, xp=None):
    """Intruder dimensions (arXiv:2410.21228): top-k left vectors u_j of tuned with max_i |cos(u0_i, u_j)| < ε.

    base: array ``[..., d_in, d_out]``; tuned: array or kernel of that shape (`LowRank` is never made dense). Returns
    ``intruders [...]`` int32, ``max_cosine``, ``cosine_error`` (bound) and ``singular_values [..., k]`` float32,
    ``fell_back [...]`` bool (the full factorisation decided), and with ``left`` the vectors ``left [..., d_out, k]``.
    Counts are those of `spectral.intruder_dimensions` at ε and at every other threshold in ``sweep``; directions with
    σ = 0 and copies have cosine 1. Matrices with a side under 192 or too small for k are computed in full, which is no
    fall-back. ``xp``: jax.numpy or numpy; as a rule jax.numpy where tuned lies on an accelerator.
    """
    base, host = np.asarray(base, np.float32), tuned
    check(base, host)
    lead, (d_in, d_out) = base.shape[:-2], base.shape[-2:]
    depth, n = len(lead), min(d_in, d_out)
    xp = xp or _device(*jax.tree.leaves(tuned))
    if xp is np:
        tuned = jax.tree.map(np.asarray, tuned)
    flat, ops = base.reshape(-1, d_in, d_out), parts(tuned)
    ops = tuple(None if x is None else x.reshape(-1, *x.shape[depth:]) for x in ops)
    fast = n >= MIN_SIDE and 2 * lanczos.basis_size(k) <= n
    known = _each(svd_cache.left, flat)
    one = [tuple(None if x is None else x[i] for x in ops) for i in range(len(flat))]
    copies = [same(w, op) for w, op in zip(flat, one)]
    vectors = _vectors(one, known, copies, k, tolerance, xp) if fast else None

    def row(i):
        w, (u0, sigma) = flat[i], known[i]
        if copies[i]:
            return _copy(w, min(k, n), u0, sigma)
        if not fast:
            return exact(w, _slice(tuned, i, depth), k, u0), False
        return _row(w, one[i], _slice(tuned, i, depth), vectors[i], k, (eps, *sweep), tolerance, u0)

    rows = _each(row, range(len(flat)))
    cosine, sigma, found, error = (np.stack(x).reshape(*lead, *x[0].shape) for x in zip(*(row for row, _ in rows)))
    out = {"intruders": spectral.count_intruders(cosine, k=k, eps=eps), "max_cosine": cosine.astype(np.float32),
           "cosine_error": error.astype(np.float32), "singular_values": sigma.astype(np.float32),
           "fell_back": np.array([fell for _, fell in rows]).reshape(lead)}  # fmt: skip
    return out | ({"left": found.astype(np.float32)} if left else {})


def _vectors(ops, known, copies, k, tolerance, xp):
    """Lanczos vectors of every matrix that is no copy: one at a time with numpy, all together on an accelerator."""
    todo = [i for i, copy in enumerate(copies) if not copy]
    start = {i: start_block(ops[i], known[i][0].T, k, np.random.default_rng(i)) for i in todo}
    if xp is np:
        return dict(zip(todo, _each(lambda i: lanczos.top(ops[i], start[i], k, tolerance=tolerance), todo)))
    if not todo:
        return {}
    stack = [None if x[0] is None else jnp.stack(x) for x in zip(*(ops[i] for i in todo))]
    with contextlib.ExitStack() as stay:
        stay.enter_context(jax.default_matmul_precision("highest"))
        found = lanczos.top(tuple(stack), jnp.asarray(np.stack([start[i] for i in todo])), k,
                               tolerance=tolerance, xp=jnp)  # fmt: skip
    return dict(zip(todo, np.asarray(found)))


def over_tree(base, tuned, *, include=r".*layers/.*/kernel", **options):
    """``{path: intruders(base[path], tuned[path], **options)}`` for leaves whose path fully matches ``include``.

    tuned may hold kernels; taps and other leaves that the base lacks are no matter.
    """
    first, second = tree.flatten(base), tree.flatten(tuned, is_leaf=is_kernel)
    chosen = tree.match([(include, True)], first, what="include", default=False)
    missing = [path for path, wanted in chosen.items() if wanted and path not in second]
    if missing:
        raise UserError(f"the tuned tree has no leaf {missing[0]!r}")
    return {path: intruders(first[path], second[path], **options) for path, wanted in chosen.items() if wanted}
