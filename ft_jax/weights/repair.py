"""Intruder repair: scales the singular directions that fine-tuning brought in (arXiv:2410.21228, "Intervention").

W' = W + (λ − 1) Σ σ_j v_j u_jᵀ over the chosen directions of W = W0 + ΔW, ``[..., d_in, d_out]``: u_j lies on the output
side (torch's left vectors, by which intruders are told), v_j on the input side. ``find`` factorises, once; ``apply`` is
cheap for any λ. Einsum letters: n direction, i input, o output.
"""

import math

import jax.numpy as jnp
import numpy as np

from ft_jax import tree
from ft_jax.analysis import spectral
from ft_jax.errors import UserError, nearest
from ft_jax.kernels import LowRank, dense, is_kernel
from ft_jax.registry import register

INCLUDE = r".*layers/.*/kernel"
# What is scaled: the intruder; the pretrained direction beside it; all of ΔW, by a change of the intruder's norm.
CONTROLS = ("none", "neighbour", "shrink")
WHICH = ("top", "all")  # the paper's single top-ranked intruder; every intruder among the top k, as PEFT does
_CHUNK = 1 << 20  # numbers of a matrix that are doubled in precision at one time


def _directions(w, k):
    """``(σ [k], u [k, d_out], v [k, d_in])`` of one matrix, float64: the one place where vectors come from."""
    sigma, left = spectral.top_left(w, k)
    image = np.concatenate([rows.astype(np.float64) @ left for rows in np.array_split(w, 1 + w.size // _CHUNK)])
    return sigma, left.T, (image / np.maximum(sigma, np.finfo(np.float64).tiny)).T


def _beside(intruder):
    """Rank of the pretrained direction nearest to the top intruder's: of two, the one ranked below; −1 if none."""
    top = int(intruder.argmax())
    others = np.flatnonzero(~intruder)
    return int(min(others, key=lambda i: (abs(i - top), -i))) if intruder.any() and others.size else -1


def of_matrices(base, tuned, *, k=10, eps=0.5, cosine=None):
    """The intruders of matrices ``[..., d_in, d_out]`` and the direction beside the top one.

    cosine: ``max_cosine [..., k]`` of the same pair, where it is known already: the base is then not factorised.
    Returns ``intruder [..., k]`` bool; ``rank [...]`` int32 of the top intruder among the top k, −1 without one;
    ``neighbour [...]`` int32, the non-intruder nearest in rank (of two, the one just below), −1 without one;
    ``sigma [..., k]``, ``u [..., k, d_out]``, ``v [..., k, d_in]`` float32 of the tuned matrix, zero where it has no
    intruder; ``max_cosine [..., k]``; ``delta_norm [...]`` = ‖ΔW‖_F; ``base``, the matrix given.
    UserError for shapes that differ, NaN, and k or ε out of range.
    """
    if k < 1 or not 0 < eps <= 1:
        raise UserError(f"k = {k} and ε = {eps}: at least one direction, and a cosine threshold in (0, 1]")
    given, base, tuned = base, np.asarray(base, np.float32), np.asarray(tuned, np.float32)
    if cosine is None:
        cosine = spectral.intruder_dimensions(base, tuned, k=k)["max_cosine"]
    cosine = np.asarray(cosine, np.float32)
    *lead, d_in, d_out = tuned.shape
    count, k = math.prod(lead), cosine.shape[-1]
    intruder = (cosine < eps).reshape(count, k)
    out = {"sigma": np.zeros((count, k), np.float32), "u": np.zeros((count, k, d_out), np.float32),
           "v": np.zeros((count, k, d_in), np.float32), "delta_norm": np.zeros(count, np.float32)}  # fmt: skip
    pairs = zip(base.reshape(count, d_in, d_out), tuned.reshape(count, d_in, d_out))
    for i, (w0, w) in enumerate(pairs):
        out["delta_norm"][i] = np.sqrt(np.square(w - w0, dtype=np.float64).sum())
        if intruder[i].any():
            out["sigma"][i], out["u"][i], out["v"][i] = _directions(w, k)
    out["intruder"] = intruder
    out["rank"] = np.where(intruder.any(-1), intruder.argmax(-1), -1).astype(np.int32)
    out["neighbour"] = np.array([_beside(row) for row in intruder], np.int32)
    shaped = {name: x.reshape((*lead, *x.shape[1:])) for name, x in out.items()}
    return {**shaped, "max_cosine": cosine, "base": given}


def find(base, tuned, *, k=10, eps=0.5, include=INCLUDE):
    """``{path: of_matrices(base leaf, tuned leaf)}`` for every leaf whose path fully matches ``include``.

    ``base`` holds arrays; leaves of ``tuned`` may be kernels, taken as the matrix they stand for. UserError names the
    path whose shapes differ or that holds NaN, and a pattern that matches nothing.
    """
    first, second = (tree.flatten(t, is_leaf=is_kernel) for t in (base, tuned))
    chosen = tree.match([(include, True)], first, what="include", default=False)
    found = {}
    for path in (p for p, wanted in chosen.items() if wanted):
        if path not in second:
            raise UserError(f"the tuned tree has no leaf {path!r}{nearest(path, second)}")
        try:
            found[path] = of_matrices(dense(first[path]), dense(second[path]), k=k, eps=eps)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    return found


def check(factor, control, which):
    if not (math.isfinite(factor) and factor >= 0):
        raise UserError(f"factor {factor} cannot scale a singular value; it is 0 (removed) or more, 1 leaves all as it is")
    for name, value, known in (("control", control, CONTROLS), ("which", which, WHICH)):
        if value not in known:
            raise UserError(f"{name} {value!r} is not known{nearest(value, known)}")
    if control == "neighbour" and which == "all":
        raise UserError("control 'neighbour' belongs to which 'top': one pretrained direction beside one intruder")


def _chosen(found, control, which):
    """bool [..., k]: the directions that are scaled, or whose norm a shrink copies."""
    if which == "all":
        return found["intruder"]
    index = found["neighbour" if control == "neighbour" else "rank"]
    return np.arange(found["sigma"].shape[-1]) == index[..., None]  # −1 is nobody's index


def changes(found, factor=0.7, *, control="none", which="top"):
    """What `apply` does, a row for each matrix that has an intruder.

    Rows ``{path, index (on the leading axes), rank, sigma, neighbour, neighbour_sigma, delta_norm, change, shrink}``:
    ``change`` = ‖W' − W‖_F; ``shrink`` (that control alone) the factor of ΔW, 1 + (λ − 1)‖σ‖/‖ΔW‖ and never under 0,
    where the change falls short of the intruder's because ΔW is gone; ``neighbour`` None where all k are intruders.
    """
    check(factor, control, which)
    rows = []
    for path, one in found.items():
        size = abs(1 - factor) * np.sqrt(np.where(_chosen(one, control, which), one["sigma"] ** 2, 0).sum(-1))
        shrink = _shrinks(one, factor, which) if control == "shrink" else None
        for index in np.ndindex(one["rank"].shape):
            if one["rank"][index] < 0:
                continue
            rank, beside = int(one["rank"][index]), int(one["neighbour"][index])
            norm = float(one["delta_norm"][index])
            rows.append({
                "path": path, "index": list(index), "rank": rank, "sigma": float(one["sigma"][index][rank]),
                "neighbour": beside if beside >= 0 else None,
                "neighbour_sigma": float(one["sigma"][index][beside]) if beside >= 0 else None, "delta_norm": norm,
                "change": float(size[index]) if shrink is None else abs(1 - float(shrink[index])) * norm,
                **({} if shrink is None else {"shrink": float(shrink[index])}),
            })  # fmt: skip
    return rows


def _shrinks(found, factor, which):
    """[...]: the factor of ΔW whose change has the norm of the intruders' own; 1 where there is none."""
    size = np.sqrt(np.where(_chosen(found, "shrink", which), found["sigma"] ** 2, 0).sum(-1))
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(size > 0, size / found["delta_norm"], 0)
    return np.maximum(1 + (factor - 1) * share, 0)


def project(a, b, scale, left, right):
    """The best approximation of ``scale · A B + leftᵀ right`` of A's rank, without forming a full matrix.

    A ``[d_in, r]``, B ``[r, d_out]``, left ``[n, d_in]``, right ``[n, d_out]``: QR of [scale·A, leftᵀ] and of [B; right]ᵀ,
    SVD of the (r + n)-sized core, cut at r (Eckart–Young). Columns of A and rows of B that are both zero are padding and
    stay so. Returns ``(A', B', share of the norm that was lost)`` with the same scale, float32; A' and B' share √σ.
    """
    used = np.flatnonzero(a.any(0) | b.any(1))
    first = np.concatenate([scale * a[:, used], left.T], axis=1, dtype=np.float64)
    second = np.concatenate([b[used], right], dtype=np.float64).T
    (q1, r1), (q2, r2) = np.linalg.qr(first), np.linalg.qr(second)
    u, s, vt = np.linalg.svd(r1 @ r2.T, full_matrices=False)
    keep, total = min(len(used), len(s)), np.linalg.norm(s)
    root = np.sqrt(s[:keep] / abs(scale))
    new_a, new_b = np.zeros(a.shape, np.float32), np.zeros(b.shape, np.float32)
    new_a[:, used[:keep]] = np.sign(scale) * (q1 @ u[:, :keep]) * root
    new_b[used[:keep]] = root[:, None] * (vt[:keep] @ q2.T)
    return new_a, new_b, float(np.linalg.norm(s[keep:]) / total) if total else 0.0


def _mend_dense(leaf, found, factor, control, which):
    shape = leaf.shape
    out = np.array(leaf, np.float32).reshape(-1, *shape[-2:])
    if control == "shrink":
        base = np.asarray(found["base"], np.float32).reshape(out.shape)
        shrinks = _shrinks(found, factor, which).reshape(-1)
        for i in np.flatnonzero(shrinks != 1):
            out[i] = base[i] + np.float32(shrinks[i]) * (out[i] - base[i])
    else:
        for i, left, right in _updates(found, factor, control, which):
            out[i] += np.einsum("ni,no->io", left, right)
    out = out.reshape(shape)
    return (out if isinstance(leaf, np.ndarray) else jnp.asarray(out)), np.zeros(shape[:-2], np.float32)


def _updates(found, factor, control, which):
    """``(index in the flattened batch, left [n, d_in], right [n, d_out])`` of every matrix that changes."""
    flat = {name: found[name].reshape(-1, *found[name].shape[found["rank"].ndim :]) for name in ("sigma", "u", "v")}
    chosen = _chosen(found, control, which).reshape(flat["sigma"].shape)
    for i in np.flatnonzero(chosen.any(-1)):
        weight = np.float32(factor - 1) * flat["sigma"][i][chosen[i]]
        yield int(i), weight[:, None] * flat["v"][i][chosen[i]], flat["u"][i][chosen[i]]


def _mend_low_rank(path, leaf, found, factor, control, which):
    """The same for W + scale · A B: A and B change, their rank does not."""
    lead = leaf.shape[:-2]
    a, b = (np.array(x, np.float32).reshape(-1, *x.shape[-2:]) for x in (leaf.a, leaf.b))
    scale, lost = np.asarray(leaf.scale, np.float32).reshape(-1), np.zeros(len(a), np.float32)
    if control == "shrink":
        if not np.array_equal(dense(leaf.base), found["base"]):
            raise UserError(f"{path}: the frozen matrix under the adapter is not the base's, so A B is not ΔW; merge it first")
        b *= _shrinks(found, factor, which).reshape(-1, 1, 1).astype(np.float32)
    else:
        for i, left, right in _updates(found, factor, control, which):
            a[i], b[i], lost[i] = project(a[i], b[i], scale[i], left, right)
    mended = leaf.replace(a=jnp.asarray(a.reshape(leaf.a.shape)), b=jnp.asarray(b.reshape(leaf.b.shape)))
    return mended, lost.reshape(lead)


def mend(tuned, found, factor=0.7, *, control="none", which="top"):
    """``(mended tree, {path: share of ‖ΔW'‖ lost [...]})``; `apply` with what the rank cost.

    Arrays are mended exactly (share 0). A LoRA kernel keeps its rank: ΔW' has up to rank r + 1, and the best
    approximation of rank r is taken from the factors (`project`). Leaves and layers without an intruder stay as they
    are, bit for bit, and so does everything at λ = 1. UserError for other kernels, and for options that are not known.
    """
    check(factor, control, which)
    flat, lost = tree.flatten(tuned, is_leaf=is_kernel), {}
    for path, one in found.items():
        leaf = flat.get(path)
        if leaf is None or tuple(leaf.shape) != np.shape(one["base"]):
            raise UserError(f"{path}: intruders were found in another tree{nearest(path, flat)}")
        if factor == 1 or not (one["rank"] >= 0).any():
            lost[path] = np.zeros(leaf.shape[:-2], np.float32)
        elif isinstance(leaf, LowRank):
            flat[path], lost[path] = _mend_low_rank(path, leaf, one, factor, control, which)
        elif is_kernel(leaf):
            raise UserError(f"{path}: a {type(leaf).__name__} kernel has no form to write the repair into; merge it first")
        else:
            flat[path], lost[path] = _mend_dense(leaf, one, factor, control, which)
    return tree.nest(flat), lost


def apply(tuned, found, factor=0.7, control="none", which="top"):
    """The tuned tree with its intruders (or the ``control``) scaled by ``factor``; ``found`` comes from `find`."""
    return mend(tuned, found, factor, control=control, which=which)[0]


@register("edit", "scale_intruders", paper="arXiv:2410.21228")
def scale_intruders(params, requests, *, factor=0.7, k=10, eps=0.5, which="top", control="none", include=INCLUDE):
    """Intruder repair of the tuned tree ``requests``: W + (λ − 1) σ u vᵀ of each matrix's top-ranked intruder, λ = ``factor``.

    ``params`` is the base. ``which``: top, or all intruders among the top k. ``control`` scales in its place: neighbour,
    the pretrained direction beside it, by the same factor; shrink, ΔW as a whole, by a change of the same norm.
    LoRA kernels of ``requests`` keep their rank.
    """
    check(factor, control, which)
    return apply(requests, find(params, requests, k=k, eps=eps, include=include), factor, control, which)
