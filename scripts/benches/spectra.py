"""Intruder counts at RoBERTa-base size against the published loop, and at Llama-7B size, on random weights."""

import contextlib
import os
import statistics
import tempfile
import time
from collections import defaultdict

import jax.numpy as jnp
import numpy as np

from ft_jax.analysis import certify, change, topk
from ft_jax.errors import UserError
from ft_jax.kernels import LowRank

K, EPS = 10, 0.5
# kind -> (d_in, d_out) in units of the width, and how many a layer has
ROBERTA = {"q, k, v, attn out": (1, 1, 4), "up": (1, 4, 1), "down": (4, 1, 1)}
# shape -> matrices a layer
LLAMA = {(4096, 4096): 4, (4096, 11008): 2, (11008, 4096): 1}
LLAMA_LAYERS = 32
PLANTED = (1.5, 1.3, 0.9)  # times σ1: new directions far above the bulk's edge, so the count is known


def weights(rng, shape):
    """Random W = G₁ diag(i^-0.2) G₂: σ10/σ1 ≈ 0.75, median/σ1 ≈ 0.17, as in MiniLM's attention matrices."""
    d_in, d_out = shape
    n = min(shape)
    scale = np.arange(1, n + 1, dtype=np.float32) ** -0.2
    w = (rng.standard_normal((d_in, n), np.float32) * scale) @ rng.standard_normal((n, d_out), np.float32)
    return w * np.float32(0.04 / w.std())


def low_rank(rng, shape, sizes):
    """``(A, B)`` of a change in random directions whose singular values are about ``sizes``."""
    d_in, d_out = shape
    a = rng.standard_normal((d_in, len(sizes)), np.float32) / np.float32(np.sqrt(d_in))
    b = rng.standard_normal((len(sizes), d_out), np.float32) / np.float32(np.sqrt(d_out))
    return a * np.asarray(sizes, np.float32), b


def dense_noise(rng, w, share):
    """A full-rank change with ‖ΔW‖ = share · ‖W‖."""
    return rng.standard_normal(w.shape, np.float32) * np.float32(share * np.linalg.norm(w) / np.sqrt(w.size))


@contextlib.contextmanager
def fresh_cache():
    """An empty cache of base vectors for the time of a benchmark."""
    before = os.environ.get("FT_JAX_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FT_JAX_CACHE"] = folder
        try:
            yield
        finally:
            del os.environ["FT_JAX_CACHE"]
            if before is not None:
                os.environ["FT_JAX_CACHE"] = before


def _model(layers, width):
    """``{kind: (base stack, {change: tuned stack or kernel})}``."""
    out, rng = {}, np.random.default_rng(0)
    for kind, (d_in, d_out, many) in ROBERTA.items():
        shape = (d_in * width, d_out * width)
        base = np.stack([weights(rng, shape) for _ in range(layers * many)])
        top = [np.sqrt(np.linalg.eigvalsh(w @ w.T if d_in < d_out else w.T @ w)[-1]) for w in base]
        a, b = (np.stack(x) for x in zip(*(low_rank(rng, shape, s * np.geomspace(1.4, 0.1, 8)) for s in top)))
        kernel = LowRank(jnp.asarray(base), jnp.asarray(a), jnp.asarray(b), jnp.ones(len(base)))
        noise = np.stack([w + dense_noise(rng, w, 0.02) for w in base])
        out[kind] = base, {"LoRA r8, merged": base + a @ b, "LoRA r8, as a kernel": kernel, "full, 2 % dense": noise}
    return out


def _ours(model, name):
    return {kind: topk.intruders(base, tuned[name], k=K, eps=EPS) for kind, (base, tuned) in model.items()}


def _published(torch, base, tuned):
    """Counts of one stack: economy SVD of both ``[out, in]`` weights, best |cosine| of each of the top k."""
    counts = []
    for w0, w in zip(base, tuned):
        u0, u = (torch.linalg.svd(x, full_matrices=False)[0] for x in (w0, w))
        counts.append(int(((u0.T @ u[:, :K]).abs().max(dim=0).values < EPS).sum()))
    return counts


def _seconds(fn):
    started = time.perf_counter()
    out = fn()
    return time.perf_counter() - started, out


def _torch():
    try:
        import torch
    except ImportError:
        return None, "torch is not installed, so there is no peer: pip install torch"
    return torch, "torch loop, full SVD of base and tuned"


def roberta(repeats=3, layers=12, width=768):
    """All matrices of RoBERTa-base: ours with the base's vectors cached, the published loop in torch in turn with it.

    Ours includes hashing the base and reading its vectors. Raises RuntimeError where a count differs from the peer's.
    """
    model, (torch, peer_name) = _model(layers, width), _torch()
    names = ("LoRA r8, merged", "full, 2 % dense", "LoRA r8, as a kernel")
    same_as = {"LoRA r8, as a kernel": "LoRA r8, merged"}  # one peer: it can only take the merged matrix
    ours, peer, counts = defaultdict(list), defaultdict(list), {}
    with fresh_cache():
        first, _ = _seconds(lambda: _ours(model, names[0]))
        for _ in range(repeats):
            for name in names:
                seconds, found = _seconds(lambda name=name: _ours(model, name))
                ours[name].append(seconds)
                if torch and name not in same_as:
                    seconds, counts[name] = _peer(torch, model, name)
                    peer[name].append(seconds)
                if torch:
                    _check(found, counts[same_as.get(name, name)], name)
    many = sum(len(base) for base, _ in model.values())
    for name in names:
        yield {"name": f"{many} matrices, k = {K}, {name}, base cached", "ours": ours[name],
               "peer": peer[same_as.get(name, name)], "peer_name": peer_name, "unit": "s"}  # fmt: skip
    yield {"name": f"{many} matrices, k = {K}, {names[0]}, nothing cached", "ours": [first], "peer": peer[names[0]],
           "peer_name": peer_name, "unit": "s"}  # fmt: skip


def _peer(torch, model, name):
    turned = {kind: [[torch.from_numpy(np.ascontiguousarray(w.T)) for w in stack] for stack in (base, tuned[name])]
              for kind, (base, tuned) in model.items()}  # fmt: skip
    return _seconds(lambda: {kind: _published(torch, *pair) for kind, pair in turned.items()})


def _check(found, counts, name):
    for kind, out in found.items():
        if out["intruders"].tolist() != counts[kind]:
            raise RuntimeError(f"{name}, {kind}: {out['intruders'].tolist()} intruders, the peer counts {counts[kind]}")


def llama(layers=LLAMA_LAYERS, shapes=None):
    """Certified counts and norms of ΔW over Llama-7B's matrices, made one at a time from a seed; no base vectors kept.

    Gaussian weights: the hardest case, as neighbouring singular values differ by a few thousandths only. In turn a
    matrix gets a low-rank change with three directions that are new for certain, one of rank 8 that is too weak for
    that, or dense noise. Seconds a matrix by shape and in all; no peer: the full loop takes hours. Raises RuntimeError
    where a count is not the planted one.
    """
    shapes = shapes or LLAMA
    if layers > LLAMA_LAYERS:
        raise UserError(f"--layers={layers}: there are {LLAMA_LAYERS}")
    ours, making, fell, number = defaultdict(list), 0.0, 0, 0
    with fresh_cache():
        for _ in range(layers):
            for shape, many in shapes.items():
                for _ in range(many):
                    seconds, (base, tuned, planted) = _seconds(lambda shape=shape, number=number: _pair(shape, number))
                    making, number = making + seconds, number + 1
                    seconds, out = _seconds(lambda base=base, tuned=tuned: _report(base, tuned))
                    if out["intruders"] != planted:
                        raise RuntimeError(f"matrix {number}, {shape}: {out['intruders']} intruders, planted {planted}")
                    ours[shape].append(seconds)
                    fell += out["fell_back"]
    yield from _llama_rows(ours, making, layers, shapes, fell)


def _llama_rows(ours, making, layers, shapes, fell):
    none = {"peer": [], "peer_name": "none", "unit": "s"}
    for shape, seconds in ours.items():
        yield none | {"name": f"one {shape[0]}x{shape[1]}, k = {K}, median", "ours": seconds}
    done = sum(len(x) for x in ours.values())
    total = sum(sum(x) for x in ours.values())
    yield none | {"name": f"{done} matrices of {layers} layers, {fell} directions fell back", "ours": [total]}
    yield none | {"name": f"making the weights of {layers} layers", "ours": [making]}
    if layers < LLAMA_LAYERS:
        each = sum(LLAMA_LAYERS * many * statistics.mean(ours[shape]) for shape, many in shapes.items())
        yield none | {"name": f"extrapolated to {LLAMA_LAYERS} layers, weights made included",
                      "ours": [each + making * LLAMA_LAYERS / layers]}  # fmt: skip


def _pair(shape, number):
    rng = np.random.default_rng(number)
    base = rng.standard_normal(shape, np.float32) * np.float32(0.02)
    edge = 0.02 * (np.sqrt(shape[0]) + np.sqrt(shape[1]))
    kind = number % 3
    if kind == 2:
        return base, base + dense_noise(rng, base, 0.02), 0
    a, b = low_rank(rng, shape, edge * np.array((*PLANTED, 0.1, 0.1) if kind == 0 else (0.1,) * 8))
    tuned = a @ b
    tuned += base
    return base, tuned, len(PLANTED) if kind == 0 else 0


def _report(base, tuned):
    return certify.intruders(base, tuned, k=K, eps=EPS) | change.change(base, tuned)
