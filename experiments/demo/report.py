"""``summary.json`` -> one self-contained page. Every number on the page is read from the summary."""

import numpy as np

from ft_jax.analysis import report as page

LABELS = {"base": "base", "full": "full", "lora_r1": "LoRA r = 1", "lora_r8": "LoRA r = 8", "lora_r64": "LoRA r = 64"}
KINDS = {
    "attn/q": "query", "attn/k": "key", "attn/v": "value", "attn/out": "attention out",
    "mlp/gate": "MLP gate", "mlp/up": "MLP up", "mlp/down": "MLP down",
}  # fmt: skip


def percent(x, digits=1):
    return f"{100 * x:.{digits}f} %"


def tuned_runs(summary):
    return [name for name in summary["runs"]]


def fine_tuning(summary):
    task = summary["task"]
    rows = [{"run": "base", **flat(summary["scores"]["base"])}]
    for name, run in summary["runs"].items():
        rows.append({"run": LABELS[name], "lr": run["learning_rate"], "params": run["trainable_parameters"],
                     "rate": run["steps_per_second"], **flat(summary["scores"][name])})  # fmt: skip
    columns = [("run", "run"), ("lr", "learning rate", ".1e"), ("params", "trained"), ("accuracy", task["metric"], ".1%"),
               ("ood", "other domain", ".1%"), ("loss", "loss (nats)", ".3f"), ("ece", "ECE", ".1%"),
               ("rate", "steps/s", ".2f")]  # fmt: skip
    if not any("ood" in row for row in rows):
        columns = [c for c in columns if c[0] != "ood"]
    if any("choice" in row for row in rows):
        columns.insert(4, ("choice", "answer accuracy", ".1%"))
    scores = summary["scores"]
    names = tuned_runs(summary)
    gain = {n: scores[n]["test"]["accuracy"] - scores["base"]["test"]["accuracy"] for n in names}
    best = max(gain, key=gain.get)
    error = summary["task"]["standard_error"]
    spread = max(gain.values()) - min(gain.values())
    said = (f"{LABELS[best]} gains most over the base model: {100 * gain[best]:+.1f} points of {task['metric']}, where the "
            f"standard error of one score is {100 * error:.1f} points. The four runs lie {100 * spread:.1f} points apart, "
            + ("within what the test set can tell." if spread < 2.8 * error else "more than the test set's noise explains."))  # fmt: skip
    return ("Fine-tuning", [said, page.table(rows, columns, f"Scores on {task['test_name']}, {task['count']:,} {task['unit']}"
                            + (f"; other domain: {task['ood_name']}." if task.get("ood_name") else "."))])  # fmt: skip


def flat(score):
    out = dict(score["test"])
    if "ood" in score:
        out["ood"] = score["ood"]["accuracy"]
    if "choice" in score:
        out["choice"] = score["choice"]
    return out


def intruders(summary):
    names, eps = tuned_runs(summary), str(summary["eps"])
    total = {n: summary["spectra"][n]["total"] for n in names}
    rows = [{"run": LABELS[n], "n": total[n]["by_eps"][eps], "erank": total[n]["effective_rank"], "norm": total[n]["delta_norm"],
             "relative": total[n]["delta_norm_relative"], "lowest": min(r["lowest_cosine"] for r in summary["spectra"][n]["rows"])}
            for n in names]  # fmt: skip
    columns = [("run", "run"), ("n", f"intruders (k = {summary['k']}, ε = {eps})"), ("erank", "effective rank of ΔW", ".1f"),
               ("norm", "‖ΔW‖, all matrices", ".2f"), ("relative", "‖ΔW‖/‖W‖, mean", ".1%"),
               ("lowest", "lowest cosine", ".2f")]  # fmt: skip
    full, lora = total["full"], {n: total[n] for n in names if n != "full"}
    most = max(lora, key=lambda n: lora[n]["intruders"])
    at_most = summary["k"] * full["matrices"]
    if lora[most]["intruders"] > full["intruders"]:
        first = (f"{LABELS[most]} put {lora[most]['intruders']} new singular vectors among the top {summary['k']} of the "
                 f"{full['matrices']} matrices ({at_most} at most), full fine-tuning {full['intruders']}.")  # fmt: skip
    else:
        first = (f"No LoRA run shows more intruders than full fine-tuning ({full['intruders']}): at these learning rates and "
                 f"{summary['steps']} steps no update is large enough to reach the top {summary['k']} singular values.")  # fmt: skip
    second = (f"The change itself differs more than its size: the effective rank of ΔW is {full['effective_rank']:.0f} for full "
              "fine-tuning and " + ", ".join(f"{v['effective_rank']:.1f} for {LABELS[n]}" for n, v in lora.items()) + ".")  # fmt: skip
    sweep = page.figure(sweep_figure(summary), f"Intruder dimensions by threshold, summed over {full['matrices']} matrices; one seed. Runs without any lie on one line.")
    return ("Intruder dimensions", [f"{first} {second}", page.table(rows, columns), sweep, why(summary), per_matrix(summary)])


def sweep_figure(summary):
    """Intruders by threshold, one line a run."""
    fig, ax = page.new_figure(5.6, 2.8)
    for name in tuned_runs(summary):
        by_eps = summary["spectra"][name]["total"]["by_eps"]
        ax.plot([float(e) for e in by_eps], list(by_eps.values()), marker="o", label=LABELS[name])
    ax.set_xlabel("threshold ε on the largest cosine with a base direction")
    ax.set_ylabel(f"intruders in the top {summary['k']}")
    ax.legend()
    return fig


def why(summary):
    if summary["lr_scale"] == 1:
        return "Learning rates are the paper's own."
    return (f"Learning rates are the paper's (full 1e-5, LoRA α · lr = 2.4e-3) times {summary['lr_scale']:g} for every run, because "
            f"{summary['steps']} steps replace its tens of thousands: Adam moves a weight by about the learning rate a step, so the "
            "distance travelled is what carries over, and the ratio between the runs stays the paper's.")  # fmt: skip


def grid_of(summary, name, key):
    rows = summary["spectra"][name]["rows"]
    kinds = [k for k in KINDS if any(r["path"] == k for r in rows)]
    layers = sorted({r["layer"] for r in rows})
    cell = {(r["path"], r["layer"]): r[key] for r in rows}
    return kinds, layers, np.array([[cell[k, i] for i in layers] for k in kinds], float)


def per_matrix(summary):
    names = tuned_runs(summary)
    blocks = []
    for key, label, caption in (
        ("intruders", "intruders", f"Intruders per matrix (k = {summary['k']}, ε = {summary['eps']})."),
        ("effective_rank", "effective rank of ΔW", "Effective rank of ΔW per matrix."),
        ("delta_norm", "‖ΔW‖", "Frobenius norm of ΔW per matrix."),
    ):
        fig, axes = page.new_figure(6.8, 3.6, 2, 2, sharex=True, sharey=True, squeeze=False)
        grids = {n: grid_of(summary, n, key) for n in names}
        top = max(g[2].max() for g in grids.values()) or 1.0
        for ax, name in zip(axes.flat, names, strict=True):
            kinds, layers, values = grids[name]
            shown = [i if len(layers) <= 12 or i % 5 == 0 else "" for i in layers]
            page.heatmap(ax, values, x=shown, y=[KINDS[k] for k in kinds], label=label, vmax=top if key != "effective_rank" else None)
            ax.set_title(LABELS[name])
        for ax in axes[-1]:
            ax.set_xlabel("layer")
        blocks.append(page.figure(fig, caption))
    return page.details("Per matrix: intruders, effective rank and norm by layer and kind", *blocks)


def similarity(summary):
    chosen = summary["similarity"]
    names, size = list(chosen["maps"]), len(next(iter(chosen["maps"].values())))
    fig, axes = page.new_figure(6.8, 2.2, 1, len(names), squeeze=False)
    ticks = [str(i + 1) if i % 5 == 0 else "" for i in range(size)]
    for ax, name in zip(axes[0], names, strict=True):
        page.heatmap(ax, np.array(chosen["maps"][name]), x=ticks, y=ticks, label="|cosine|" if name == names[-1] else "", vmax=1.0)
        ax.set_title(LABELS[name])
        ax.set_xlabel("tuned direction")
        ax.set_aspect("equal")
    axes[0][0].set_ylabel("base direction")
    where = f"{KINDS[chosen['path']]} matrix of layer {chosen['layer']}"
    diagonal = {n: float(np.diag(np.array(m))[: summary["k"]].mean()) for n, m in chosen["maps"].items()}
    low = min(diagonal, key=diagonal.get)
    said = (f"In the {where}, the matrix with the lowest cosine of all, a bright diagonal means that a top direction of the base model is "
            f"still there and in its place; an empty column is a direction that came from nowhere and moves the later ones down by a place. The mean of the first {summary['k']} "
            f"diagonal entries is {diagonal['full']:.2f} for full fine-tuning and lowest, {diagonal[low]:.2f}, for {LABELS[low]}.")  # fmt: skip
    return ("Singular vectors before and after", [said, page.figure(fig, f"|U₀ᵀU| of the top {size} left singular vectors, {where}.")])


def graft(summary):
    g = summary["graft"]
    base, tuned = g["base"]["accuracy"], g["tuned"]["accuracy"]
    rows = [{**g["base"], "mask": "none: base model", "share": 0.0, "count": 0}]
    rows += [{**p["scores"], "mask": p["mask"], "share": p["share"], "count": p["parameters"], "kept": p["kept"],
              "agree": p["agreement"]} for p in g["points"]]  # fmt: skip
    rows.append({**g["tuned"], "mask": "all: fine-tuned model", "share": 1.0, "count": g["eligible"], "kept": 1.0, "agree": 1.0})
    columns = [("mask", "grafted parameters"), ("share", "share", ".2%"), ("count", "count"), ("accuracy", "accuracy", ".1%"),
               ("kept", "gain kept", ".0%"), ("agree", "agreement", ".1%"), ("ece", "ECE", ".1%")]  # fmt: skip
    fig, ax = page.new_figure(5.6, 2.9)
    for mask in dict.fromkeys(p["mask"] for p in g["points"]):
        points = [p for p in g["points"] if p["mask"] == mask]
        ax.plot([p["share"] for p in points], [100 * p["scores"]["accuracy"] for p in points], marker="o", label=mask)
    for value, label in ((tuned, "fine-tuned"), (base, "base")):
        ax.axhline(100 * value, color="#8c8577", lw=0.8, ls="--")
        ax.annotate(label, (1.0, 100 * value), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    ax.set_xscale("log")
    ax.set_xlabel("share of the layers' parameters that are grafted")
    ax.set_ylabel("accuracy (%)")
    ax.legend()
    smallest = g["smallest"]
    if smallest:
        first = (f"The smallest graft that keeps at least 95 % of the fine-tuned accuracy is {percent(smallest['share'], 2)} of the eligible "
                 f"parameters ({smallest['parameters']:,} of {g['eligible']:,}, {smallest['mask']} mask): {percent(smallest['accuracy'])} against "
                 f"{percent(tuned)} fine-tuned and {percent(base)} base, and it keeps {percent(smallest['kept'], 0)} of the gain itself.")  # fmt: skip
        second = (f"Its calibration error is {percent(smallest['ece'])}, that of the fine-tuned model {percent(g['tuned']['ece'])} and of the "
                  f"base model {percent(g['base']['ece'])}.")  # fmt: skip
    else:
        first = "No graft up to a tenth of the parameters keeps 95 % of the fine-tuned accuracy."
        second = f"The fine-tuned model has {percent(tuned)}, the base model {percent(base)}."
    note = ("Masks are chosen over the full fine-tuning run: the largest changes (magnitude), the same number at random, and a mask learned from "
            "the magnitude mask by gradient steps on training examples, which may grow; it is selected on rows that are not reported on. Accuracy "
            "alone flatters a graft where the base model already scores well, so the share of the gain is given too. The paper's grafts of 0.01 % "
            "come from SGD; AdamW moves every weight by about the same amount, and a change that is spread so evenly takes more of it to carry over.")  # fmt: skip
    return ("The graft", [f"{first} {second}", page.figure(fig, "Accuracy of base weights with a graft of the full fine-tuning run, by size."),
                          page.table(rows, columns), note])  # fmt: skip


def forgetting(summary):
    f = summary["forgetting"]
    rows = [{"run": LABELS[name], **{m: v for m, v in row.items()}} for name, row in f["scores"].items()]
    columns = [("run", "run"), *((m["key"], m["label"], m["format"]) for m in f["measures"])]
    main = f["measures"][0]
    change = {n: row[main["key"]] - f["scores"]["base"][main["key"]] for n, row in f["scores"].items() if n != "base"}
    worst, least = max(change, key=change.get), min(change, key=change.get)
    said = (f"{LABELS[worst]} forgets most: its {main['label']} rises by {change[worst]:.3f} over the base model's "
            f"{f['scores']['base'][main['key']]:.3f}. {LABELS[least][0].upper() + LABELS[least][1:]} forgets least ({change[least]:+.3f}; below zero is better than the base).")  # fmt: skip
    fig, ax = page.new_figure(5.6, 2.4)
    names = list(change)
    counts = [summary["spectra"][n]["total"]["intruders"] for n in names]
    for i, name in enumerate(names):
        ax.plot(counts[i], change[name], "o", label=LABELS[name])
    ax.set_xlabel(f"intruder dimensions (k = {summary['k']}, ε = {summary['eps']})")
    ax.set_ylabel(f"rise of\n{main['label']}")
    ax.legend()
    return ("What was forgotten", [said, f["why"], page.table(rows, columns), page.figure(fig, "Forgetting against intruder dimensions, one point a run; one seed.")])


def build(summary):
    """The page as HTML."""
    made = summary["made"]
    opening = (f"{summary['model_line']} was fine-tuned four times from the same weights, with the same seed, data order and "
               f"{summary['steps']} steps of {summary['batch_size']} {summary['task'].get('batch', 'examples')}: in full, and with LoRA of rank "
               f"{', '.join(str(r) for r in summary['ranks'])} on every linear layer (α = 2r). Then the weights were opened.")  # fmt: skip
    closing = (f"Command: {made['command']}. Seed {made['seed']}, one run each: differences between single runs are not averaged over seeds. "
               f"{made['machine']}. Versions: {made['versions']}. Peak memory while training {made['training_memory_gib']:.2f} GiB, compute {made['compute_seconds']:.0f} s.")  # fmt: skip
    sections = [(None, [opening]), fine_tuning(summary), intruders(summary), similarity(summary), graft(summary), forgetting(summary),
                ("How this was made", [closing])]  # fmt: skip
    return page.page("What fine-tuning did to the weights", sections, subtitle=summary["subtitle"])
