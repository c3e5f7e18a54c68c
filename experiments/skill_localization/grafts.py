"""Grafts of the runs of one task and method: curve, region, calibration, other domains, tickets."""

import jax
import numpy as np

from experiments.skill_localization import sweep, world
from ft_jax.analysis import predictions
from ft_jax.data import tasks
from ft_jax.errors import UserError
from ft_jax.io import files
from ft_jax.weights import graft, regions


def study(context, bench, task, method, curve):
    """For every seed the scores of base, tuned and grafted weights; ``curve``: over all sizes, else at the region's alone."""
    opened = world.view(context, bench, task)
    seeds = bench.runs[task][method]
    base = opened.predict(opened.base, label=f"{task}: base")
    return {"task": task, "method": method, "base": world.scored(base),
            "seeds": {str(seed): _one(context, bench, opened, task, method, seed, curve, base) for seed in seeds}}  # fmt: skip


def _one(context, bench, opened, task, method, seed, curve, base_found):
    """One run: rows of masks, the region (kept on disk) and where it sits."""
    g, rng = bench.graft, np.random.default_rng(seed)
    full = world.tuned(context, bench, task, method, seed)
    reference = opened.predict(full)
    low, high = float(base_found["correct"].mean()), float(reference["correct"].mean())
    rows = []

    def row(name, mask, sparsity=None, history=None):
        scores = world.scored(opened.predict(graft.apply_graft(opened.base, full, mask), label=name), reference)
        count, share = graft.mask_size(mask)
        rows.append({"mask": name, "sparsity": sparsity, "parameters": count, "share": share, **scores,
                     "kept": (scores["accuracy"] - low) / (high - low) if high > low else None, "history": history})  # fmt: skip
        return mask

    for sparsity in g["magnitude"] if curve else ():
        row("magnitude", graft.magnitude_mask(opened.base, full, sparsity), sparsity)
    for sparsity in g["random"] if curve else ():
        row("random", graft.random_mask(opened.base, sparsity, rng), sparsity)
    if curve and (biases := _biases(opened.base)):
        row("biases", biases)
    for sparsity in (*(g["learned"].get(method, ()) if curve else ()), g["region"]):
        mask, history = world.learn(bench, opened, full, sparsity, seed, f"{task} {method} s{seed}")
        row("learned", mask, sparsity, history)
        if sparsity == g["region"]:
            found = mask
    share = graft.mask_size(found)[1]
    row("magnitude, as large", graft.magnitude_mask(opened.base, full, share), g["region"])
    row("random, as large", graft.random_mask(opened.base, share, rng), g["region"])
    files.make_folder(context.workdir / "masks")
    graft.save_mask(world.mask_path(context, world.run_name(bench, task, method, seed)), found)
    return {"tuned": world.scored(reference), "agreement_of_base": predictions.scores(base_found, reference)["agreement"],
            "rows": rows, "where": where(found, opened.model.config), "norm": _norm(opened.base, full)}  # fmt: skip


def _biases(base):
    """The BitFit region, None for a model without biases."""
    return graft.bias_mask(base) if any(p.endswith("/bias") for p in graft.eligible_paths(base)) else None


def _norm(base, tuned):
    """‖Δθ‖ over the eligible parameters."""
    change = regions.change_of(base, tuned, graft.eligible_paths(base))
    return float(np.sqrt(sum(np.square(c, dtype=np.float64).sum() for c in change.values())))


def where(mask, config):
    """A region's counts: ``kinds {kind/leaf: [parameters by layer]}`` with ``eligible {kind/leaf: a layer}``, and by attention head."""
    kinds, eligible = {}, {}
    for r in regions.by_layer_and_kind(mask):
        name = f"{r['kind']}/{r['leaf']}"
        kinds.setdefault(name, []).append(r["parameters"])
        eligible[name] = r["eligible"]
    heads = {}
    for r in regions.by_head(mask, config.head_dim):
        heads.setdefault(r["kind"], {}).setdefault(r["layer"], []).append(r["parameters"])
    return {"kinds": kinds, "eligible": eligible, "heads": {k: list(v.values()) for k, v in heads.items()}}


def other_domains(context, bench, task, method, targets):
    """Base, tuned and grafted accuracy on tasks with the same classes that were never trained on, for every seed."""
    opened = world.view(context, bench, task)
    out = {}
    for name in targets:
        data = {**opened.data, **{k: v for k, v in bench_data(bench, name).items() if k != "shots"}, "shots": 0, "eval_limit": bench.test_limit}
        if data["num_labels"] != opened.data["num_labels"]:
            raise UserError(f"{name} has {data['num_labels']} classes, {task} has {opened.data['num_labels']}: no other domain of it")
        held = opened.build(data, "test")
        rows = {"base": world.scored(opened.predict(opened.base, held)), "seeds": {}}
        for seed in bench.runs[task][method]:
            full = world.tuned(context, bench, task, method, seed)
            mask = world.region(context, bench, task, method, seed)
            share = graft.mask_size(mask)[1]
            chance = graft.random_mask(opened.base, share, np.random.default_rng(seed))
            found = {"tuned": full, "learned": graft.apply_graft(opened.base, full, mask),
                     "magnitude": graft.apply_graft(opened.base, full, graft.magnitude_mask(opened.base, full, share)),
                     "random": graft.apply_graft(opened.base, full, chance)}  # fmt: skip
            rows["seeds"][str(seed)] = {k: world.scored(opened.predict(p, held, f"{name}: {k}")) for k, p in found.items()}
        out[name] = rows
    return {"task": task, "method": method, "targets": out}


def bench_data(bench, name):
    """Data settings of a task of the bench or of any bundled one, at the bench's length."""
    return bench.tasks.get(name) or tasks.settings(name, max_length=next(iter(bench.tasks.values()))["max_length"])


def lottery(context, bench, task, method, spec):
    """Lottery tickets θ_ft ⊙ γ of several sizes, as they are and after some steps of the kept parameters alone.

    Beside them, trained for as many steps: the graft, and the biases of the base (BitFit).
    """
    opened, rate = world.view(context, bench, task), sweep.rate_of(context, bench, method)
    out = {}
    for seed in bench.runs[task][method][: spec["seeds"]]:
        full, rows, data = world.tuned(context, bench, task, method, seed), [], opened.train(seed)

        def retrained(name, start, mask, share, seed=seed, data=data, rows=rows):
            tree_, losses = world.fit([(opened, world.shots(data, bench.batch_size, seed))], start, mask, method=method, rate=rate,
                                      steps=spec["steps"], label=f"retrain {name}")  # fmt: skip
            rows.append({"name": name, "share": share, "accuracy": opened.accuracy(start), "retrained": opened.accuracy(tree_),
                         "loss": [losses[0], losses[-1]]})  # fmt: skip

        found = world.region(context, bench, task, method, seed)
        size = graft.mask_size(found)[1]
        retrained("ticket: the region", graft.lottery_ticket(full, found), found, size)
        for share in spec["shares"]:
            mask = largest(full, share)
            retrained("ticket: the largest weights", graft.lottery_ticket(full, mask), mask, share)
        retrained("graft: the region", graft.apply_graft(opened.base, full, found), found, size)
        if biases := _biases(opened.base):
            moved = graft.apply_graft(opened.base, full, biases)
            retrained("graft: the biases", moved, biases, graft.mask_size(biases)[1])
        out[str(seed)] = {"rows": rows, "tuned": opened.accuracy(full)}
    return {"task": task, "method": method, "steps": spec["steps"], "base": opened.accuracy(opened.base), "seeds": out}


def largest(params, share):
    """Mask of the share of eligible parameters that are largest themselves: what pruning keeps."""
    flat = regions.change_of(_zeros(params), params, graft.eligible_paths(params))
    return regions.top_entries(flat, round(share * sum(x.size for x in flat.values())))


def _zeros(params):
    return jax.tree.map(lambda x: np.zeros(x.shape, np.float32), params)
