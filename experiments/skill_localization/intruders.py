"""Does the region of a graft lie in the intruder dimensions of the same run? Shares of energy, both ways, and what each holds.

Of each linear layer W (Flax, ``[d_in, d_out]``) the top k singular triples (σ, v, u) of the tuned weights are taken: u is
the left vector of torch's convention, whose largest cosine with the base's left vectors decides (arXiv:2410.21228).
"""

import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from experiments.skill_localization import world
from ft_jax import tree
from ft_jax.analysis import spectral
from ft_jax.weights import graft, regions

K, EPS = 10, 0.5
SETS = ("intruders", "newest", "neighbours", "control")


def directions(base, tuned):
    """Per matrix ``(path, layer) -> {set: [indices]}`` with ``u [d_out, k]`` and ``v [d_in, k]``.

    intruders: cosine under ε. newest: the one of lowest cosine, in every matrix. neighbours: as many non-intruders of the top k as
    there are intruders, the strongest first. control: the non-intruder that is strongest, in every matrix.
    """
    first, second = tree.flatten(base), tree.flatten(tuned)
    out = {}
    for path in tqdm([p for p in first if p.startswith("layers/") and p.endswith("/kernel")], desc="directions", unit="stack", leave=False):
        cosine = spectral.intruder_dimensions(first[path], second[path], k=K, eps=EPS)["max_cosine"]
        for layer, w in enumerate(np.asarray(second[path], np.float32)):
            sigma, u = spectral.top_left(w, K)
            v = w @ u / np.maximum(sigma, np.finfo(np.float32).tiny)
            low = cosine[layer] < EPS
            rest = np.flatnonzero(~low)
            newest = int(np.argmin(cosine[layer]))
            sets = {"intruders": np.flatnonzero(low), "newest": np.array([newest]), "neighbours": rest[: low.sum()],
                    "control": rest[rest != newest][:1]}  # fmt: skip
            out[path, layer] = {"u": u, "v": v, "cosine": cosine[layer], "sets": sets}
    return out


def component(change, found, name, sides):
    """The part of Δ ``{path: [layers, d_in, d_out]}`` in a set's span: P_V Δ P_U with ``sides`` 2, Δ P_U with 1."""
    out = {p: np.zeros(c.shape, np.float32) for p, c in change.items()}
    for (path, layer), d in found.items():
        chosen = d["sets"][name]
        if len(chosen):
            out[path][layer] = regions.project(change[path][layer], d["v"][:, chosen] if sides == 2 else None, d["u"][:, chosen])
    return out


def energy(change):
    """‖·‖² over all leaves."""
    return float(sum(np.square(c, dtype=np.float64).sum() for c in change.values()))


def shares(changes, found, name, sides):
    """{what: [share of its energy in the span of the set, over all matrices]} of several ``{path: array}``."""
    out = {}
    for what, change in changes.items():
        held, total = 0.0, 0.0
        for (path, layer), d in found.items():
            chosen = d["sets"][name]
            inner = d["v"][:, chosen] if sides == 2 else None
            inside, whole = regions.energy_share(change[path][layer], inner, d["u"][:, chosen])
            held, total = held + inside, total + whole
        out[what] = held / total if total else None
    return out


def study(context, bench, task, method):
    """For every seed: where intruders are, the energy shares of region, whole change and random mask, and what each part keeps."""
    opened = world.view(context, bench, task)
    return {"task": task, "method": method, "k": K, "eps": EPS, "base": opened.accuracy(opened.base),
            "seeds": {str(s): _one(context, bench, opened, task, method, s) for s in bench.runs[task][method]}}  # fmt: skip


def _one(context, bench, opened, task, method, seed):
    full, mask = world.tuned(context, bench, task, method, seed), world.region(context, bench, task, method, seed)
    found = directions(opened.base, full)
    paths = sorted({p for p, _ in found})
    delta = regions.change_of(opened.base, full, paths)
    mask = {p: mask[p] for p in paths}
    size = sum(int(m.sum()) for m in mask.values())
    chance = _random(mask, size, np.random.default_rng(seed))
    changes = {"whole": delta, "region": regions.restricted(delta, mask), "random": regions.restricted(delta, chance)}
    counts = {f"{p} {i}": len(d["sets"]["intruders"]) for (p, i), d in found.items()}
    out = {"intruders": sum(counts.values()), "by_matrix": {k: n for k, n in counts.items() if n}, "matrices": len(found),
           "lowest_cosine": float(min(d["cosine"].min() for d in found.values())), "region": size,
           "region_share": size / sum(m.size for m in mask.values()), "sets": {}}  # fmt: skip
    for name in SETS:
        if not any(len(d["sets"][name]) for d in found.values()):
            continue
        row = {"directions": sum(len(d["sets"][name]) for d in found.values())}
        for sides in (1, 2):
            row[f"inside_{sides}"] = shares(changes, found, name, sides)
            part = component(delta, found, name, sides)
            if sides == 2:
                row["holds_2"] = _holds(delta, part, mask, chance, size)
            if name == "intruders" or (name == "newest" and not out["intruders"]):
                row[f"keeps_{sides}"] = _keeps(opened, delta, part)
        out["sets"][name] = row
    return out | {"tuned": opened.accuracy(full), "graft": opened.accuracy(graft.apply_graft(opened.base, full, mask))}


def _random(mask, size, rng):
    """As many entries as the region holds, drawn uniformly over the same matrices."""
    flat = np.zeros(sum(m.size for m in mask.values()), bool)
    flat[rng.choice(flat.size, size, replace=False)] = True
    cuts = np.cumsum([m.size for m in mask.values()])[:-1]
    return {p: part.reshape(m.shape) for (p, m), part in zip(mask.items(), np.split(flat, cuts), strict=True)}


def _holds(delta, part, mask, chance, size):
    """The other way round: of the component's energy what lies in the region, of the rest's, and the largest entries they share.

    ``top``: of the component's ``size`` largest entries, the share that is in the region.
    """
    rest = {p: delta[p] - part[p] for p in part}
    return {
        "part_in_region": energy(regions.restricted(part, mask)) / max(energy(part), np.finfo(float).tiny),
        "part_in_random": energy(regions.restricted(part, chance)) / max(energy(part), np.finfo(float).tiny),
        "rest_in_region": energy(regions.restricted(rest, mask)) / max(energy(rest), np.finfo(float).tiny),
        "top": graft.overlap(mask, regions.top_entries(part, size)),
        "rest_top": graft.overlap(mask, regions.top_entries(rest, size)),
        "share_of_change": energy(part) / max(energy(delta), np.finfo(float).tiny),
    }  # fmt: skip


def _keeps(opened, delta, part):
    """Accuracy of the base with a component of the linear layers' change alone, and with the rest alone."""

    def moved(change):
        flat = tree.flatten(opened.base)
        return tree.nest({p: x + jnp.asarray(change[p], jnp.float32) if p in change else x for p, x in flat.items()})

    return {"part": opened.accuracy(moved(part)), "rest": opened.accuracy(moved({p: delta[p] - part[p] for p in part})),
            "all": opened.accuracy(moved(delta))}  # fmt: skip
