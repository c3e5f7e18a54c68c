"""One model for several tasks: a region for each, how they overlap, what their unions hold; and a second task after a first."""

import itertools

import numpy as np

from experiments.skill_localization import sweep, world
from ft_jax.analysis import stats
from ft_jax.io import files
from ft_jax.weights import graft, regions

FLIPS = 0.02  # more than for a run of one task: all tasks start from one mask, and have to part from it in a few steps


def tree_path(context, seed):
    return context.workdir / "trees" / f"multi-s{seed}.safetensors"


def region_path(context, task, seed):
    return world.mask_path(context, f"multi-{task}-s{seed}")


def train(context, bench, spec):
    """One encoder trained on all tasks in turn, each under its own frozen head; {seed: {task: accuracy}} beside the base's."""
    views, method = {t: world.view(context, bench, t) for t in spec["tasks"]}, spec["method"]
    rate = sweep.rate_of(context, bench, method)
    out = {"base": {t: v.accuracy(v.base) for t, v in views.items()}, "learning_rate": rate, "method": method, "seeds": {}}
    some = next(iter(views.values()))
    for seed in spec["seeds"]:
        lanes = [(v, world.shots(v.train(seed), bench.batch_size, seed)) for v in views.values()]
        found, losses = world.fit(lanes, some.base, world.everywhere(some.base), method=method, rate=rate, steps=spec["steps"],
                                  label=f"multi-task s{seed}")  # fmt: skip
        world.keep_layers(tree_path(context, seed), found)
        out["seeds"][str(seed)] = {"loss": losses[:: max(1, len(losses) // 20)],
                                   "scores": {t: v.accuracy(world.with_layers(v.base, found)) for t, v in views.items()}}  # fmt: skip
    return out


def task_region(context, bench, spec, task):
    """The task's region in the multi-task change, learnt with that task's loss; its graft scored on every task."""
    views = {t: world.view(context, bench, t) for t in spec["tasks"]}
    own, out = views[task], {}
    for seed in spec["seeds"]:
        full = world.with_layers(own.base, tree_path(context, seed))
        mask, history = world.learn(bench, own, full, spec["region"], seed, f"region of {task} s{seed}", FLIPS)
        files.make_folder(context.workdir / "masks")
        graft.save_mask(region_path(context, task, seed), mask)
        out[str(seed)] = {"parameters": graft.mask_size(mask)[0], "share": graft.mask_size(mask)[1], "history": history,
                          "scores": grafted(views, context, seed, mask)}  # fmt: skip
    return out


def grafted(views, context, seed, mask):
    """{task: accuracy} of the base with a region of the multi-task model."""
    full = world.with_layers(next(iter(views.values())).base, tree_path(context, seed))
    some = next(iter(views.values()))
    found = graft.apply_graft(some.base, full, mask)
    return {t: v.accuracy(world.with_layers(v.base, found)) for t, v in views.items()}


def transfer(context, bench, spec):
    """{seed: [task trained on][task tested on] accuracy} of the single-task models under the frozen heads; and of the base."""
    views = {t: world.view(context, bench, t) for t in spec["tasks"]}
    out = {}
    for seed in spec["transfer_seeds"]:
        rows = []
        for source in views:
            full = world.tuned(context, bench, source, spec["method"], seed)
            rows.append([v.accuracy(world.with_layers(v.base, full), label=f"{source} to {t}") for t, v in views.items()])
        out[str(seed)] = rows
    return {"tasks": list(views), "base": [v.accuracy(v.base) for v in views.values()], "seeds": out}


def overlap(context, bench, spec):
    """Overlap of the regions by seed, by chance, of what learning added, and its rank correlation with transfer.

    A task i is similar to j when training on i alone helps j: the accuracy that i's model adds to the base on j. Every region starts
    from the same largest changes; ``added`` compares only what each task's learning brought in beside them.
    """
    names, found, added, chance, same = list(spec["tasks"]), [], [], [], {}
    for seed in spec["seeds"]:
        masks = [graft.load_mask(region_path(context, t, seed)) for t in names]
        base = world.view(context, bench, names[0]).base
        start = graft.magnitude_mask(base, world.with_layers(base, tree_path(context, seed)), spec["region"])
        new = [{p: m & ~start[p] for p, m in mask.items()} for mask in masks]
        found.append(regions.overlap_matrix(masks))
        added.append([[graft.overlap(a, b) if graft.mask_size(b)[0] else None for b in new] for a in new])
        chance.append(regions.chance_overlap(masks))
    for t in names:  # the same task's region in the models of two seeds: how much of an overlap is the task's own
        held = [graft.load_mask(region_path(context, t, s)) for s in spec["seeds"]]
        same[t] = [graft.overlap(a, b) for a, b in itertools.permutations(held, 2)]
    moved = context.value("transfer")
    gain = np.mean([np.asarray(rows) - np.asarray(moved["base"]) for rows in moved["seeds"].values()], axis=0)
    off, fresh = ~np.eye(len(names), dtype=bool), _mean(added)
    return {
        "tasks": names, "overlap": [m.tolist() for m in found], "mean": np.mean(found, axis=0).tolist(), "same_task": same,
        "chance": np.mean(chance, axis=0).tolist(), "gain": gain.tolist(), "spearman": stats.spearman(np.mean(found, axis=0)[off], gain[off]),
        "added": [[None if np.isnan(x) else float(x) for x in row] for row in fresh], "spearman_added": stats.spearman(fresh[off], gain[off]),
    }  # fmt: skip


def _mean(matrices):
    """Mean over seeds of what is there; NaN where no seed has it."""
    values = np.asarray([[[np.nan if x is None else x for x in row] for row in m] for m in matrices], float)
    count = np.isfinite(values).sum(0)
    return np.where(count > 0, np.nansum(values, 0) / np.maximum(count, 1), np.nan)


def union(context, bench, spec):
    """Grafts of unions of regions: {seed: [{tasks, share, scores}]} for every subset of the sizes asked for."""
    views = {t: world.view(context, bench, t) for t in spec["tasks"]}
    out = {}
    for seed in spec["seeds"]:
        masks, rows = {t: graft.load_mask(region_path(context, t, seed)) for t in views}, []
        for size in spec["subset_sizes"]:
            for chosen in itertools.combinations(views, size):
                mask = regions.union([masks[t] for t in chosen])
                rows.append({"tasks": chosen, "share": graft.mask_size(mask)[1], "scores": grafted(views, context, seed, mask)})
        out[str(seed)] = rows
    return out


def purify(context, bench, spec):
    """A few steps of a task alone on its region's parameters, from its graft; the same steps on a random mask of the size."""
    out = {}
    for task, seed in itertools.product(spec["tasks"], spec["seeds"][: spec["purify_seeds"]]):
        opened = world.view(context, bench, task)
        full = world.with_layers(opened.base, tree_path(context, seed))
        mask = graft.load_mask(region_path(context, task, seed))
        chance = graft.random_mask(opened.base, graft.mask_size(mask)[1], np.random.default_rng(seed))
        row = {}
        for name, gate in (("region", mask), ("random", chance)):
            start = graft.apply_graft(opened.base, full, gate)
            found, losses = world.fit([(opened, world.shots(opened.train(seed), bench.batch_size, seed))], start, gate,
                                      method=spec["method"], rate=sweep.rate_of(context, bench, spec["method"]),
                                      steps=spec["purify_steps"], label=f"purify {task} s{seed}")  # fmt: skip
            row[name] = {"before": opened.accuracy(start), "after": opened.accuracy(found), "loss": [losses[0], losses[-1]]}
        out.setdefault(task, {})[str(seed)] = row
    return {"steps": spec["purify_steps"], "tasks": out}


def continual(context, bench, spec, first, second):
    """The second task after the first: everywhere, outside the first's region, outside a random region; the drop on the first.

    ``from the graft``: the first task is kept as its graft alone, and the second trains outside. ``read`` is the first
    task's score when its region of the final weights is put on the base.
    """
    a, b, method = world.view(context, bench, first), world.view(context, bench, second), spec["method"]
    out = {"first": first, "second": second, "method": method, "steps": spec["steps"], "seeds": {},
           "base": {"first": a.accuracy(a.base), "second": b.accuracy(b.base)}}  # fmt: skip
    for seed in spec["seeds"]:
        full, mask = world.tuned(context, bench, first, method, seed), world.region(context, bench, first, method, seed)
        chance = graft.random_mask(a.base, graft.mask_size(mask)[1], np.random.default_rng(seed))
        alone = graft.apply_graft(a.base, full, mask)
        runs = {"everywhere": (full, world.everywhere(a.base)), "outside the region": (full, regions.complement(mask)),
                "outside a random region": (full, regions.complement(chance)), "from the graft, outside": (alone, regions.complement(mask))}  # fmt: skip
        rows = {}
        for name, (start, gate) in runs.items():
            found, _ = world.fit([(b, world.shots(b.train(seed), bench.batch_size, seed))], world.with_layers(b.base, start), gate,
                                 method=method, rate=spec["rate_scale"] * sweep.rate_of(context, bench, method),
                                 steps=spec["steps"], label=f"{second} {name} s{seed}")  # fmt: skip
            rows[name] = {
                "before": a.accuracy(start), "first": a.accuracy(world.with_layers(a.base, found)), "second": b.accuracy(found),
                "read": a.accuracy(graft.apply_graft(a.base, world.with_layers(a.base, found), mask)),
                "moved_in_region": _moved(start, found, mask),
            }  # fmt: skip
        out["seeds"][str(seed)] = {"region": graft.mask_size(mask)[1], "runs": rows}
    return out


def _moved(start, found, mask):
    """Share of ‖θ − start‖² that lies in a region: zero when training stayed outside."""
    change = regions.change_of(start, found, mask)
    inside = sum(float(np.square(c[mask[p]], dtype=np.float64).sum()) for p, c in change.items())
    return inside / max(sum(float(np.square(c, dtype=np.float64).sum()) for c in change.values()), np.finfo(float).tiny)


def kept(scores, base, tuned, tasks, margin=0.02):
    """Mean over tasks of the share of the multi-task gain that a graft keeps; None where no task gained more than ``margin``."""
    shares = [(scores[t] - base[t]) / (tuned[t] - base[t]) for t in tasks if tuned[t] > base[t] + margin]
    return float(np.mean(shares)) if shares else None
