"""The page's sections on several tasks, on tasks in sequence, and on intruder dimensions."""

import numpy as np

from experiments.skill_localization.claims import first_bench
from experiments.skill_localization.multitask import kept
from experiments.skill_localization.settings import LABELS
from experiments.study import spread
from ft_jax.analysis import report as page


def name(task):
    return task.replace("_", " ")


def grid(ax, values, names, label, **options):
    page.heatmap(ax, np.asarray(values, float), x=names, y=names, label=label, annotate=".2f", **options)
    ax.set_xticks(ax.get_xticks(), names, rotation=30, ha="right", rotation_mode="anchor", fontsize=7)
    ax.tick_params(axis="y", labelsize=7)


def multi(context):
    value, train, transfer = (context.get(k) for k in ("multi_overlap", "multi_train", "transfer"))
    if not (value and train and transfer):
        return None
    names = [name(t) for t in value["tasks"]]
    off = ~np.eye(len(names), dtype=bool)
    fig, axes = page.new_figure(7.0, 2.9, 1, 2)
    for ax, key, title in ((axes[0], "mean", "regions"), (axes[1], "added", "what learning added")):
        grid(ax, value[key], names, "overlap |γᵢ ∩ γⱼ| / |γⱼ|", vmax=1.0)
        ax.set_title(title)
    scatter, panels = page.new_figure(7.0, 2.6, 1, 2)
    overlap, gain = np.asarray(value["mean"]), 100 * np.asarray(value["gain"])
    for ax, key, title in ((panels[0], "mean", "regions"), (panels[1], "added", "what learning added")):
        ax.plot(gain[off], np.asarray(value[key], float)[off], "o", color=page.PALETTE[0])
        ax.set_title(title)
        ax.set_xlabel("points that training on i adds on j")
    panels[0].set_ylabel("overlap of i and j")
    rho = value["spearman"]
    chance = np.asarray(value["chance"])[off].mean()
    said = (f"One encoder was trained on {len(names)} tasks in turn, each under its own frozen head; then each task's region was learnt in the joint change. "
            f"Off the diagonal the overlap is {overlap[off].mean():.2f} on average, {chance:.3f} for random masks of these sizes. "
            + ("" if rho["rho"] is None else f"Its rank correlation with transfer is {rho['rho']:.2f} (95 % bootstrap interval {rho['low']:.2f} to {rho['high']:.2f}, "
               f"{rho['n']} ordered pairs)."))  # fmt: skip
    rows = []
    for t in value["tasks"]:
        region = context.get(f"multi_region_{t}")
        row = {"region": f"region of {name(t)}"} | {u: spread([s["scores"][u] for s in region.values()]) for u in value["tasks"]} if region else {}
        rows.append(row | ({"share": float(np.mean([s["share"] for s in region.values()]))} if region else {}))
    tuned = {u: spread([s["scores"][u] for s in train["seeds"].values()]) for u in value["tasks"]}
    rows = [{"region": "none: base", **{u: f"{x:.3f}" for u, x in train["base"].items()}}, *rows, {"region": "all: multi-task model", **tuned}]
    columns = [("region", "grafted"), ("share", "share", ".2%"), *((t, name(t)) for t in value["tasks"])]
    return ("Several tasks in one model", [said, page.figure(fig, "Overlap of the regions of a multi-task model (row i, column j; mean of the seeds), and of what "
            "each task's learning added to the largest changes that all start from."),
            page.figure(scatter, "Overlap against transfer between single-task models, one point an ordered pair of tasks."), page.table(rows, columns, "Accuracy on each task of the base with one task's region of the multi-task model."),
            *unions(context, train), *purified(context)])  # fmt: skip


def unions(context, train):
    value = context.get("multi_union")
    if not value:
        return []
    by = {}
    for seed, found in value.items():
        tuned = train["seeds"][seed]["scores"]
        for r in found:
            rest = [t for t in train["base"] if t not in r["tasks"]]
            by.setdefault(tuple(r["tasks"]), []).append((r["share"], kept(r["scores"], train["base"], tuned, r["tasks"]), kept(r["scores"], train["base"], tuned, rest)))
    rows = [{"tasks": ", ".join(map(name, tasks)), "share": float(np.mean([x[0] for x in xs])), "in": spread([x[1] for x in xs], ".0%"),
             "out": spread([x[2] for x in xs], ".0%")} for tasks, xs in by.items()]  # fmt: skip
    columns = [("tasks", "union of the regions of"), ("share", "share", ".2%"), ("in", "gain kept, these tasks"), ("out", "gain kept, the others")]
    return [page.table(rows, columns, "Grafts of unions, as shares of the multi-task model's gain (tasks that gained under 2 points do not count).")]


def purified(context):
    value = context.get("multi_purify")
    if not value:
        return []
    rows = []
    for task, seeds in value["tasks"].items():
        row = {"task": name(task)}
        for gate in ("region", "random"):
            row |= {f"{gate}_{k}": spread([s[gate][k] for s in seeds.values()]) for k in ("before", "after")}
        rows.append(row)
    columns = [("task", "task"), ("region_before", "graft of its region"), ("region_after", f"after {value['steps']} steps"), ("random_before", "random graft"),
               ("random_after", f"after {value['steps']} steps")]  # fmt: skip
    return [page.table(rows, columns, "Purifying: some steps of one task on its region's parameters alone, and on a random mask of the same size.")]


def continual(context):
    blocks = []
    for a, b in context.setting.continual["pairs"]:
        value = context.get(f"continual_{a}_{b}")
        if not value:
            continue
        seeds, rows = list(value["seeds"].values()), []
        for run in seeds[0]["runs"]:
            found = [s["runs"][run] for s in seeds]
            rows.append({"run": run, "before": spread([x["before"] for x in found]), "first": spread([x["first"] for x in found]),
                         "drop": spread([100 * (x["before"] - x["first"]) for x in found], ".1f"), "second": spread([x["second"] for x in found]),
                         "read": spread([x["read"] for x in found]), "moved": float(np.mean([x["moved_in_region"] for x in found]))})  # fmt: skip
        columns = [("run", f"{name(b)} trained"), ("before", f"{name(a)} before"), ("first", f"{name(a)} after"), ("drop", "drop (points)"),
                   ("second", f"{name(b)} after"), ("read", f"{name(a)}, graft read out"), ("moved", "of ‖Δ‖² in the region", ".1%")]  # fmt: skip
        blocks.append(page.table(rows, columns, f"{name(a)}, then {name(b)} for {value['steps']} steps; base {value['base']['first']:.3f} and {value['base']['second']:.3f}."))
    return ("A second task after a first", ["The region of the first task is held fixed while the second trains. Read out: the first task's region of the final "
            "weights, put on the base.", *blocks]) if blocks else None  # fmt: skip


SETS = {"intruders": "intruders", "newest": "newest direction of each matrix", "neighbours": "as many strongest non-intruders", "control": "strongest other of each matrix"}


def intruders(context):
    main, rows, keeps = first_bench(context).main, [], []
    counts = []
    for method in context.setting.intruders["methods"]:
        value = context.get(f"intruders_{main}_{method}")
        if not value:
            continue
        seeds = list(value["seeds"].values())
        counts.append(f"{LABELS[method]} {spread([s['intruders'] for s in seeds], '.1f')}")
        for key, title in SETS.items():
            found = [s["sets"][key] for s in seeds if key in s["sets"]]
            if not found:
                continue
            row = {"run": LABELS[method], "set": title, "n": float(np.mean([x["directions"] for x in found]))}
            for what in ("whole", "region", "random"):
                row[what] = spread([100 * x["inside_2"][what] for x in found], ".1f")
                row[f"{what}_1"] = spread([100 * x["inside_1"][what] for x in found], ".1f")
            row |= {k: spread([100 * x["holds_2"][k] for x in found], ".1f") for k in ("part_in_region", "rest_in_region", "top", "rest_top")}
            rows.append(row)
            scored = [(s, x) for s, x in ((s, s["sets"].get(key)) for s in seeds) if x and "keeps_2" in x]
            if scored:
                line = {"run": LABELS[method], "set": title, "base": value["base"], "tuned": spread([s["tuned"] for s, _ in scored])}
                for sides in (1, 2):
                    line |= {f"{k}_{sides}": spread([x[f"keeps_{sides}"][k] for _, x in scored]) for k in ("part", "rest")}
                keeps.append(line | {"graft": spread([s["graft"] for s, _ in scored])})
    if not rows:
        return None
    columns = [("run", "run"), ("set", "span of"), ("n", "directions", ".1f"), ("whole", "whole Δ"), ("region", "region"), ("random", "random"),
               ("whole_1", "whole Δ, one side"), ("region_1", "region, one side"), ("random_1", "random, one side")]  # fmt: skip
    back = [("run", "run"), ("set", "span of"), ("part_in_region", "of the component"), ("rest_in_region", "of the rest"), ("top", "component's largest entries"),
            ("rest_top", "the rest's largest")]  # fmt: skip
    third = [("run", "run"), ("set", "component"), ("base", "base", ".3f"), ("tuned", "fine-tuned"), ("graft", "graft of the region"), ("part_2", "component alone"),
             ("rest_2", "the rest alone"), ("part_1", "one-sided alone"), ("rest_1", "its rest alone")]  # fmt: skip
    said = [f"Intruders among the top {10} directions of each linear layer (ε = 0.5): {'; '.join(counts)}, mean ± standard deviation over seeds. "
            "An intruder is a left singular vector u of the tuned matrix that no left vector of the base resembles; with its right vector v it spans one dyad u vᵀ. "
            "The question is whether the few parameters that carry the skill are the ones that those directions wrote.",
            *answer(rows)]  # fmt: skip
    return ("Is the region the intruder subspace?", [
        *said, page.table(rows, columns, "Percent of the energy ‖·‖² of a change that lies in the span, over all linear layers: of the whole change Δ, of the region's "
                          "entries γ ⊙ Δ, of as many random entries. Two-sided: u and v both in the span; one side: u alone."),
        page.table(rows, back, "The other way round, in percent: how much of the component's energy, and of the rest's, lies in the region's entries; and how many of "
                   "their largest entries (as many as the region has) are in the region."),
        *([page.table(keeps, third, "Accuracy of the base with a component of the linear layers' change alone.")] if keeps else [])])  # fmt: skip


def answer(rows):
    """One sentence a method: how much more of the region's change than of the whole change the span holds."""
    out = []
    for r in rows:
        if r["set"] == SETS["intruders"]:
            whole, region, part, rest = (float(str(r[k]).split(" ")[0]) for k in ("whole", "region", "part_in_region", "rest_in_region"))
            out.append(f"{r['run']}: the intruders' span holds {region:.1f} % of the region's change and {whole:.1f} % of the whole change; the region holds "
                       f"{part:.1f} % of the intruder component and {rest:.1f} % of the rest.")  # fmt: skip
    return [" ".join(out)] if out else ["No run has an intruder: the newest direction of each matrix stands in for them."]


SECTIONS = (multi, continual, intruders)
