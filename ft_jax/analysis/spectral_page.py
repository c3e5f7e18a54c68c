"""The page of a spectral report: what `compare.summarise` returns, as tables and figures."""

import numpy as np
from matplotlib.ticker import MaxNLocator

from ft_jax.analysis import report

_MEASURES = (
    ("effective_rank", "effective rank of ΔW"),
    ("stable_rank", "stable rank of ΔW"),
    ("delta_norm_relative", "‖ΔW‖ / ‖W₀‖"),
)


def _grid(matrices, key, reduce):
    """``(kinds, layers, [kind, layer])`` of the matrices that stand in a numbered layer; NaN where there is none."""
    placed = [m for m in matrices if m["layer"] is not None]
    kinds = list(dict.fromkeys(m["kind"] for m in placed))
    layers = sorted({m["layer"] for m in placed})
    cells = {}
    for m in placed:
        cells.setdefault((m["kind"], m["layer"]), []).append(np.nan if m[key] is None else m[key])
    values = np.array([[reduce(cells.get((kind, layer), [np.nan])) for layer in layers] for kind in kinds])
    return kinds, layers, values


def _heat(matrices, k):
    kinds, layers, values = _grid(matrices, "intruders", np.sum)
    fig, ax = report.new_figure(height=1.2 + 0.27 * len(kinds))
    step = 1 + len(layers) // 24
    ticks = [str(layer) if i % step == 0 else "" for i, layer in enumerate(layers)]
    report.heatmap(ax, values, x=ticks, y=kinds, label="intruders", vmax=max(1, np.nanmax(values)),
                   annotate=".0f" if len(layers) <= 36 else None)
    ax.set_xlabel("layer")
    return report.figure(fig, f"Intruder dimensions among the top {k} directions, per layer and kind of matrix.")


def _sweeps(summary):
    fig, (left, right) = report.new_figure(height=2.6, columns=2, sharey=False)
    for ax, rows, key, here, name in (
        (left, summary["eps_sweep"], "eps", summary["eps"], "cosine threshold ε"),
        (right, summary["k_sweep"], "k", summary["k"], "top directions k"),
    ):
        ax.plot([r[key] for r in rows], [r["total_intruders"] for r in rows], marker="o", clip_on=False)
        ax.axvline(here, color="#888888", linewidth=0.7, linestyle=":")
        ax.set(xlabel=name, ylabel="intruders, all matrices")
        ax.set_ylim(bottom=0)
    caption = (f"Total count against the threshold (k = {summary['k']}) and against the number of directions "
               f"(ε = {summary['eps']}).")
    if undecided := max(r.get("undecided", 0) for r in summary["eps_sweep"]):
        caption += (f" Certified matrices enclose a cosine: away from ε = {summary['eps']}, where the count is exact, bounds "
                    f"leave up to {undecided} directions open at a threshold.")
    return report.figure(fig, caption)


def _lines(matrices):
    known = [(key, label) for key, label in _MEASURES if any(m[key] is not None for m in matrices)]
    fig, axes = report.new_figure(height=2.13 * len(known), rows=len(known), sharex=True)
    axes = np.atleast_1d(axes)
    for ax, (key, label) in zip(axes, known):
        kinds, layers, values = _grid(matrices, key, np.mean)
        for i, (kind, line) in enumerate(zip(kinds, values)):
            style = ("-", "--", ":")[i // len(report.PALETTE) % 3]
            ax.plot(layers, line, style, marker="o", markersize=3, label=kind)
        ax.set_ylabel(label)
        ax.set_ylim(bottom=0)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1].set_xlabel("layer")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    names = ", ".join(label for _, label in known)
    return report.figure(fig, f"By layer: {names}. ΔW is the change, W₀ the pretrained matrix; norms are Frobenius norms.")


def _kinds(matrices):
    rows = []
    for kind in dict.fromkeys(m["kind"] for m in matrices):
        of = [m for m in matrices if m["kind"] == kind]
        mean = {key: float(np.mean([np.nan if m[key] is None else m[key] for m in of])) for key, _ in _MEASURES}
        rows.append({"kind": kind, "matrices": len(of), "intruders": sum(m["intruders"] for m in of), **mean})
    heads = [("kind", "Kind"), ("matrices", "Matrices"), ("intruders", "Intruders"),
             *((key, f"Mean {label}") for key, label in _MEASURES)]  # fmt: skip
    return report.table(rows, heads, caption="By kind of matrix.")


def _skipped(summary):
    counts = ", ".join(f"{n} ({why})" for why, n in summary["skipped_counts"].items()) or "none"
    blocks = [f"Tensors left out: {counts}."]
    if summary["skipped"]:
        table = report.table(summary["skipped"], [("name", "Tensor"), ("why", "Why")])
        blocks.append(report.details("Which ones", table))
    return blocks


_DONE = {"none": "the top-ranked intruder", "neighbour": "the pretrained direction beside the top-ranked intruder (a control)",
         "shrink": "the whole of ΔW, by a change of the norm of the intruder's (a control),"}  # fmt: skip


def _repair(found):
    """What `repair_files.run` returns: totals, tasks and every mended matrix, before and after."""
    how, before, after = found["settings"], found["before"], found["after"]
    what = "every intruder among the top" if how["which"] == "all" and how["control"] == "none" else _DONE[how["control"]]
    lead = (f"λ = {how['factor']:g}: {what} was scaled in {found['mended']} of {found['matrices']} matrices; the weights "
            f"moved by ‖W′ − W‖ = {report.number(found['change'])}.")
    if found["kind"] == "adapter":
        lead += (f" The adapter keeps its rank: of the mended change of a matrix, at most {found['lost']:.2%} (Frobenius) "
                 "does not fit into it.")
    totals = [
        {"what": "Intruders", "before": before["intruders"], "after": after["intruders"]},
        {"what": "Matrices with intruders", "before": before["with_intruders"], "after": after["with_intruders"]},
        {"what": "Mean effective rank of ΔW", "before": before["effective_rank"], "after": after["effective_rank"]},
        {"what": "‖ΔW‖, all matrices", "before": before["delta_norm"], "after": after["delta_norm"]},
    ]
    for name, rows in found.get("measured", {}).items():
        for key, label in (("accuracy", "accuracy"), ("loss", "loss"), ("perplexity", "perplexity")):
            if key in rows["before"]:
                totals.append({"what": f"{name.capitalize()} ({rows['source']}): {label}",
                               **{side: rows[side][key] for side in ("base", "before", "after") if side in rows}})
    sides = ("base", "before", "after") if any("base" in row for row in totals) else ("before", "after")
    columns = [("what", ""), *((side, side.capitalize(), None) for side in sides)]
    rows = [{"name": row["name"], "rank": row["rank"] + 1, "sigma": row["sigma"], "change": row["change"], "lost": row["lost"],
             **{f"{key}_{side}": row[side][key] for side in ("before", "after") for key in ("intruders", "effective_rank")}}
            for row in found["rows"]]
    each = [("name", "Matrix"), ("rank", "Rank of the intruder"), ("sigma", "Its σ"), ("change", "‖W′ − W‖"), ("lost", "Lost"),
            ("intruders_before", "Intruders before"), ("intruders_after", "after"),
            ("effective_rank_before", "Effective rank before"), ("effective_rank_after", "after")]  # fmt: skip
    return [lead, *(f"{note}." for note in found["notes"]),
            report.table(totals, columns, caption="Before and after the repair."),
            report.details(f"{len(rows)} matrices with an intruder", report.table(rows, each))]


def render(summary, repaired=None):
    """The whole page, as markup; ``repaired`` is what `repair_files.run` returned."""
    matrices = summary["matrices"]
    moved = sum(m["delta_norm"] > 0 for m in matrices)
    lead = (f"{summary['total_intruders']} of the {summary['total_directions']} leading directions of "
            f"{len(matrices)} matrices are intruders: their cosine with every singular vector of the pretrained matrix "
            f"is under {summary['eps']}. {moved} of the matrices differ from the pretrained ones.")
    figures = [_sweeps(summary)]
    if any(m["layer"] is not None for m in matrices):
        figures = [_heat(matrices, summary["k"]), *figures]
    columns = [("name", "Matrix"), ("size", "Shape"), ("intruders", "Intruders"), ("effective_rank", "Effective rank"),
               ("stable_rank", "Stable rank"), ("delta_norm", "‖ΔW‖"), ("delta_norm_relative", "‖ΔW‖ / ‖W₀‖"),
               ("nearest", "Least cosine")]  # fmt: skip
    rows = [m | {"size": "×".join(map(str, m["shape"])), "nearest": min(m["max_cosine"])} for m in matrices]
    change = [_kinds(matrices)]
    if any(m["layer"] is not None for m in matrices):
        change.append(_lines(matrices))
    return report.page("Spectral report", [
        (None, [lead]),
        ("Intruder dimensions", figures),
        *([("Repair", _repair(repaired))] if repaired else []),
        ("The change of the weights", change),
        ("Every matrix", [report.details(f"{len(matrices)} rows", report.table(rows, columns)), *_skipped(summary)]),
    ], subtitle=f"{summary['tuned']} against {summary['base']}")
