"""The study's page: figures and tables drawn from the parts alone; a part that is not done leaves its section out."""

import numpy as np

from experiments.skill_localization import report_tasks
from experiments.skill_localization.claims import first_bench, gained, learnt, pick, runs_of, smallest
from experiments.skill_localization.settings import KINDS, LABELS
from experiments.study import band, spread
from ft_jax.analysis import report as page

GREY = "#8c8577"
MASKS = ("magnitude", "learned", "random", "biases")  # of the curve, in the order of the colours


def build(context):
    """``(title, subtitle, sections)`` of the page."""
    bench = first_bench(context)
    opening = (
        "A graft puts some of a tuned model's parameters on the base: θ_pre + γ ⊙ (θ_ft − θ_pre). Its mask γ starts as the largest changes over all weights, "
        "biases and norms of the layers at once and is learnt from there by gradient steps, chosen on validation examples. Every score is on examples that "
        "neither training nor the choice of a mask has seen; the seeds draw the shots and their order."
    )
    made = [fine_tuning, curves, reliability, elsewhere, tickets, where, *report_tasks.SECTIONS]
    sections = [(None, [opening]), *(s for make in made if (s := make(context)))]
    return "Which few parameters hold a skill?", f"Skill localisation by grafting: {'; '.join(b.line for b in context.setting.benches)}; {len(bench.tasks)} tasks", sections


def label(context, bench, task, method):
    name = f"{task.replace('_', ' ')}, {LABELS[method]}"
    return name if bench == first_bench(context) else f"{name} ({bench.name})"


def mean(values):
    return float(np.mean(values)) if values else None


def fine_tuning(context):
    rows = []
    for bench, task, method, value in runs_of(context):
        seeds = list(value["seeds"].values())
        region = bench.graft["region"]
        found = [learnt(s, region) for s in seeds]
        prefix = "" if bench == first_bench(context) else f"{bench.name}_"
        trained = context.get(f"train_{prefix}{task}_{method}", {})
        rows.append({
            "run": label(context, bench, task, method), "kind": KINDS.get(task, "–"), "seeds": len(seeds),
            "rate": f"{LABELS[method]}{'' if bench == first_bench(context) else f' ({bench.name})'} {trained.get('learning_rate', np.nan):.1e}",
            "base": value["base"]["accuracy"], "tuned": spread([s["tuned"]["accuracy"] for s in seeds]),
            "graft": spread([r["accuracy"] for r in found]), "share": mean([r["share"] for r in found]),
            "same": spread([pick(s, "magnitude, as large")["accuracy"] for s in seeds]),
            "chance": spread([pick(s, "random, as large")["accuracy"] for s in seeds]), "agree": mean([r["agreement"] for r in found]),
        })  # fmt: skip
    if not rows:
        return None
    columns = [("run", "run"), ("base", "base", ".3f"), ("tuned", "fine-tuned"), ("share", "grafted", ".2%"),
               ("graft", "learnt graft"), ("same", "magnitude, same size"), ("chance", "random, same size"), ("agree", "agreement", ".1%")]  # fmt: skip
    bench = first_bench(context)
    said = (f"Accuracy on {bench.test_limit or 'all'} held-out examples, mean ± standard deviation over seeds ({max(r['seeds'] for r in rows)} at most). "
            "Agreement is the share of equal answers of the learnt graft and the fine-tuned model. "
            f"Learning rates: {', '.join(dict.fromkeys(r['rate'] for r in rows))}.")  # fmt: skip
    tuned = context.get(f"tune_{bench.name}")
    note = "" if not tuned else (
        f"SGD's learning rate, {tuned['chosen']:g}, had the lowest validation loss on {tuned['task'].replace('_', ' ')} after {tuned['steps']} steps: "
        + ", ".join(f"{r['rate']:g} {'diverged' if r['loss'] is None else format(r['loss'], '.3f')}" for r in tuned["rows"]) + ".")  # fmt: skip
    return ("Fine-tuning and its graft", [said, page.table(rows, columns), *([note] if note else [])])


def curves(context):
    chosen = [(b, t, m, v) for b, t, m, v in runs_of(context) if any(r["mask"] == "magnitude" for s in v["seeds"].values() for r in s["rows"])]
    if not chosen:
        return None
    fig, axes = page.new_figure(6.8, 2.5 * -(-len(chosen) // 2), -(-len(chosen) // 2), 2, squeeze=False, sharex=True)
    for ax, (bench, task, method, value) in zip(axes.flat, chosen):
        for i, mask in enumerate(MASKS):
            lines = [[(r["share"], 100 * r["accuracy"]) for r in sorted(s["rows"], key=lambda r: r["share"]) if r["mask"] == mask]
                     for s in value["seeds"].values()]  # fmt: skip
            if lines[0]:
                xs = np.mean([[x for x, _ in line] for line in lines], 0)
                band(ax, xs, [[y for _, y in line] for line in lines], label=mask, color=page.PALETTE[i], marker="os^D"[i])
        tuned = [100 * s["tuned"]["accuracy"] for s in value["seeds"].values()]
        ax.axhspan(min(tuned), max(tuned), color=GREY, alpha=0.18, linewidth=0)
        for y, name in ((np.mean(tuned), "fine-tuned"), (100 * value["base"]["accuracy"], "base")):
            ax.axhline(y, color=GREY, lw=0.8, ls="--")
            ax.annotate(name, (1.0, y), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=7)
        ax.set_xscale("log")
        ax.set_title(label(context, bench, task, method))
    for ax in axes.flat[len(chosen):]:
        ax.set_visible(False)
    for ax in axes[:, 0]:
        ax.set_ylabel("accuracy (%)")
    for ax in axes.flat[max(0, len(chosen) - 2): len(chosen)]:
        ax.set_xlabel("share of parameters grafted")
        ax.tick_params(labelbottom=True)
    lines = {line.get_label(): line for ax in axes.flat for line in ax.get_lines() if line.get_label() in MASKS}
    fig.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(MASKS), fontsize=8)
    said = []
    for bench, task, method, value in chosen:
        small, name = smallest(value), label(context, bench, task, method)
        if not gained(value):
            said.append(f"{name}: fine-tuning gains under 2 points.")
        elif small:
            gain = [x for x in small[3] if x is not None]
            said.append(f"{name}: {small[1]:.2%} ({small[0]}) keep 95 % of the accuracy, and {spread(gain, '.0%')} of the gain.")
        else:
            said.append(f"{name}: no mask of the curve keeps 95 % of the accuracy.")
    table = [{"run": label(context, b, t, m), "mask": mask, "size": size, **averages(v, mask, size)} for b, t, m, v in chosen
             for mask, size in dict.fromkeys((r["mask"], r["sparsity"]) for s in v["seeds"].values() for r in s["rows"])]  # fmt: skip
    columns = [("run", "run"), ("mask", "mask"), ("share", "share", ".3%"), ("accuracy", "accuracy"), ("loss", "loss", ".3f"), ("kept", "gain kept"),
               ("agreement", "agreement", ".1%"), ("ece", "ECE", ".3f")]  # fmt: skip
    return ("How small can a graft be?", [" ".join(said), page.figure(fig, "Accuracy of grafts by size, one panel a run; bands are the least and the largest of "
            "the seeds. A learnt mask starts from a magnitude mask and may grow; it stands at the size that it reached."),
            page.details("All masks in numbers", page.table(table, columns, "A base that gives every text the same word, as a language model "
            "may, keeps its accuracy until a graft turns the answer: there the loss tells masks apart."))])  # fmt: skip


def averages(value, mask, size):
    rows = [r for s in value["seeds"].values() for r in s["rows"] if (r["mask"], r["sparsity"]) == (mask, size)]
    return {"share": mean([r["share"] for r in rows]), "accuracy": spread([r["accuracy"] for r in rows]), "loss": mean([r["loss"] for r in rows]),
            "kept": spread([r["kept"] for r in rows if r["kept"] is not None], ".0%"), "agreement": mean([r["agreement"] for r in rows]),
            "ece": mean([r["ece"] for r in rows])}  # fmt: skip


def pooled(bins):
    """Bins of several seeds as one: [count, confidence, accuracy]."""
    out = []
    for rows in zip(*bins, strict=True):
        n = sum(r[0] for r in rows)
        out.append([n, *(sum(r[0] * r[i] for r in rows if r[0]) / n if n else None for i in (1, 2))])
    return out


def reliability(context):
    main = first_bench(context).main
    chosen = [x for x in runs_of(context) if x[1] == main and not x[2].startswith("lora")]
    if not chosen:
        return None
    fig, axes = page.new_figure(6.8, 2.3 * len(chosen), len(chosen), 3, squeeze=False, sharex=True, sharey=True)
    rows = []
    for i, (bench, task, method, value) in enumerate(chosen):
        region, seeds = bench.graft["region"], list(value["seeds"].values())
        found = {"base": [value["base"]], "fine-tuned": [s["tuned"] for s in seeds], "graft": [learnt(s, region) for s in seeds]}
        rows.append({"run": label(context, bench, task, method), **{k: spread([x["ece"] for x in v]) for k, v in found.items()}})
        for ax, (name, scores) in zip(axes[i], found.items(), strict=True):
            bins = [b for b in pooled([x["bins"] for x in scores]) if b[0]]
            total = sum(b[0] for b in bins)
            ax.plot([0, 1], [0, 1], color=GREY, lw=0.8, ls="--")
            ax.plot([b[1] for b in bins], [b[2] for b in bins], color=page.PALETTE[0])
            ax.scatter([b[1] for b in bins], [b[2] for b in bins], s=[12 + 160 * b[0] / total for b in bins], color=page.PALETTE[0], alpha=0.7, linewidth=0)
            ax.set_title("" if i else name)
            ax.set_ylim(0, 1)
        axes[i][0].set_ylabel(f"{LABELS[method]}{'' if bench == first_bench(context) else f' ({bench.name})'}\naccuracy")
    low = 1 / max(b.tasks[main]["num_labels"] for b in context.setting.benches if main in b.tasks)
    for ax in axes[-1]:
        ax.set_xlim(low - 0.03, 1.02)
        ax.set_xlabel("confidence")
    columns = [("run", "expected calibration error"), "base", "fine-tuned", "graft"]
    return ("Calibration", [page.table(rows, columns), page.figure(fig, f"Reliability on {main.replace('_', ' ')}: accuracy by confidence, the area of a point "
            "is its share of the examples, seeds pooled; on the dashed line confidence is what it says.")])  # fmt: skip


def elsewhere(context):
    rows = []
    for method in context.setting.ood["methods"]:
        value = context.get(f"ood_{first_bench(context).main}_{method}")
        for target, found in (value or {"targets": {}})["targets"].items():
            seeds = list(found["seeds"].values())
            row = {"pair": f"{value['task'].replace('_', ' ')} to {target.replace('_', ' ')}", "base": found["base"]["accuracy"]}
            row |= {k: spread([s[k]["accuracy"] for s in seeds]) for k in ("tuned", "learned", "magnitude", "random")}
            rows.append(row | {"ece": spread([s["tuned"]["ece"] for s in seeds]), "graft_ece": spread([s["learned"]["ece"] for s in seeds])})
    if not rows:
        return None
    columns = [("pair", "trained on, tested on"), ("base", "base", ".3f"), ("tuned", "fine-tuned"), ("learned", "learnt graft"), ("magnitude", "magnitude graft"),
               ("random", "random graft"), ("ece", "ECE fine-tuned"), ("graft_ece", "ECE graft")]  # fmt: skip
    return ("Other domains", [page.table(rows, columns, "Accuracy on domains that were never trained on; masks of the learnt one's size.")])


def tickets(context):
    value = context.get("lottery")
    if not value:
        return None
    by = {}
    for s in value["seeds"].values():
        for r in s["rows"]:
            by.setdefault((r["name"], round(r["share"], 3) if "weights" in r["name"] else None), []).append(r)
    rows = [{"name": name, "share": mean([r["share"] for r in found]), "before": spread([r["accuracy"] for r in found]),
             "after": spread([r["retrained"] for r in found])} for (name, _), found in by.items()]  # fmt: skip
    columns = [("name", "what is kept"), ("share", "share", ".2%"), ("before", "as it is"), ("after", f"after {value['steps']} steps")]
    tuned = spread([s["tuned"] for s in value["seeds"].values()])
    return ("Lottery tickets and biases", [
        f"A ticket zeroes what a graft leaves at the base. On {value['task'].replace('_', ' ')}, where the base has {value['base']:.3f} and the tuned model {tuned}; "
        "retraining moves the kept parameters alone.", page.table(rows, columns)])  # fmt: skip


def where(context):
    """Layer × kind and head heat-maps of the main task's regions, as multiples of a random region's density."""
    first = first_bench(context)
    chosen = [(m, v) for b, t, m, v in runs_of(context) if b == first and t == first.main]
    if not chosen:
        return None
    grids = {m: density(list(v["seeds"].values())) for m, v in chosen}
    kinds = next(iter(grids.values()))[0]
    values = {m: g for m, (_, g) in grids.items()}
    columns = min(3, len(values))
    lines = -(-len(values) // columns)
    fig, axes = page.new_figure(7.0, 0.6 + 0.17 * len(kinds) * lines + 0.5 * lines, lines, columns, squeeze=False, sharey=True)
    top = max(3.0, float(np.quantile(np.concatenate([v.ravel() for v in values.values()]), 0.97)))
    for ax, (method, grid) in zip(axes.flat, values.items()):
        layers = [str(i) if grid.shape[1] <= 12 or i % 4 == 0 else "" for i in range(grid.shape[1])]
        page.heatmap(ax, np.minimum(grid, top), x=layers, y=kinds, label="× random", vmax=top)
        ax.set_title(LABELS[method])
        ax.set_xlabel("layer")
        ax.tick_params(axis="y", labelsize=7)
    for ax in axes.flat[len(values):]:
        ax.set_visible(False)
    said = []
    for method, grid in values.items():
        i, j = np.unravel_index(np.argmax(grid), grid.shape)
        said.append(f"{LABELS[method]}: densest in {kinds[i]} of layer {j} ({grid[i, j]:.1f} times a random region).")
    blocks = [" ".join(said), page.figure(fig, "Density of the learnt region by layer and leaf, relative to a random region of its size "
              f"(mean of the seeds; colours end at {top:.0f}).")]  # fmt: skip
    return ("Where the region sits", [*blocks, *heads(chosen)])


def density(seeds):
    """(kinds, [kinds, layers]): parameters of the region a parameter of the place, over the region's share of all."""
    eligible = seeds[0]["where"]["eligible"]
    kinds = list(eligible)
    counts = np.mean([[s["where"]["kinds"][k] for k in kinds] for s in seeds], 0)
    sizes = np.array([eligible[k] for k in kinds], float)[:, None]
    overall = counts.sum() / (sizes * np.ones_like(counts)).sum()
    return kinds, counts / sizes / max(overall, np.finfo(float).tiny)


def heads(chosen):
    """Heat-maps layer × head of the first run's query and output matrices."""
    method, value = chosen[0]
    seeds = list(value["seeds"].values())
    shown = [k for k in ("attn/q", "attn/v", "attn/out") if k in seeds[0]["where"]["heads"]]
    if not shown:
        return []
    fig, axes = page.new_figure(7.0, 2.4, 1, len(shown), squeeze=False, sharey=True)
    for ax, kind in zip(axes[0], shown, strict=True):
        counts = np.mean([s["where"]["heads"][kind] for s in seeds], 0)
        page.heatmap(ax, counts / max(counts.mean(), np.finfo(float).tiny), x=[str(i) for i in range(counts.shape[1])],
                     y=[str(i) for i in range(counts.shape[0])], label="× this kind's mean")  # fmt: skip
        ax.set_title(kind)
        ax.set_xlabel("head")
        ax.tick_params(axis="x", labelsize=7)
    axes[0][0].set_ylabel("layer")
    return [page.figure(fig, f"Density of the region by attention head ({LABELS[method]}, mean of the seeds).")]
