"""The page: every figure and table is drawn from the parts, and a part that is missing leaves its section out."""

import numpy as np

from experiments.mechanisms.settings import CONTROL, LABELS
from experiments.study import band, spread
from ft_jax.analysis import report as page

GREY = page.PALETTE[4]
TESTS = {"tuned_clean": "count b, C_Te = 0", "tuned_spurious": "count b, C_Te = 1", "pretrained": "count a", "alias": "count a, other token"}
GREEK = {"medium": "η_M", "small": "η_S"}


def build(context):
    """(title, subtitle, sections) for `page.page`."""
    s = context.setting
    subtitle = (f"A {s.counting.layers}-layer decoder that learnt to count letters, and one that learnt regression in context, "
                "fine-tuned, opened and brought back (arXiv:2311.12786, arXiv:2309.10105).")  # fmt: skip
    made = [fn(context) for fn in (_setup, _tuning, _probing, _pruning, _reverting, _in_context, _forgetting, _conjugating, _spectra, _grafts)]
    return "Erased or wrapped?", subtitle, [x for x in made if x]


def value(context, name):
    return context.get(name.replace(" ", "_"))


def priors(context, part):
    """{prior: value of ``part_PRIOR``} of those that are done."""
    found = {p: value(context, f"{part}_{p}") for p in context.setting.counting.priors}
    return {p: v for p, v in found.items() if v}


def curves(rows, test, **chosen):
    """``(steps, [seeds][steps])`` of a test over the rows that fit ``chosen``."""
    found = [r for r in rows if all(r[k] == v for k, v in chosen.items())]
    if not found:
        return [], []
    steps = [int(step) for step in found[0]["curve"]]
    return steps, [[at[test] if isinstance(at, dict) else at for at in r["curve"].values()] for r in found]


def percent(values):
    return 100 * np.asarray(values, float)


def ends(rows, test, **chosen):
    """The last value of each seed's curve."""
    return [ys[-1] for ys in curves(rows, test, **chosen)[1]]


def _setup(context):
    s, rows = context.setting.counting, []
    for prior in (*s.priors, CONTROL):
        found = value(context, f"pretrain_{prior}")
        if found:
            rows.append({"model": LABELS[prior], "prior": " / ".join(f"{p:g}" for p in found["prior"]),
                         **{t: spread([seed[t] for seed in found["seeds"].values()]) for t in TESTS}})  # fmt: skip
    if not rows:
        return None
    said = (f"Each row is `family operand : text = answer`: {s.length} letters cut from sentences of the paper's grammar, their counts of a and b "
            f"spread out as the paper does for its fine-tuning data. Families here: {', '.join(s.families)}. The spurious attribute is "
            "count(b) − count(a) = 1, and a model that reads b's count off a's is wrong on every row without it (C_Te = 0). "
            f"AdamW, cosine, {s.steps} steps of {s.batch} rows from scratch, {s.tune_steps} to fine-tune at η_M = {s.rates['medium']:g} and "
            f"η_S = {s.rates['small']:g}. Seeds: {len(s.seeds)}.")  # fmt: skip
    columns = [("model", "pretrained model"), ("prior", "asked of a / b / c"), *((k, v) for k, v in TESTS.items())]
    return ("Pretrained models", [said, page.table(rows, columns, "Accuracy before fine-tuning.")])


def _runs(context):
    """The (rate, correlation) pairs with a colour and a line style: colour by correlation, dashes for the small rate."""
    table, s = [], context.setting.counting
    for rate, dash in (("medium", "-"), ("small", "--")):
        for c in s.correlations.get(rate, ()):
            colour = page.PALETTE[{0.0: 0, 0.5: 3, 0.8: 2, 1.0: 1}.get(c, 5)]
            table.append((rate, c, {"color": colour, "ls": dash, "label": f"C_Tr = {c:g}, {GREEK[rate]}"}))
    return table


def _tuning(context):
    found = priors(context, "tune")
    if not found:
        return None
    tests = ("tuned_clean", "tuned_spurious", "pretrained", "alias")
    fig, axes = page.new_figure(7.4, 2.0 * len(found) + 0.6, len(found), len(tests), squeeze=False, sharex=True, sharey=True)
    for line, (prior, v) in zip(axes, found.items(), strict=True):
        before = value(context, f"pretrain_{prior}")["seeds"].values()
        for ax, test in zip(line, tests, strict=True):
            for rate, c, look in _runs(context):
                steps, ys = curves(v["rows"], test, rate=rate, correlation=c)
                start = [[b[test]] for b in before]
                band(ax, [0, *steps], percent(np.hstack([start, ys])), **look)
            ax.set_ylim(-3, 103)
            ax.set_title(TESTS[test], fontsize=8.5)
        line[0].set_ylabel(f"{LABELS[prior]}\naccuracy (%)")
    for ax in axes[-1]:
        ax.set_xlabel("fine-tuning step")
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, handlelength=3)
    return ("Fine-tuning to count b", [page.figure(
        fig, "Accuracy during fine-tuning on `count b`. C_Tr is the share of fine-tuning rows with the spurious attribute; bands span the "
        "seeds. The last column asks for a's count by a family token that fine-tuning never shows.")])  # fmt: skip


def _probing(context):
    found = priors(context, "probe")
    if not found:
        return None
    control = value(context, f"probe_{CONTROL}")
    fig, axes = page.new_figure(6.8, 2.1 * len(found) + 0.6, len(found), 2, squeeze=False, sharex=True, sharey=True)
    for line, (prior, v) in zip(axes, found.items(), strict=True):
        for ax, count, name in zip(line, ("pretrained", "tuned"), ("count of a, asked for a", "count of b, asked for b"), strict=True):
            for kind, look in _probed(context, v, control):
                ys = [r[count] for r in kind]
                band(ax, range(len(ys[0])), percent(ys), **look)
            ax.set_title(name, fontsize=8.5)
            ax.set_xticks(range(len(ys[0])), ["embed", *(f"B{i + 1}" for i in range(len(ys[0]) - 1))])
        line[0].set_ylabel(f"{LABELS[prior]}\nprobe accuracy (%)")
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return ("What a linear probe still reads", [page.figure(
        fig, "Held-out accuracy of linear probes on the residual stream where the answer is asked for, after each block. The control is a "
        "model that was never asked to count a; the unlearnt one was trained to answer with b's count.")])  # fmt: skip


def _probed(context, v, control):
    rows = v["rows"]
    yield [r for r in rows if r["model"] == "pretrained"], {"color": "black", "label": "pretrained"}
    for rate, c, look in _runs(context):
        if c in (0.0, 1.0):
            yield [r for r in rows if r["rate"] == rate and r["correlation"] == c], look
    yield [r for r in rows if r["model"] == "unlearnt"], {"color": page.PALETTE[3], "label": "unlearnt"}
    if control:
        yield control["rows"], {"color": GREY, "label": "control", "ls": ":"}


def _pruning(context):
    found = priors(context, "prune")
    if not found:
        return None
    prior, v = next(iter(found.items()))
    kinds = [(r, c) for r in GREEK for c in (0.0, 1.0) if curves(v["rows"], "pretrained", rate=r, correlation=c)[0]]
    fig, axes = page.new_figure(7.2, 4.0, 2, len(kinds), squeeze=False, sharex=True, sharey=True)
    for column, (rate, c) in zip(axes.T, kinds, strict=True):
        for ax, test in zip(column, ("pretrained", "tuned_spurious" if c else "tuned_clean"), strict=True):
            for score, colour in zip(("first-order", "movement", "random"), (page.PALETTE[0], page.PALETTE[2], GREY), strict=True):
                steps, ys = curves(v["rows"], test, rate=rate, correlation=c, score=score)
                band(ax, steps, percent(ys), color=colour, label=score)
            ax.set_ylim(-3, 103)
        column[0].set_title(f"C_Tr = {c:g}, {GREEK[rate]}", fontsize=8.5)
        column[1].set_xlabel("neurons pruned")
    for ax, name in zip(axes[:, 0], ("count a", "count b"), strict=True):
        ax.set_ylabel(f"{name}\naccuracy (%)")
    axes[0][0].legend(fontsize=7.5)
    return ("Pruning to revive", [page.figure(
        fig, f"{LABELS[prior].capitalize()}: accuracy on the pretrained task (top) and on the fine-tuned one (bottom; C_Te = C_Tr) by the "
        f"number of neurons pruned of {v['neurons']:,}. First-order: largest Σ θ ∂L/∂θ of the loss of counting a, the paper's score; "
        "movement: largest growth away from zero, which needs no data; random: the control.")])  # fmt: skip


def _reverting(context):
    found, control = priors(context, "revert"), value(context, f"revert_{CONTROL}")
    if not found or not control:
        return None
    fig, axes = page.new_figure(6.8, 2.9, 1, len(found), squeeze=False, sharey=True)
    looks = {"C=0": (page.PALETTE[0], "reFT, C_Tr = 0"), "C=1": (page.PALETTE[1], "reFT, C_Tr = 1"),
             "unlearnt": (page.PALETTE[3], "reFT, unlearnt"), "Scr. + FT": (GREY, "Scr. + FT"), "from scratch": ("black", "from scratch")}  # fmt: skip
    for ax, (prior, v) in zip(axes[0], found.items(), strict=True):
        for start, (colour, label) in looks.items():
            steps, ys = curves([*v["rows"], *control["rows"]], None, start=start)
            band(ax, steps, percent(ys), color=colour, label=label)
        ax.set_title(LABELS[prior], fontsize=8.5)
        ax.set_xlabel("step of reverse fine-tuning")
    axes[0][0].set_ylabel("accuracy of count a (%)")
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    rate = context.setting.counting.revert_rate
    return ("Reverse fine-tuning", [page.figure(
        fig, f"Accuracy of counting a while it is trained again at {rate:g}: from models fine-tuned to count b, from models trained to give a "
        "wrong count, from a model pretrained without counting a (Scr. + FT), and from random weights.")])  # fmt: skip


def _in_context(context):
    v = context.get("icl_pretrain")
    if not v:
        return None
    tuned = context.get("icl_tune")
    fig, axes = page.new_figure(6.8, 2.9, 1, 2)
    for ax, branch in zip(axes, ("discrete", "continuous"), strict=True):
        seen = range(context.setting.regression.pairs)
        band(ax, seen, [e[branch] for e in v["seeds"].values()], color=page.PALETTE[0], label="pretrained")
        if tuned:
            band(ax, seen, [list(e.values())[-1][branch] for e in tuned["seeds"].values()], color=page.PALETTE[1], label="fine-tuned")
        for (name, errors), dash in zip(v["optimal"].items(), (":", "--", "-"), strict=True):
            ax.plot(seen, errors[branch], color=GREY, ls=dash, label=f"optimal, {name}")
        ax.set_title(f"{branch} prompts", fontsize=8.5)
        ax.set_xlabel("pairs seen")
        ax.set_ylim(0, None)
    axes[0].set_ylabel("squared error")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    s = context.setting.regression
    said = (f"Prompts of {s.pairs} pairs in {s.dimension} dimensions, noise σ = {s.noise:g}; the task is one of {s.tasks} fixed vectors with "
            f"probability {s.share:g}, else Gaussian. Pretrained for {s.steps} steps on the mixture, fine-tuned for {s.tune_steps} on the fixed "
            "vectors alone. Errors are against w·x, without the noise.")  # fmt: skip
    return ("Regression in context", [said, page.figure(
        fig, "Squared error by the number of pairs seen, against the closed-form Bayes estimators of both branches and of the mixture.")])  # fmt: skip


def _forgetting(context):
    v, near = context.get("icl_tune"), context.get("icl_near")
    if not v or not near:
        return None
    fig, (left, right) = page.new_figure(6.8, 2.9, 1, 2)
    for branch, colour in (("discrete", page.PALETTE[0]), ("continuous", page.PALETTE[1])):
        steps = [int(t) for t in next(iter(v["seeds"].values()))]
        band(left, steps, [[np.mean(e[branch]) for e in seed.values()] for seed in v["seeds"].values()], color=colour, label=f"{branch} prompts")
    left.set_xlabel("fine-tuning step")
    left.set_ylabel("squared error, mean over places")
    left.legend(fontsize=8)
    rose = [np.subtract(seed["tuned"], seed["pretrained"]) for seed in near["seeds"].values()]
    base = [seed["pretrained"] for seed in near["seeds"].values()]
    band(right, near["distances"], rose, color=page.PALETTE[1], label="rise")
    band(right, near["distances"], np.divide(rose, base), color=page.PALETTE[3], label="rise / pretrained error")
    right.axhline(0, color=GREY, lw=0.8)
    right.set_xlabel("distance to the nearest discrete task")
    right.set_ylabel("rise of the error by fine-tuning")
    right.legend(fontsize=8)
    return ("What is forgotten, and where", [page.figure(
        fig, "Left: the trade-off during fine-tuning on the discrete branch. Right: how much the error rises on continuous tasks, by their "
        "distance from the nearest discrete one.")])  # fmt: skip


def _conjugating(context):
    v, optimal = context.get("icl_conjugate"), context.get("icl_pretrain")
    if not v or not optimal:
        return None
    fig, (left, right) = page.new_figure(6.8, 2.9, 1, 2)
    looks = {"tuned": ("fine-tuned", page.PALETTE[1]), "shrunk": ("fine-tuned, answer / γ alone", page.PALETTE[3]),
             "pretrained": ("pretrained", page.PALETTE[0])}  # fmt: skip
    for model, (label, colour) in looks.items():
        ys = [np.mean(seed[model]["continuous"], axis=1) for seed in v["seeds"].values()]
        band(left, v["factors"], ys, color=colour, label=label)
    left.axhline(np.mean(optimal["optimal"]["ridge"]["continuous"]), color=GREY, ls="--", label="ridge")
    left.set_xlabel("label scale γ")
    left.set_ylabel("squared error, mean over places")
    left.legend(fontsize=8)
    best, seen = best_factor(v), range(context.setting.regression.pairs)
    looks = {("tuned", 1.0): page.PALETTE[1], ("tuned", best): page.PALETTE[2], ("pretrained", 1.0): page.PALETTE[0]}
    for (model, factor), colour in looks.items():
        ys = [seed[model]["continuous"][v["factors"].index(factor)] for seed in v["seeds"].values()]
        band(right, seen, ys, color=colour, label=f"fine-tuned, γ = {factor:g}" if model == "tuned" else model)
    right.plot(seen, optimal["optimal"]["ridge"]["continuous"], color=GREY, ls="--", label="ridge")
    right.set_xlabel("pairs seen")
    right.legend(fontsize=8)
    return ("Conjugate prompting", [page.figure(
        fig, "Continuous prompts with their labels times γ and the answer divided by γ. Left: by γ, with the control that only divides the answer. Right: by the number of pairs seen, without "
        "and at the γ that is best on the mean of the seeds.")])  # fmt: skip


def best_factor(v):
    """The γ with the lowest mean error of the fine-tuned models on continuous prompts."""
    means = np.mean([np.mean(seed["tuned"]["continuous"], axis=1) for seed in v["seeds"].values()], axis=0)
    return v["factors"][int(np.argmin(means))]


SPECTRA = {  # part: (its scores, its caption)
    "spectra": ({"tuned_spurious": "count b, C_Te = 1", "tuned_clean": "C_Te = 0", "pretrained": "count a"},
                "Counting, low prior, after fine-tuning at η_M (LoRA at its own rate)."),
    "icl_spectra": ({"discrete": "error, discrete", "continuous": "error, continuous"},
                    "Regression in context, after fine-tuning on the discrete branch."),
}  # fmt: skip
SEEN = {"intruders": "intruders", "lowest_cosine": "lowest cosine", "effective_rank": "effective rank", "delta_norm": "‖ΔW‖/‖W₀‖"}


def _spectra(context):
    blocks = []
    for name, (scores, caption) in SPECTRA.items():
        rows, by = (context.get(name) or {"rows": []})["rows"], {}
        for r in rows:
            by.setdefault((r["method"], r.get("correlation")), []).append(r)
        shown = [{"method": method, "c": c, **{k: spread([r[k] for r in found], ".2f") for k in (*scores, *SEEN)}}
                 for (method, c), found in by.items()]  # fmt: skip
        columns = [("method", "method"), *([("c", "C_Tr", "g")] if name == "spectra" else []), *scores.items(), *SEEN.items()]
        if rows:
            said = f"Intruders: of the top 10 directions of each of {rows[0]['matrices']} matrices, ε = 0.5; lowest cosine: mean over matrices."
            blocks.append(page.table(shown, columns, f"{caption} {said}"))
    return ("The intruder view", blocks) if blocks else None


def _grafts(context):
    found, icl = priors(context, "graft"), context.get("icl_graft")
    if not found or not icl:
        return None
    prior, v = next(iter(found.items()))
    fig, axes = page.new_figure(7.2, 3.0, 1, 3)
    wrapped = [r for r in v["rows"] if r["correlation"] == 1.0 and r["rate"] == "medium"]
    counted = {"tuned_spurious": ("count b, C_Te = 1", page.PALETTE[1]), "pretrained": ("count a", page.PALETTE[0])}
    _sweep(axes[0], wrapped, counted, "kept", "tuned", percent)
    _sweep(axes[1], wrapped, counted, "removed", "base", percent)
    alone = {"discrete": ("discrete, graft alone", page.PALETTE[1]), "continuous": ("continuous, graft alone", page.PALETTE[0])}
    _sweep(axes[2], icl["rows"], alone, "kept", None, np.asarray)
    _sweep(axes[2], icl["rows"], {"continuous": ("continuous, without it", page.PALETTE[2])}, "removed", None, np.asarray)
    for ax, name in zip(axes, ("graft alone, on the base", "fine-tuned, without the graft", "regression"), strict=True):
        ax.set_xscale("log")
        ax.set_title(name, fontsize=8.5)
        ax.set_xlabel("share of parameters")
        ax.legend(fontsize=7)
    axes[0].set_ylabel("accuracy (%)")
    axes[2].set_ylabel("squared error")
    return ("How few parameters are the wrapper", [page.figure(
        fig, f"Magnitude grafts. Left and middle: {LABELS[prior]}, C_Tr = 1, η_M: the share of parameters that changed most, put on the "
        "pretrained model, and taken out of the fine-tuned one; dashed where everything is grafted or removed. Right: the same for the "
        "regression models.")])  # fmt: skip


def _sweep(ax, rows, looks, which, limit, scale):
    for test, (label, colour) in looks.items():
        shares = [c["share"] for c in rows[0]["curve"]]
        band(ax, shares, scale([[c[which][test] for c in r["curve"]] for r in rows]), color=colour, label=label)
        if limit:
            ax.axhline(scale(np.mean([r[limit][test] for r in rows])), color=colour, lw=0.8, ls="--")
