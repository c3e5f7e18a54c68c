"""The figures of the page: counts over ε, rank, k, learning rate and data; similarity; forgetting; the intervention."""

import numpy as np
from matplotlib.ticker import NullFormatter

from experiments.intruder_dimensions import analyse, measuring
from experiments.study import band
from ft_jax.analysis import report as page

EDITS = {("none", "top"): "top intruder", ("neighbour", "top"): "neighbouring pretrained direction", ("shrink", "top"): "all of ΔW, same norm",
         ("none", "all"): "all intruders"}  # fmt: skip
KERNEL_LINES = {"r": "LoRA", "plus": "LoRA+", "pissa": "PiSSA", "b": "B alone", "rslora": "rsLoRA, α = 8"}


def _counts(t, name, k=analyse.K):
    """``[seeds, len(EPS)]``."""
    return [r["spectra"]["counts"][k - 1] for r in t.by[name]]


def _count_axis(axis, values, low=0.0):
    """A logarithmic axis of counts that begins at zero and leaves room above the largest."""
    name = axis.axis_name
    getattr(axis.axes, f"set_{name}scale")("symlog", linthresh=1)
    getattr(axis.axes, f"set_{name}lim")(low, 1.6 * max(1.0, np.max(values)))


def by_eps(t):
    """Intruders by threshold, one line a rank."""
    fig, ax = page.new_figure(6.2, 3.0)
    names = ["full", *(n for _, n in t.doubled())]
    for i, name in enumerate(names):
        band(ax, measuring.EPS, _counts(t, name), label=t.by[name][0]["label"], marker=None, ls="-" if i < len(page.PALETTE) else "--")
    _count_axis(ax.yaxis, [_counts(t, n) for n in names if len(t.by[n]) == len(t.by["full"])])
    ax.set_xlabel("threshold ε on the largest cosine with a base direction")
    ax.set_ylabel(f"intruders in the top {analyse.K}")
    ax.legend(ncols=2)
    return page.figure(fig, "Intruders by threshold (α = 2r); the count is on a logarithmic axis above 1.")


def by_rank(t):
    """α = 2r against α = 8 at two thresholds."""
    fig, axes = page.new_figure(6.9, 2.7, 1, 2, sharex=True)
    ladders = {"α = 2r": t.doubled(), "α = 8": t.ladder(lambda r: r["alpha"] == 8)}
    for ax, eps in zip(axes, (0.5, 0.9)):
        for label, ladder in ladders.items():
            seeds = min(len(t.by[n]) for _, n in ladder)
            ys = np.array([t.counts(n, eps)[:seeds] for _, n in ladder], float).T
            band(ax, [r for r, _ in ladder], ys, label=label)
        ax.axhline(np.mean(t.counts("full", eps)), ls="--", lw=0.9, color="#8c8577", label="full")
        ax.set_xscale("log", base=2)
        _count_axis(ax.yaxis, [max(t.counts(n, eps)) for ladder in ladders.values() for _, n in ladder])
        ax.set_xlabel("rank r")
        ax.set_title(f"ε = {eps:g}")
    axes[0].set_ylabel(f"intruders in the top {analyse.K}")
    axes[0].legend()
    return page.figure(fig, "Intruders by rank, α growing with the rank and α fixed; α · lr is the same for all.")


def surfaces(t):
    """Counts over (k, ε) for a few variants, as the share of the directions looked at."""
    names = [n for n in ("full", "r1", "r8", "r8_a8", "r64") if n in t.by][:4] or list(t.by)[:4]
    fig, axes = page.new_figure(7.0, 2.5, 1, len(names), squeeze=False)
    total = t.found[0]["spectra"]["matrices"]
    for ax, name in zip(axes[0], names):
        mean = np.mean([r["spectra"]["counts"] for r in t.by[name]], axis=0)
        share = 100 * mean / (total * np.arange(1, len(mean) + 1)[:, None])
        depth = len(mean)
        page.heatmap(ax, share, x=[f"{e:g}" if e in (0.25, 0.5, 0.75) else "" for e in measuring.EPS],
                     y=[str(i + 1) if (i + 1) % 5 == 0 or i == 0 else "" for i in range(depth)], label="% of directions" if name == names[-1] else "",
                     vmax=max(1.0, np.max([np.max(np.mean([r["spectra"]["counts"] for r in t.by[n]], axis=0)
                                                  / (total * np.arange(1, depth + 1)[:, None])) for n in names]) * 100))  # fmt: skip
        ax.set_title(t.by[name][0]["label"])
        ax.set_xlabel("ε")
    axes[0][0].set_ylabel("top k")
    return page.figure(fig, "The count as a surface: share of the top k directions of all matrices that are intruders at ε, mean over seeds.")


def kernels(t):
    """Other kernels against LoRA at the ranks that they were trained with; None where there are none."""
    held = [(prefix, label) for prefix, label in KERNEL_LINES.items() if any(f"{prefix}{r}" in t.by for r in (1, 8, 64))]
    if len(held) < 2:
        return None
    fig, axes = page.new_figure(6.9, 2.7, 1, 2)
    for ax, eps in zip(axes, (0.5, 0.9)):
        for i, (prefix, label) in enumerate(held):
            for r in (r for r in (1, 8, 64) if f"{prefix}{r}" in t.by):
                ys, x = t.counts(f"{prefix}{r}", eps), (1, 8, 64).index(r) + 0.14 * (i - 2)
                ax.plot([x] * len(ys), ys, "o", color=page.PALETTE[i], label=label if r == min(q for q in (1, 8, 64) if f"{prefix}{q}" in t.by) else None)
        ax.set_xticks(range(3), ["r = 1", "r = 8", "r = 64"])
        _count_axis(ax.yaxis, [max(t.counts(n, eps)) for p, _ in held for r in (1, 8, 64) if (n := f"{p}{r}") in t.by], -0.3)
        ax.set_title(f"ε = {eps:g}")
    axes[0].set_ylabel(f"intruders in the top {analyse.K}")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return page.figure(fig, "Other ways to train a low-rank change, a point a seed.")


def sweeps(t):
    """Counts and forgetting against learning rate and amount of data, where they were swept."""
    out = []
    for field, mark, said in (("rate", "lr", "learning rate, times the main one"), ("share", "data", "data and steps, times the main ones")):
        lines = {}
        for r in t.found:
            stem = r["variant"].split(f"_{mark}")[0]
            if r["variant"] == stem or f"_{mark}" in r["variant"]:
                lines.setdefault(stem, {}).setdefault(r[field], []).append(r)
        lines = {stem: dict(sorted(xs.items())) for stem, xs in lines.items() if len(xs) > 1}
        if lines:
            out.append(_sweep(t, lines, mark, said))
    return out


def _sweep(t, lines, mark, said):
    measure = next(iter(t.found[0]["forgotten"]))
    fig, axes = page.new_figure(7.0, 2.7, 1, 3)
    quantities = (("intruders, ε = .5", lambda r: analyse.count(r["spectra"])), ("intruders, ε = .9", lambda r: analyse.count(r["spectra"], eps=0.9)),
                  (f"rise of {analyse.MEASURES[t.which][measure]}", lambda r: r["forgotten"][measure]))  # fmt: skip
    for ax, (name, of) in zip(axes, quantities):
        for stem, xs in lines.items():
            seeds = min(map(len, xs.values()))
            band(ax, list(xs), np.array([[of(r) for r in rows[:seeds]] for rows in xs.values()], float).T, label=t.by[stem][0]["label"])
        ax.set_xscale("log", base=2)
        ax.set_xticks(sorted({x for xs in lines.values() for x in xs}), [f"{x:g}" for x in sorted({x for xs in lines.values() for x in xs})])
        ax.set_ylabel(name)
        if name.startswith("intruders"):
            _count_axis(ax.yaxis, [of(r) for xs in lines.values() for rows in xs.values() for r in rows])
    axes[1].set_xlabel(said)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return page.figure(fig, f"Intruders and forgetting by {'learning rate' if mark == 'lr' else 'amount of data'}.")


def similarity(found, t):
    """|U0ᵀ U| of one matrix, a map a variant."""
    names = list(found["maps"])
    fig, axes = page.new_figure(6.9, 2.3, 1, len(names), squeeze=False)
    for ax, name in zip(axes[0], names, strict=True):
        values = np.array(found["maps"][name])
        ticks = [str(i + 1) if i % 5 == 0 else "" for i in range(len(values))]
        page.heatmap(ax, values, x=ticks, y=ticks, label="|cosine|" if name == names[-1] else "", vmax=1.0)
        ax.set_title(t.by[name][0]["label"])
        ax.set_xlabel("tuned direction")
        ax.set_aspect("equal")
    axes[0][0].set_ylabel("base direction")
    return page.figure(fig, f"|U₀ᵀU| of the strongest left singular vectors in the {found['path']} matrix of layer {found['layer'] + 1}, the one with the lowest "
                       "cosine of all. A bright diagonal is a direction that is still in its place; an empty column is an intruder, and it moves "
                       "those after it down by a place.")  # fmt: skip


def scatter(t, measure, label, correlations):
    """Forgetting against intruders, a point a run, with ρ where it was computed."""
    fig, axes = page.new_figure(6.9, 3.0, 1, 3, sharey=True)
    families = {}
    for r in t.found:
        families.setdefault(_family(r), []).append(r)
    said = {c["quantity"]: c for c in correlations or () if c["group"] == "all runs" and c["target"] == measure}
    quantities = (("intruders, ε = 0.5", lambda r: analyse.count(r["spectra"])), ("intruders, ε = 0.9", lambda r: analyse.count(r["spectra"], eps=0.9)),
                  ("‖ΔW‖", lambda r: r["spectra"]["delta_norm"]))  # fmt: skip
    for ax, (name, of) in zip(axes, quantities):
        for i, (family, rows) in enumerate(families.items()):
            ax.plot([of(r) for r in rows], [r["forgotten"][measure] for r in rows], "o" if i < 6 else "^", ms=3.5, alpha=0.75,
                    color=page.PALETTE[i % 6], label=family)  # fmt: skip
        if name.startswith("intruders"):
            _count_axis(ax.xaxis, [of(r) for r in t.found], -0.3)
        else:
            ax.set_xscale("log")
            ax.xaxis.set_minor_formatter(NullFormatter())  # a short axis would number every digit, one over the other
        ax.set_xlabel(name)
        c = said.get(name)
        if c and c["rho"] is not None:
            ax.set_title(f"ρ = {c['rho']:.2f} [{c['low']:.2f}, {c['high']:.2f}]")
    axes[0].set_ylabel(f"rise of the {label}")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return page.figure(fig, f"Rise of the {label} against intruders and against the size of the change, a point a run.")


def _family(r):
    if not r["kernel"]:
        return "full"
    name = {"lora": "LoRA", "rslora": "rsLoRA", "lora_b": "B alone", "pissa": "PiSSA"}[r["kernel"]]
    if r["update"] == "lora_plus":
        return "LoRA+"
    return f"{name}, α = 8" if r["kernel"] == "lora" and r["alpha"] == 8 and r["rank"] != 4 else name


def intervention(per, labels, name):
    """% change of accuracy and of induced forgetting by λ, with the controls."""
    shown = [v for v, cells in per.items() if any(c["forgetting"] is not None for c in cells.values())]
    fig, axes = page.new_figure(6.9, 2.3 * len(shown) + 0.4, len(shown), 2, squeeze=False)
    for line, variant in zip(axes, shown):
        cells = per[variant]
        for i, control in enumerate(("none", "neighbour", "shrink")):
            factors = sorted(f for c, extent, f in cells if c == control and extent == "top")
            got = [cells[control, "top", f] for f in factors]
            xs, at = [*factors, 1.0], np.argsort([*factors, 1.0])
            xs = np.array(xs)[at]
            acc = np.array([[*(c["accuracy"][s] for c in got), 0.0] for s in range(len(got[0]["accuracy"]))])[:, at]
            lost = np.array([[*(100 * c["change"][s] / np.mean(c["induced"]) for c in got), 0.0] for s in range(len(got[0]["change"]))])[:, at]
            for ax, ys in zip(line, (acc, lost)):
                band(ax, xs, ys, label=EDITS[control, "top"], color=page.PALETTE[i], ls="-" if control == "none" else "--")
        for ax, what in zip(line, ("accuracy (% change)", "induced forgetting\n(% change)")):
            ax.axhline(0, lw=0.6, color="#8c8577")
            ax.set_ylabel(what)
            ax.set_title(labels[variant])
    for ax in axes[-1]:
        ax.set_xlabel("factor λ")
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return page.figure(fig, f"The intervention and its controls, by the {name}: 0 is the run itself (λ = 1), −100 % of forgetting is all undone. Each seed's "
                       "change is taken relative to the forgetting that the seeds have in the mean.")  # fmt: skip
