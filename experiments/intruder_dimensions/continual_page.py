"""The sequence of tasks on the page: forgetting matrices, curves, the table of transfers, the claims."""

import numpy as np

from experiments.study import Missing, band, spread
from ft_jax.analysis import continual
from ft_jax.analysis import report as page

EPS = "0.5"
PRETRAINING = {"contrastive": "contrastive loss", "pseudo_loss": "masked pseudo-loss"}
ORDER = "Low ranks forget most over a sequence of tasks, full fine-tuning least"
GROWTH = "Low-rank adapters that are merged one after the other accumulate intruders; full fine-tuning does not"
FIGURE = "a figure, without numbers in the text"
UNMEASURED = np.nan
HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "cannot be tested here"
LEAST = 3  # seeds, under which "with every seed" says little


def label(method):
    return "full" if method == "full" else f"LoRA r = {method.removeprefix('lora_r')}"


def done(s, context):
    """``{method: [value a seed]}`` of the parts that are there, in the setting's order."""
    found = {m: [context.get(f"continual_{m}_s{seed}") for seed in s.seeds] for m in s.methods}
    found = {m: [v for v in values if v is not None] for m, values in found.items()}
    return {m: values for m, values in found.items() if values}


def matrices(values):
    """``[seeds, T, T]`` accuracies, NaN where a task was not tested."""
    return np.array([[[UNMEASURED if x is None else x for x in row] for row in v["matrix"]] for v in values], float)


def transfers(values, start):
    """{measure: [one number a seed]}."""
    found = [continual.summary(r, start) for r in matrices(values)]
    return {name: [f[name] for f in found] for name in found[0]}


def sections(s, context):
    base, runs = context.get("continual_base"), done(s, context)
    if base is None or not runs:
        return []
    names = base["tasks"]
    rows = {m: transfers(values, base["start"]) for m, values in runs.items()}
    blocks = [_opening(s, base), _said(rows, base), _table(rows, runs, base, s), _maps(runs, base), _curves(runs, base, s), _reading(s)]
    return [(f"{len(names)} tasks in sequence", blocks)]


def _opening(s, base):
    chain = " → ".join(f"{n} ({c} classes)" for n, c in zip(base["tasks"], base["classes"], strict=True))
    return (f"{chain}: each task is learnt for {s.steps} steps of {s.batch_size} texts from what the task before left; the adapter is "
            "merged and a new one begins at zero. While a task is learnt its head is frozen: logistic regression on the embeddings that the "
            f"current weights give {s.head_texts} training texts. Before every test the head is retrained, on the embeddings of "
            f"{s.test_texts} held-out texts, each tested by a head fitted to the other folds, so that a drop is what the layers lost. "
            f"{len(s.seeds)} seed{'s' * (len(s.seeds) > 1)} for the order of the texts and the adapters; the order of the tasks and the test texts stay.")  # fmt: skip


def _said(rows, base):
    if len(base["tasks"]) < 2:
        return "One task alone: there is nothing to forget yet."
    mean = {m: float(np.mean(r["backward_transfer"])) for m, r in rows.items()}
    worst, best = min(mean, key=mean.get), max(mean, key=mean.get)
    said = (f"{label(worst)} keeps least of the earlier tasks: {100 * mean[worst]:+.1f} points of accuracy from just after a task to the end of "
            f"the sequence, mean over tasks and seeds; {label(best)} keeps most ({100 * mean[best]:+.1f}).")  # fmt: skip
    low = [m for m, r in rows.items() if np.mean(r["average_accuracy"]) < np.mean(base["start"])]
    if low:
        said += (f" After the whole sequence the average accuracy of {', '.join(map(label, low))} is below that of the base model, which has "
                 f"learnt no task ({100 * np.mean(base['start']):.1f} %).")  # fmt: skip
    return said


def _table(rows, runs, base, s):
    def points(values):
        values = [v for v in values if v is not None]
        return spread([100 * v for v in values], "+.1f").replace("± +", "± ") if values else "–"

    shown = [{"run": "base, no task learnt", "acc": f"{100 * np.mean(base['start']):.1f}", "loss": f"{base['pretraining']:.3f}", "n": "0"}]
    for method, r in rows.items():
        last = [v["stages"][-1] for v in runs[method]]
        shown.append({"run": label(method), "acc": spread([100 * v for v in r["average_accuracy"]], ".1f"), "bwt": points(r["backward_transfer"]),
                      "forgot": points(r["forgetting"]), "fwt": points(r["forward_transfer"]),
                      "n": spread([x["intruders"][EPS] for x in last], ".1f"), "norm": spread([x["delta_norm"] for x in last], ".2f"),
                      "loss": spread([x["pretraining"] for x in last])})  # fmt: skip
    columns = [("run", "run"), ("acc", "average accuracy (%)"), ("bwt", "backward transfer (points)"), ("forgot", "forgetting, max − final (points)"),
               ("fwt", "forward transfer (points)"), ("n", f"intruders (k = 10, ε = {EPS})"), ("norm", "‖ΔW‖"),
               ("loss", PRETRAINING[s.forgetting["measure"]])]  # fmt: skip
    caption = f"After all {len(base['tasks'])} tasks; mean ± standard deviation over seeds. Forward transfer: a task's accuracy just before it is learnt, against the base model's."
    return page.table(shown, columns, caption)


def _maps(runs, base):
    """Rows: after each task; columns: the task tested. The number is the accuracy, the colour what was lost since the task was learnt."""
    names, count = base["tasks"], len(runs)
    columns = min(2, count)
    lines = -(-count // columns)
    fig, axes = page.new_figure(6.9, 0.9 + lines * (0.32 * len(names) + 0.75), lines, columns, squeeze=False)
    means = {m: np.concatenate([[base["start"]], matrices(values).mean(0)]) for m, values in runs.items()}
    lost = {m: np.array([[r[j + 1, j] - r[i, j] if i > j else 0.0 if not np.isnan(r[i, j]) else UNMEASURED for j in range(len(names))]
                         for i in range(len(r))]) for m, r in means.items()}  # fmt: skip
    top = max(1.0, 100 * max(np.nanmax(x) for x in lost.values()))
    for at, (ax, method) in enumerate(zip(axes.flat, runs)):
        page.heatmap(ax, 100 * np.clip(lost[method], 0, None), x=[short(n) for n in names], vmax=top,
                     y=["base", *(f"{i + 1}. {short(n)}" for i, n in enumerate(names))] if at % columns == 0 else [""] * (len(names) + 1),
                     label="points lost" if at % columns == columns - 1 else "")  # fmt: skip
        for (i, j), value in np.ndenumerate(means[method]):
            if not np.isnan(value):
                ax.text(j + 0.5, i + 0.5, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, weight="bold" if i == j + 1 else "normal")
        ax.set_title(label(method))
        ax.tick_params(axis="x", labelrotation=30)
    for ax in list(axes.flat)[count:]:
        ax.set_axis_off()
    for ax in axes[:, 0]:
        ax.set_ylabel("after")
    return page.figure(fig, "Forgetting matrices: accuracy (%) on each task (columns) after each task of the sequence (rows), mean over seeds; "
                       "bold: just after it was learnt; above the bold ones: before it was learnt. Colour: points lost since then.")  # fmt: skip


def short(name):
    return name.removeprefix("vader_").replace("rotten_tomatoes", "snippets")


def _curves(runs, base, s):
    steps = np.arange(1, len(base["tasks"]) + 1)
    fig, axes = page.new_figure(6.9, 2.5, 1, 3)
    axes[0].plot(steps, [100 * np.mean(base["start"][:k]) for k in steps], "--", color="#8c8577", lw=0.9, label="base")
    axes[2].axhline(base["pretraining"], ls="--", color="#8c8577", lw=0.9)
    for method, values in runs.items():
        band(axes[0], steps, [100 * continual.average_accuracy(r) for r in matrices(values)], label=label(method))
        band(axes[1], steps, [[stage["intruders"][EPS] for stage in v["stages"]] for v in values])
        band(axes[2], steps, [[stage["pretraining"] for stage in v["stages"]] for v in values])
    of_all = next(iter(runs.values()))[0]["stages"][0]["matrices"]
    for ax, name in zip(axes, ("average accuracy on\ntasks so far (%)", f"intruders in the top 10\nof {of_all} matrices", PRETRAINING[s.forgetting["measure"]] + " (nats)"), strict=True):
        ax.set_ylabel(name)
        ax.set_xlabel("tasks learnt")
        ax.set_xticks(steps)
    fig.legend(loc="outside lower center", ncols=len(runs) + 1)
    return page.figure(fig, f"After each task: accuracy averaged over the tasks so far, intruders against the weights before any task (ε = {EPS}), and the "
                       "pre-training objective on texts of no task. Lines are means, bands the least and largest of the seeds.")  # fmt: skip


def _reading(s):
    return ("Backward transfer is a task's accuracy at the end less that just after it was learnt; forgetting takes the best accuracy before the "
            "end instead of the latter, and the best of several noisy numbers is too high, so that it is above zero even where nothing is lost. "
            f"A score on {s.test_texts} texts has a standard error of up to {100 * 0.5 / s.test_texts**0.5:.1f} points, but the texts are the same "
            "before and after, for all methods and seeds: the spread over seeds does not hold the luck of that choice of texts.")  # fmt: skip


def claims(s, context):
    """Rows {claim, paper, ours, verdict, why}; ``why`` is the rule by which the verdict falls."""
    base, runs = context.value("continual_base"), done(s, context)
    if "full" not in runs or len(runs) < 2:
        raise Missing("full fine-tuning and one rank of LoRA have to be done")
    low = min((m for m in runs if m != "full"), key=lambda m: int(m.removeprefix("lora_r")))
    return [_order(runs, base, low), _growth(runs, low, s)]


def _verdict(holds, fails, seeds):
    return UNDECIDED if seeds < LEAST else HOLDS if holds else FAILS if fails else UNDECIDED


def _order(runs, base, low):
    drops = {m: [-100 * v for v in transfers(values, base["start"])["backward_transfer"]] for m, values in runs.items()}
    mean = {m: np.mean(v) for m, v in drops.items()}
    gap = np.array(drops[low]) - np.array(drops["full"])
    ends = max(mean, key=mean.get) == low and min(mean, key=mean.get) == "full"
    verdict = _verdict(ends and (gap > 0).all(), (gap < 0).all(), len(gap))
    ours = "; ".join(f"{label(m)} {spread(v, '.1f')}" for m, v in drops.items()) + " points lost"
    why = (f"Points of accuracy from just after a task to the end of {len(base['tasks'])} tasks, head retrained. Holds if {label(low)} loses most and full "
           f"least in the mean, and {label(low)} more than full with every seed; does not if less with every seed; "
           f"between these, or with under {LEAST} seeds, it cannot be told. "
           f"{label(low)} less full: {spread(list(gap), '+.1f').replace('± +', '± ')} points.")  # fmt: skip
    return {"claim": ORDER, "paper": FIGURE, "ours": ours, "verdict": verdict, "why": why}


def _growth(runs, low, s):
    counts = {m: np.array([[stage["intruders"][EPS] for stage in v["stages"]] for v in runs[m]], float) for m in (low, "full")}
    grows, still = (counts[low][:, -1] > counts[low][:, 0]).all(), (counts["full"][:, -1] < counts[low][:, -1]).all()
    verdict = _verdict(grows and still, not (counts[low][:, -1] > counts[low][:, 0]).any(), len(counts[low]))
    ours = "; ".join(f"{label(m)} {c[:, 0].mean():.1f} after the first task, {c[:, -1].mean():.1f} after the last" for m, c in counts.items())
    why = (f"Intruders (k = 10, ε = {EPS}) against the weights before any task, mean of {len(s.seeds)} seeds. Holds if those of {label(low)} grow "
           "from the first to the last task with every seed and end above those of full; does not if they grow with none; "
           f"between these, or with under {LEAST} seeds, it cannot be told.")  # fmt: skip
    return {"claim": GROWTH, "paper": FIGURE, "ours": ours, "verdict": verdict, "why": why}
