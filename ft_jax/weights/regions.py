"""What a graft's region is: unions and overlaps of several, where one sits, what of a change lies in a subspace.

A region is a graft's mask, ``{path: bool array}`` (arXiv:2302.06600). Einsum letters: l layer, i input, o output,
m direction of the input space, n direction of the output space.
"""

import numpy as np

from ft_jax import tree
from ft_jax.errors import UserError
from ft_jax.weights import graft

STACKS = ("layers/", "frozen_layers/")
HEAD_AXES = {"attn/q/kernel": 1, "attn/k/kernel": 1, "attn/v/kernel": 1, "attn/out/kernel": 0}  # of [d_in, d_out]


def same_leaves(first, second):
    """UserError unless both are regions of one model."""
    odd = [p for p in {**first, **second} if np.shape(first.get(p)) != np.shape(second.get(p))]
    if odd:
        raise UserError(f"two masks of one model are needed: they differ at {odd[0]!r}")


def union(masks):
    """∪γ_i of a list of masks over the same leaves."""
    first, *rest = masks
    out = {p: np.array(m, bool) for p, m in first.items()}
    for mask in rest:
        same_leaves(out, mask)
        for path, m in mask.items():
            out[path] |= np.asarray(m, bool)
    return out


def complement(mask):
    """Every eligible parameter outside the region."""
    return {p: ~np.asarray(m, bool) for p, m in mask.items()}


def overlap_matrix(masks):
    """``[n, n]`` of |γ_i ∩ γ_j| / |γ_j| (arXiv:2302.06600): row i, column j; 1 on the diagonal of masks that hold any."""
    masks = list(masks)
    return np.array([[graft.overlap(a, b) for b in masks] for a in masks])


def chance_overlap(masks):
    """``[n, n]``: the overlap that random masks of the same sizes have on average, |γ_i| / N."""
    masks = list(masks)
    return np.array([[graft.mask_size(a)[1]] * len(masks) for a in masks])


def by_layer_and_kind(mask):
    """Rows ``{kind, leaf, layer, parameters, eligible}``: kind is the module (``attn/q``), leaf its last name (``bias``)."""
    rows = []
    for path, m in mask.items():
        stacked = path.startswith(STACKS)
        kind, leaf = path.split("/", 1)[1].rsplit("/", 1) if stacked else path.rsplit("/", 1)
        for layer, part in enumerate(m) if stacked else [(None, m)]:
            rows.append({"kind": kind, "leaf": leaf, "layer": layer, "parameters": int(part.sum()), "eligible": int(part.size)})
    return rows


def by_head(mask, head_dim):
    """Rows ``{kind, layer, head, parameters, eligible}`` of the attention matrices, cut into heads of ``head_dim``.

    Columns of the query, key and value matrices and rows of the output matrix belong to a head; with grouped queries
    keys and values have fewer. Raises UserError where ``head_dim`` does not divide a matrix.
    """
    rows = []
    for path, m in mask.items():
        kind = path.split("/", 1)[1] if path.startswith(STACKS) else ""
        if kind not in HEAD_AXES:
            continue
        wide = np.moveaxis(np.asarray(m), 1 + HEAD_AXES[kind], 1)  # [layers, heads · head_dim, other side]
        if wide.shape[1] % head_dim:
            raise UserError(f"{path}: {wide.shape[1]} is not a multiple of the head size {head_dim}")
        counts = wide.reshape(len(wide), -1, head_dim * wide.shape[2])
        rows += [{"kind": kind.removesuffix("/kernel"), "layer": layer, "head": head, "parameters": int(part.sum()),
                  "eligible": int(part.size)} for layer, heads in enumerate(counts) for head, part in enumerate(heads)]  # fmt: skip
    return rows


def enrichment(rows, key):
    """``{value of key: (parameters / eligible) / (all parameters / all eligible)}``: 1 is what a random region has."""
    chosen, total = (sum(r[name] for r in rows) for name in ("parameters", "eligible"))
    out = {}
    for row in rows:
        held = out.setdefault(row[key], [0, 0])
        held[0] += row["parameters"]
        held[1] += row["eligible"]
    return {value: (a / n) / (chosen / total) if chosen else None for value, (a, n) in out.items()}


def top_entries(change, count):
    """Mask of the ``count`` entries of ``{path: array}`` that are largest in size, over all leaves at once."""
    size = np.concatenate([np.abs(c).reshape(-1) for c in change.values()])
    if not 0 <= count <= size.size:
        raise UserError(f"cannot take {count} of {size.size} entries")
    flat = np.zeros(size.size, bool)
    if count:
        flat[np.argpartition(size, size.size - count)[size.size - count :]] = True
    cuts = np.cumsum([c.size for c in change.values()])[:-1]
    return {p: part.reshape(c.shape) for (p, c), part in zip(change.items(), np.split(flat, cuts), strict=True)}


def project(change, inner, outer):
    """P_V Δ P_U, the part of Δ ``[d_in, d_out]`` inside spans of orthonormal columns ``inner [d_in, m]``, ``outer [d_out, n]``.

    ``inner`` None is the whole input space: Δ P_U, the part that writes into ``outer``. No column gives zeros.
    """
    change, outer = np.asarray(change, np.float64), np.asarray(outer, np.float64)
    into = np.einsum("io,on,pn->ip", change, outer, outer, optimize=True)
    if inner is None:
        return into
    inner = np.asarray(inner, np.float64)
    return np.einsum("im,jm,jo->io", inner, inner, into, optimize=True)


def energy_share(change, inner, outer):
    """‖P_V Δ P_U‖² and ‖Δ‖² (float64) of one matrix: their ratio is the share of the change inside the subspace.

    Shares of several matrices are ratios of sums. ``inner`` None is the whole input space. ‖P_V Δ P_U‖ = ‖Vᵀ Δ U‖.
    """
    change = np.asarray(change, np.float64)
    held = change @ np.asarray(outer, np.float64)
    if inner is not None:
        held = np.asarray(inner, np.float64).T @ held
    return float((held**2).sum()), float((change**2).sum())


def restricted(delta, mask):
    """γ ⊙ Δ of ``{path: array}`` over the leaves that ``mask`` names."""
    missing = [p for p in mask if p not in delta]
    if missing:
        raise UserError(f"the change has no leaf {missing[0]!r}")
    return {p: np.where(m, np.asarray(delta[p]), 0) for p, m in mask.items()}


def change_of(base, tuned, paths=None):
    """Δθ ``{path: float32 array}`` between two trees of plain arrays, of all leaves or of ``paths``."""
    first, second = tree.flatten(base), tree.flatten(tuned)
    return {p: np.asarray(second[p], np.float32) - np.asarray(first[p], np.float32) for p in paths or first}
