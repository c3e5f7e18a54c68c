"""The atlas as a page: one sortable table a task, score against forgetting and against what trains."""

import numpy as np

from experiments.atlas.settings import FASTER, METHODS
from experiments.study import spread
from ft_jax.analysis import report as page

FORGOT = {
    "classification": "the rise of the contrastive loss that the encoder was trained with, on halves of novel passages",
    "causal_lm": "the rise of the next-token loss on novel passages (nats)",
}
COLUMNS = [
    ("method", "method"), ("family", "family"), ("loss", "loss"), ("paired", "loss − full's"), ("accuracy", "accuracy"), ("forgetting", "forgetting"), ("ece", "ECE"), ("rate", "learning rate"),
    ("trained", "trained (%)", ".3f"), ("changed", "changed (%)", ".2f"), ("bytes", "optimiser (MB)", ".3f"), ("flops", "product FLOPs / full", ".2f"), ("time", "time / full", ".2f"),
    ("i5", "intruders, ε = .5", ".1f"), ("i9", "ε = .9", ".1f"), ("erank", "effective rank", ".1f"), ("norm", "‖ΔW‖", ".2f"),
]  # fmt: skip


def rows(base, found):
    """A row a method that reached its end, least loss first."""
    full = _losses(found["full"]) if "full" in found else {}
    return sorted((row for method, value in found.items() if (row := _row(base, full, method, value))), key=lambda r: r["key"])


def _losses(value):
    """``{seed: loss}``; runs of one seed see the same batches."""
    return {r["seed"]: r["scores"]["task"]["loss"] for r in value["runs"] if "failed" not in r}


def _row(base, full, method, value):
    runs = [r for r in value["runs"] if "failed" not in r]
    if not runs:
        return None
    losses, right = ([r["scores"]["task"][word] for r in runs] for word in ("loss", "accuracy"))
    forgot = [r["scores"]["forgetting"] - base["forgetting"] for r in runs]
    cost = value["cost"] or {}
    tried = [t["rate"] for t in value["tried"]]
    edge = value["rate"] in (tried[0], tried[-1]) and len(tried) > 2

    def mean(get):
        values = [get(r) for r in runs if get(r) is not None]
        return float(np.mean(values)) if values else None

    paired = [loss - full[seed] for seed, loss in _losses(value).items() if seed in full]
    changed = next((r["spectra"] for r in runs if "spectra" in r), None)

    def spectra(key, i=None):
        found = changed and changed[key]
        return found if i is None or found is None else found[i]

    return {
        "method": method, "family": METHODS[method][0], "key": float(np.mean(losses)), "forgot": float(np.mean(forgot)), "seeds": len(runs),
        "loss": spread(losses), "paired": spread(paired, "+.3f").replace("± +", "± "), "accuracy": spread(right), "forgetting": spread(forgot, "+.3f").replace("± +", "± "), "ece": mean(lambda r: r["scores"]["task"]["ece"]),
        "rate": f"{value['rate']:g}{' *' if edge else ''}",
        "trained": 100 * mean(lambda r: r["trainable_parameters"] / r["total_parameters"]), "changed": 100 * mean(lambda r: r["changed"]),
        "bytes": mean(lambda r: r["optimizer_bytes"]) / 1e6,
        "flops": cost.get("flops_of_full"), "time": cost.get("time_of_full"), "i5": spectra("intruders", 0), "i9": spectra("intruders", 1),
        "erank": spectra("effective_rank"), "norm": spectra("delta_norm"),
    }  # fmt: skip


def _scatter(task, table, base):
    fig, axes = page.new_figure(8.6, 4.4, 1, 2, sharey=True)
    families = list(dict.fromkeys(f for f, _ in METHODS.values()))
    marks, level = "os^vDP*Xhp", base["task"]["loss"]
    # Of many methods the few that went astray would squeeze all others into a corner.
    most = max(level - table[0]["key"], 0.05 * level)
    top, right = (level + most, float(np.quantile([r["forgot"] for r in table], 0.95))) if len(table) >= 20 else (np.inf, np.inf)
    kept = [{**r, "key": min(r["key"], top), "forgot": min(r["forgot"], right)} for r in table]
    for ax, key in zip(axes, ("forgot", "trained")):
        for i, family in enumerate(families):
            mine = [r for r in kept if r["family"] == family]
            if mine:
                ax.plot([r[key] for r in mine], [r["key"] for r in mine], ls="", marker=marks[i % len(marks)], ms=5, alpha=0.85,
                        color=page.PALETTE[i % len(page.PALETTE)], label=family, clip_on=False)  # fmt: skip
        ax.axhline(level, ls="--", lw=0.9, color="#8c8577")
    axes[1].set_xscale("log")
    axes[0].set_xlabel("forgetting (nats)")
    axes[1].set_xlabel("weights that train (% of all)")
    axes[0].set_ylabel("loss on held-out data (nats)")
    fig.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", fontsize=7, ncols=7)
    _label(fig, axes[0], _named(table))
    beyond = ", ".join(r["method"] for r in table if r["key"] > top or r["forgot"] > right)
    return page.figure(fig, f"Score against forgetting and against what trains ({task.line}); each point is a method, mean over seeds. Dashed: the base model. "
                       f"Named: methods that none beats in both, where there is room.{f' Drawn nearer than they are: {beyond}.' if beyond else ''}")  # fmt: skip


def _label(fig, ax, rows):
    """Names beside points, but for those that would lie on another name."""
    fig.canvas.draw()
    taken = []
    for r in rows:
        text = ax.annotate(r["method"], (r["forgot"], r["key"]), xytext=(4, 3), textcoords="offset points", fontsize=7)
        box = text.get_window_extent()
        if any(box.overlaps(other) for other in taken):
            text.remove()
        else:
            taken.append(box)


def _named(table):
    """The methods that none beats both in loss and in forgetting."""
    best, out = np.inf, []
    for r in sorted(table, key=lambda r: (r["forgot"], r["key"])):
        if r["key"] < best:
            best = r["key"]
            out.append(r)
    return out


def build(context, found, costed):
    """(title, subtitle, sections) from the parts that are done; ``costed`` names the task whose steps were measured for each."""
    sections = []
    for name, task in context.setting.tasks.items():
        base = context.get(f"{name}_base")
        if base is None or not found[name]:
            continue
        table = rows(base, found[name])
        if not table:
            continue
        lost = [m for m, v in found[name].items() if not any(r["method"] == m for r in table)]
        faster = ", ".join(f"{m}: {FASTER[m]:g} times as large" for m in FASTER if m in task.rows)
        how = (f"{len(table)} methods, {task.steps} steps of {task.batch_size}, {len(task.seeds)} seeds. Every method tried the learning rates "
               f"{', '.join(f'{r:g}' for r in task.rates)}{f' ({faster})' if faster else ''} with the first seed, and took the one of the least validation loss "
               f"for the others too; a star: the best one is at an end. Scores are of test data. Runs of one seed see the same batches, so the difference "
               f"from full fine-tuning's loss is taken seed by seed. Spectra are the first seed's. The base model's loss is {base['task']['loss']:.3f}, its accuracy "
               f"{base['task']['accuracy']:.3f}, its ECE {base['task']['ece']:.3f}. The table begins with the least loss, which tells methods apart where so few "
               f"examples leave accuracies within their spread. "
               f"Forgetting is {FORGOT[task.objective]}. Time is that of a step over one of full fine-tuning, the least of each, in turn on the same machine"
               f"{'' if context.setting.tasks[costed[name]] is task else f'; it and FLOPs are of steps on {costed[name]}'}. "
               "A mask that picks single weights keeps optimiser state for the leaves that it picks from: read what trains as what changed.")  # fmt: skip
        blocks = [how, _scatter(task, table, base), page.table(table, COLUMNS, f"{task.line}: click a heading to sort by it.", sortable=True)]
        if lost:
            blocks.append(f"Diverged at every rate or seed: {', '.join(lost)}.")
        sections.append((task.line, blocks))
    return "The atlas of methods", "Every way to adapt a network, on the same base, data and compute", sections
