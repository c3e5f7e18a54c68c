"""Skill localisation: the few parameters that hold what fine-tuning taught (arXiv:2302.06600).

θ(γ) = θ_pre + γ ⊙ (θ_ft − θ_pre). A mask is ``{path: bool array}`` over the eligible leaves of a tree of plain
arrays; leaves that it does not name keep the base's value.
"""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes
from tqdm.auto import tqdm

from ft_jax import tree
from ft_jax.errors import UserError
from ft_jax.io import files
from ft_jax.registry import register

ELIGIBLE = ((r"(frozen_)?layers/.*", True),)  # weights, biases and norms of the layers; head and embeddings stay
OFFSET = 10.0  # c of γ = b + (1 − 2b) σ(S − c): the soft mask starts at the hard one, up to σ(−10) ≈ 5e-5


def eligible_paths(params, rules=ELIGIBLE):
    """Paths of the leaves that a graft may touch, by ordered regex rules; UserError if there are none."""
    flat = tree.flatten(params)
    used = [r for r in rules if r not in ELIGIBLE or any(p.startswith(("layers/", "frozen_layers/")) for p in flat)]
    chosen = tree.match(used, flat, what="eligible rule", default=False)
    paths = [path for path, wanted in chosen.items() if wanted]
    if not paths:
        raise UserError(f"no leaf is eligible for a graft by the rules {list(rules)}")
    return paths


def _deltas(base, tuned, rules):
    first, second = tree.flatten(base), tree.flatten(tuned)
    if {p: x.shape for p, x in first.items()} != {p: x.shape for p, x in second.items()}:
        odd = sorted(set(first) ^ set(second)) or [p for p in first if first[p].shape != second[p].shape]
        raise UserError(f"base and tuned trees differ at {odd[0]!r}; merge kernels before grafting")
    paths = eligible_paths(base, rules)
    return {p: np.asarray(second[p], np.float32) - np.asarray(first[p], np.float32) for p in paths}


def _count(total, sparsity):
    if not 0 <= sparsity <= 1:
        raise UserError(f"sparsity {sparsity} is not a share between 0 and 1")
    return round(sparsity * total)


def _cut(flat, shapes):
    """One flat vector back into ``{path: array}``."""
    sizes = np.cumsum([int(np.prod(s)) for s in shapes.values()])[:-1]
    return {p: part.reshape(s) for (p, s), part in zip(shapes.items(), np.split(flat, sizes), strict=True)}


def magnitude_mask(base, tuned, sparsity, eligible=ELIGIBLE):
    """The round(sparsity · N) eligible parameters with the largest |θ_ft − θ_pre|, over all leaves at once."""
    deltas = _deltas(base, tuned, eligible)
    size = np.concatenate([np.abs(d).reshape(-1) for d in deltas.values()])
    k = _count(size.size, sparsity)
    flat = np.zeros(size.size, bool)
    if k:
        flat[np.argpartition(size, size.size - k)[size.size - k :]] = True
    return _cut(flat, {p: d.shape for p, d in deltas.items()})


def random_mask(params, sparsity, rng, eligible=ELIGIBLE):
    """round(sparsity · N) eligible parameters drawn uniformly; ``rng`` is a ``numpy.random.Generator``."""
    flat = tree.flatten(params)
    shapes = {p: flat[p].shape for p in eligible_paths(params, eligible)}
    total = sum(int(np.prod(s)) for s in shapes.values())
    mask = np.zeros(total, bool)
    mask[rng.choice(total, _count(total, sparsity), replace=False)] = True
    return _cut(mask, shapes)


def bias_mask(params, eligible=ELIGIBLE):
    """The BitFit region (arXiv:2106.10199): every eligible bias; UserError for a model that has none."""
    flat = tree.flatten(params)
    mask = {p: np.full(flat[p].shape, p.endswith("/bias")) for p in eligible_paths(params, eligible)}
    if not any(m.any() for m in mask.values()):
        raise UserError("the model has no bias among the eligible leaves: there is no BitFit region")
    return mask


def mask_size(mask):
    """(number of grafted parameters, their share of the eligible ones)."""
    chosen, total = sum(int(m.sum()) for m in mask.values()), sum(m.size for m in mask.values())
    return chosen, chosen / max(total, 1)


def mask_shares(mask):
    """Where the mask lies: rows ``{path, layer (None if not stacked), parameters, share}``."""
    rows = []
    for path, m in mask.items():
        stacked = path.startswith(("layers/", "frozen_layers/"))
        for layer, part in enumerate(m) if stacked else [(None, m)]:
            rows.append({"path": path, "layer": layer, "parameters": int(part.sum()), "share": float(part.mean())})
    return rows


def overlap(first, second):
    """|γ_i ∩ γ_j| / |γ_j| of two masks over the same leaves; 0 when the second is empty."""
    odd = [p for p in {**first, **second} if np.shape(first.get(p)) != np.shape(second.get(p))]
    if odd:
        raise UserError(f"two masks of one model are needed: they differ at {odd[0]!r}")
    return sum(int((m & second[p]).sum()) for p, m in first.items()) / max(mask_size(second)[0], 1)


@jax.jit
def _mix(base, tuned, mask):
    return {p: jnp.where(m, tuned[p], base[p]) for p, m in mask.items()}


def apply_graft(base, tuned, mask):
    """The base tree with the masked parameters of the tuned one."""
    first, second = tree.flatten(base), tree.flatten(tuned)
    return tree.nest({**first, **_mix({p: first[p] for p in mask}, {p: second[p] for p in mask}, mask)})


@jax.jit
def _keep(tuned, mask):
    return {p: jnp.where(m, tuned[p], 0) for p, m in mask.items()}


def lottery_ticket(tuned, mask):
    """θ_ft ⊙ γ: the tuned tree with zeros outside the mask, where a graft has the base (arXiv:1803.03635)."""
    flat = tree.flatten(tuned)
    return tree.nest({**flat, **_keep({p: flat[p] for p in mask}, mask)})


@register("edit", "graft", paper="arXiv:2302.06600")
def graft(params, requests, *, sparsity=0.01, eligible=ELIGIBLE):
    """Magnitude graft: puts the share ``sparsity`` of largest changes of the tuned tree ``requests`` on the base."""
    return apply_graft(params, requests, magnitude_mask(params, requests, sparsity, eligible))


def _soft(state, pre, delta, hard):
    """Base + γ ⊙ Δ at γ = b + (1 − 2b) σ(S − c)."""

    def mixed(s, b, w, d):
        sigma = jax.nn.sigmoid(s - OFFSET)
        return w + jnp.where(b, 1 - sigma, sigma) * d

    return jax.tree.map(mixed, state, hard, pre, delta)


@functools.partial(jax.jit, static_argnames="loss")
def _gradient(state, pre, delta, hard, rest, batch, *, loss):
    """(mean loss, its gradient by S, whether both are finite) over the micro-batches; compiled once for a ``loss``."""

    def soft_loss(state, micro):
        return loss(tree.nest({**rest, **_soft(state, pre, delta, hard)}), micro)

    def one(total, micro):
        return jax.tree.map(jnp.add, total, jax.value_and_grad(soft_loss)(state, micro)), None

    count = jax.tree.leaves(batch)[0].shape[0]
    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state))
    (value, grads), _ = jax.lax.scan(one, zero, batch)
    finite = jnp.stack([jnp.isfinite(x).all() for x in (value, *jax.tree.leaves(grads))]).all()
    return value / count, jax.tree.map(lambda g: g / count, grads), finite


@functools.partial(jax.jit, donate_argnums=0)
def _descend(state, grads, rate):
    return jax.tree.map(lambda s, g: s - rate * g, state, grads)


def _flipping_rate(state, grads, hard, flips):
    """The learning rate at which one step brings ``flips`` parameters into the mask (fewer where fewer would help)."""
    needed = []
    for path, s in state.items():
        slope = np.asarray(grads[path])
        enters = (slope < 0) & ~np.asarray(hard[path])
        needed.append((OFFSET - np.asarray(s)[enters]) / -slope[enters])
    needed = np.concatenate(needed)
    if not needed.size:
        raise UserError("no parameter outside the mask lowers the loss: the tuned model is no better than the mask")
    nth = min(max(flips, 1), needed.size) - 1
    return float(np.partition(needed, nth)[nth])


def learn_mask(base, tuned, loss, batches, score, *, sparsity, steps=10, learning_rate=1e7, flips=None, seed=0,
               eligible=ELIGIBLE, label="graft"):  # fmt: skip
    """Learns the graft from the magnitude mask b: γ = b + (1 − 2b) σ(S − 10), S ~ U[0,1], plain gradient steps on S.

    A step is S ← S − lr · (1 − 2b) · mean(∂L/∂θ ⊙ Δθ) · σ(1 − σ), the gradient taken at the soft mask. S has to
    travel about 10 for a parameter to change sides: where ∂L/∂θ ⊙ Δθ is smaller than after the paper's SGD runs, the
    paper's learning rate of 1e7 leaves the magnitude mask as it is (``history`` shows it) and a larger one is needed.
    With ``flips`` the rate is not given but found: the one at which the first step adds flips · k parameters to the
    mask of k, which makes runs of different optimisers comparable.

    Args:
      loss: ``(params, micro_batch) -> mean loss``, in evaluation mode; the same function object is compiled once.
      batches: iterator of batches with leading axes [micro-batches, micro-batch size]; one batch a step.
      score: ``params -> float``, higher is better, of a tree with the rounded mask.
    Returns:
      (best mask by ``score``, history): the magnitude mask itself is the first candidate; history has a row
      ``{step, loss, score, parameters, learning_rate}`` for each.
    Raises:
      UserError when the loss or its gradient is not finite.
    """
    start = magnitude_mask(base, tuned, sparsity, eligible)
    first, second = tree.flatten(base), tree.flatten(tuned)
    pre = {p: jnp.asarray(first[p]) for p in start}
    delta = {p: jnp.asarray(second[p]) - pre[p] for p in start}
    hard = {p: jnp.asarray(m) for p, m in start.items()}
    rest = {p: x for p, x in first.items() if p not in start}
    keys = jax.random.split(jax.random.key(seed), len(start))
    # On the base's devices from the first step on, else the second step compiles again.
    state = {p: jax.device_put(jax.random.uniform(k, pre[p].shape), pre[p].sharding) for p, k in zip(start, keys)}
    rate = None if flips else learning_rate
    best, best_score = start, float(score(apply_graft(base, tuned, start)))
    history = [{"step": 0, "loss": None, "score": best_score, "parameters": mask_size(start)[0], "learning_rate": rate}]
    for i in tqdm(range(1, steps + 1), desc=f"{label} {sparsity:g}", unit="step"):
        value, grads, finite = _gradient(state, pre, delta, hard, rest, next(batches), loss=loss)
        if not finite:
            raise UserError(f"the graft's loss is {float(value)} at step {i} and its gradient not finite: "
                            "check the two models and the batches")
        if rate is None:
            rate = _flipping_rate(state, grads, hard, round(flips * mask_size(start)[0]))
        state = _descend(state, grads, rate)
        mask = {p: np.asarray(hard[p] ^ (s >= OFFSET)) for p, s in state.items()}
        found = float(score(apply_graft(base, tuned, mask)))
        history.append({"step": i, "loss": float(value), "score": found, "parameters": mask_size(mask)[0],
                        "learning_rate": rate})  # fmt: skip
        if found > best_score:
            best, best_score = mask, found
    return best, history


def save_mask(path, mask, metadata=None):
    """Writes a mask as packed bits with its shapes to a safetensors file, whole or not at all."""
    shapes = json.dumps({p: list(m.shape) for p, m in mask.items()})
    files.write(path, to_bytes({p: np.packbits(m) for p, m in mask.items()}, {"shapes": shapes, **(metadata or {})}))


def _unpacked(packed, shape):
    """The mask of a shape; ValueError unless it takes as many bytes as there are, so that none asks for memory in vain."""
    if min(shape, default=0) < 0 or packed.shape != (-(-math.prod(shape) // 8),):
        raise ValueError(f"{list(packed.shape)} bytes are no mask of {shape}")
    return np.unpackbits(packed, count=math.prod(shape)).reshape(shape).astype(bool)


def load_mask(path):
    """Inverse of ``save_mask``; UserError for a file that is not a mask."""
    try:
        with safe_open(path, "np") as file:
            shapes = json.loads((file.metadata() or {})["shapes"])
            return {p: _unpacked(file.get_tensor(p), s) for p, s in shapes.items()}
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a graft mask ({error})") from None
