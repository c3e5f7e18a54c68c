"""Every claim of the paper as a row: its figure, ours, and what ours says; nothing here but reads the parts."""

import numpy as np

from experiments.skill_localization.multitask import kept
from experiments.skill_localization.settings import LABELS
from experiments.study import spread

HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be tested here"


def runs_of(context):
    """Every graft part: ``[(bench, task, method, value)]``."""
    out = []
    for i, bench in enumerate(context.setting.benches):
        for task, methods in bench.runs.items():
            for method in methods:
                value = context.get(f"graft_{f'{bench.name}_' if i else ''}{task}_{method}")
                if value:
                    out.append((bench, task, method, value))
    return out


def pick(seed_value, mask, sparsity=None):
    """The row of a mask (of a size) of one seed, or None."""
    return next((r for r in seed_value["rows"] if r["mask"] == mask and sparsity in (None, r["sparsity"])), None)


def learnt(seed_value, region):
    return pick(seed_value, "learned", region)


def first_bench(context):
    return context.setting.benches[0]


def gained(value, margin=0.02):
    """Whether fine-tuning gained over the base on the mean of the seeds: without a gain nothing can be localised."""
    return np.mean([s["tuned"]["accuracy"] for s in value["seeds"].values()]) > value["base"]["accuracy"] + margin


def points(x, spec="+.1f"):
    return f"{format(100 * x, spec)} points".replace("-", "−")


def row(claim, paper, ours, verdict, why):
    return {"claim": claim, "paper": paper, "ours": ours, "verdict": verdict, "why": why}


def verdict(holds, testable=True):
    return OPEN if not testable else HOLDS if holds else FAILS


def smallest(value, threshold=0.95):
    """The smallest mask whose mean accuracy over seeds is at least ``threshold`` of the tuned model's; (name, share, accuracy) or None."""
    seeds, found = list(value["seeds"].values()), {}
    for s in seeds:
        for r in s["rows"]:
            if "random" not in r["mask"]:
                found.setdefault((r["mask"], r["sparsity"]), []).append((r["share"], r["accuracy"], r["kept"]))
    tuned = np.mean([s["tuned"]["accuracy"] for s in seeds])
    rows = [(name[0], *np.mean([r[:2] for r in rows], 0), [r[2] for r in rows]) for name, rows in found.items() if len(rows) == len(seeds)]
    return min((r for r in rows if r[2] >= threshold * tuned), key=lambda r: r[1], default=None)


def sparsity(context):
    """0.01 % of the parameters keep over 95 % of the performance: of the accuracy, and, beyond the paper, of the gain itself."""
    out = []
    for bench, task, method, value in runs_of(context):
        if not value["seeds"] or task != bench.main or method not in ("sgd", "adamw", "adamw_l1"):
            continue
        seeds = list(value["seeds"].values())
        rows = [r for s in seeds if (r := pick(s, "learned", 1e-4) or pick(s, "magnitude", 1e-4))]
        if not rows:
            continue
        tuned = np.mean([s["tuned"]["accuracy"] for s in seeds])
        ratio = np.mean([r["accuracy"] for r in rows]) / tuned
        small = smallest(value)
        gains = [r["kept"] for r in rows if r["kept"] is not None]
        least = f"smallest mask that keeps 95 %: {small[1]:.2%} ({small[0]})" if small else "no mask of the curve keeps 95 %"
        ours = (f"{ratio:.1%} of the accuracy ({tuned:.3f}; base {value['base']['accuracy']:.3f}) with {np.mean([r['share'] for r in rows]):.3%}, "
                f"{spread(gains, '.0%')} of the gain; {least}")  # fmt: skip
        easy = value["base"]["accuracy"] >= 0.95 * tuned
        out.append(row(
            f"0.01 % of the parameters keep > 95 % of the performance: {task}, {LABELS[method]} ({bench.name})", "> 95 %", ours,
            OPEN if easy else verdict(ratio > 0.95), "The base model already has 95 % of the tuned accuracy, so the accuracy alone cannot tell; "
            "the share of the gain can." if easy else "Mean of the seeds, ratio of accuracies on held-out examples."))  # fmt: skip
    return out


def gains_kept(context):
    """What the region keeps of the gain, against masks of the same size, over all tasks that gained."""
    out, region = [], first_bench(context).graft["region"]
    table = {"learned": [], "magnitude, as large": [], "random, as large": []}
    for bench, _, method, value in runs_of(context):
        if bench != first_bench(context) or method != "sgd" or not gained(value):
            continue
        for s in value["seeds"].values():
            for name, list_ in table.items():
                if (r := pick(s, name, region)) and r["kept"] is not None:
                    list_.append(r["kept"])
    if table["learned"]:
        means = {k: np.mean(v) for k, v in table.items()}
        ours = "; ".join(f"{k} {spread(v, '.0%')}" for k, v in table.items())
        out.append(row("A learnt region holds the skill, a random one of its size does not (SGD runs, share of the gain)", "≈ 1 against ≈ 0", ours,
                       verdict(means["learned"] > 0.5 and means["learned"] > means["random, as large"] + 0.2),
                       f"Over {len(table['learned'])} runs that gained at least 2 points. Holds: over half of the gain and 20 % of it above random."))  # fmt: skip
        better = means["learned"] - means["magnitude, as large"]
        out.append(row("Learning the mask beats the largest changes alone", "yes", f"{points(better)} of the gain", verdict(better > 0.02),
                       "Against a magnitude mask as large as the learnt one came out."))  # fmt: skip
    return out


def calibration(context):
    """ECE of the graft against the tuned model."""
    falls, region = [], first_bench(context).graft["region"]
    for bench, _, _, value in runs_of(context):
        if bench == first_bench(context):
            falls += [(s["tuned"]["ece"], r["ece"]) for s in value["seeds"].values() if (r := learnt(s, region))]
    if not falls:
        return []
    tuned, graft = np.mean(falls, 0)
    fall = 1 - graft / tuned
    return [row("A graft is better calibrated: ECE falls", "by 40 to 90 %", f"by {fall:.0%}: from {tuned:.3f} to {graft:.3f}, mean of {len(falls)} runs",
                verdict(fall >= 0.4), "Falls by less than 40 %, or rises." if fall < 0.4 else "Ratio of the mean errors over all runs, 15 bins.")]  # fmt: skip


def agreement(context):
    found, region = [], first_bench(context).graft["region"]
    for bench, _, method, value in runs_of(context):
        if bench == first_bench(context) and method == "sgd":
            found += [(r["agreement"], s["agreement_of_base"]) for s in value["seeds"].values() if (r := learnt(s, region))]
    if not found:
        return []
    graft, base = np.mean(found, 0)
    return [row("A graft answers as the tuned model does", "agreement about 90 %", f"{graft:.1%}; the base model agrees on {base:.1%}",
                verdict(graft > base + 0.02), "Share of equal answers, SGD runs; holds when the graft agrees at least 2 points more than the base.")]  # fmt: skip


def optimisers(context):
    """AdamW runs need an L1 pull to be localisable."""
    first = first_bench(context)
    kept_by = {}
    for bench, task, method, value in runs_of(context):
        if bench == first and task == first.main and gained(value):
            kept_by[method] = {s: [r["kept"] for x in value["seeds"].values() if (r := pick(x, "magnitude", s)) and r["kept"] is not None]
                               for s in (1e-3, 1e-2)}  # fmt: skip
    if not {"adamw", "adamw_l1"} <= kept_by.keys():
        return [row("AdamW needs an L1 pull to be localisable", "1e-3", "–", OPEN, "One of the two gained under 2 points, or was not run.")]
    size = 1e-2
    ours = "; ".join(f"{LABELS[m]} {spread(v[size], '.0%')}" for m, v in kept_by.items() if v.get(size))
    pulled, plain = (np.mean(kept_by[m][size]) for m in ("adamw_l1", "adamw"))
    return [row("AdamW needs an L1 pull of 1e-3 to be localisable (gain kept by the largest 1 % of changes)", "SGD and AdamW + L1, not AdamW", ours,
                verdict(pulled > plain + 0.1), "Secondary source. Holds when the pull adds at least 10 % of the gain.")]  # fmt: skip


def other_domains(context):
    changes = []
    for method in context.setting.ood["methods"]:
        value = context.get(f"ood_{first_bench(context).main}_{method}")
        for rows in (value or {"targets": {}})["targets"].values():
            changes += [(s["learned"]["accuracy"] - s["tuned"]["accuracy"], s["learned"]["ece"] - s["tuned"]["ece"]) for s in rows["seeds"].values()]
    if not changes:
        return []
    accuracy, ece = np.mean(changes, 0)
    error = np.std(changes, 0, ddof=1)[0] / len(changes) ** 0.5 if len(changes) > 1 else np.inf
    return [row("A graft is better than the tuned model on other domains", "OOD improves", f"{points(accuracy)} of accuracy (standard error "
                f"{100 * error:.1f}), ECE {ece:+.3f}", verdict(accuracy > 2 * error, np.isfinite(error)), f"Mean over {len(changes)} pairs of run and domain; "
                "holds above two standard errors.")]  # fmt: skip


def tickets(context):
    value = context.get("lottery")
    if not value:
        return []
    by = {}
    for s in value["seeds"].values():
        for r in s["rows"]:
            by.setdefault(r["name"], []).append((r["accuracy"], r["retrained"], s["tuned"]))
    classes = first_bench(context).tasks[value["task"]]["num_labels"]
    ticket = np.mean(by["ticket: the region"], 0)
    middle = (1 / classes + ticket[2]) / 2
    out = [row("Lottery-ticket zeroing fails without retraining", "chance", f"{ticket[0]:.3f} with the region alone, chance {1 / classes:.2f}, tuned "
               f"{ticket[2]:.3f}; after {value['steps']} steps {ticket[1]:.3f}", verdict(ticket[0] < middle), "Zeros outside the region. Fails: nearer to chance "
               "than to the tuned model.")]  # fmt: skip
    if "graft: the biases" in by:
        biases, region = np.mean(by["graft: the biases"], 0), np.mean(by["graft: the region"], 0)
        gain = biases[2] - value["base"]
        share = (biases[0] - value["base"]) / gain if gain > 0.02 else None
        out.append(row("A region of the biases alone fails without retraining", "fails", f"{biases[0]:.3f} (base {value['base']:.3f}, tuned {biases[2]:.3f}); "
                       f"after {value['steps']} steps {biases[1]:.3f}; the learnt region {region[0]:.3f}",
                       verdict(share is not None and share < 0.5, share is not None), "Fails: keeps under half of the gain." if share is not None
                       else "Fine-tuning gained under 2 points."))  # fmt: skip
    return out


def multi(context):
    """Disjoint regions, overlap with similarity, unions."""
    value, spec = context.get("multi_overlap"), context.setting.multi
    if not value:
        return []
    off = ~np.eye(len(value["tasks"]), dtype=bool)
    mean, chance = np.asarray(value["mean"])[off].mean(), np.asarray(value["chance"])[off].mean()
    added = [x for x in np.asarray(value["added"], float)[off] if np.isfinite(x)]
    same = [x for v in value["same_task"].values() for x in v]
    ours = f"mean overlap {mean:.1%} (random masks {chance:.1%}" + (f"; same task, another seed {np.mean(same):.1%})" if same else ")")
    ours += f"; of what learning added to the common start {np.mean(added):.1%}" if added else ""
    out = [row("Regions of a multi-task model are almost disjoint", "overlap near 0", ours, verdict(mean < 0.5),
               "All regions start from the same largest changes, which a few learning steps do not undo. Holds under one half.")]  # fmt: skip
    for key, what in (("spearman", "overlap"), ("spearman_added", "overlap of what learning added")):
        rho = value[key]
        said = "too few pairs" if rho["rho"] is None else f"Spearman ρ {rho['rho']:.2f} [{rho['low']:.2f}, {rho['high']:.2f}] over {rho['n']} ordered pairs"
        told = rho["rho"] is not None and (rho["low"] > 0 or rho["high"] < 0)
        out.append(row(f"Overlap tracks the similarity of tasks ({what})", "yes", said, verdict(told and rho["low"] > 0, told), "With the gain that a model "
                       "of one task brings to the other; holds when the bootstrap interval is above 0"
                       + ("." if told else ", which it includes here: too few tasks to tell.")))  # fmt: skip
    train, unions = context.get("multi_train"), context.get("multi_union")
    if train and unions:
        inside, outside = [], []
        for seed, rows in unions.items():
            tuned = train["seeds"][seed]["scores"]
            for r in rows:
                inside.append(kept(r["scores"], train["base"], tuned, r["tasks"]))
                outside.append(kept(r["scores"], train["base"], tuned, [t for t in spec["tasks"] if t not in r["tasks"]]))
        inside, outside = ([x for x in xs if x is not None] for xs in (inside, outside))
        if inside:
            out.append(row("The union of regions keeps most of the gains of its tasks", "most", f"{spread(inside, '.0%')} of its own tasks' gain, "
                           f"{spread(outside, '.0%')} of the others'", verdict(np.mean(inside) > 0.5), "Mean over subsets and seeds, tasks that gained; "
                           "holds above one half."))  # fmt: skip
    return out


def continual(context):
    out = []
    for a, b in context.setting.continual["pairs"]:
        value = context.get(f"continual_{a}_{b}")
        if not value:
            continue
        drop = {n: [s["runs"][n]["before"] - s["runs"][n]["first"] for s in value["seeds"].values()]
                for n in ("everywhere", "outside the region", "outside a random region", "from the graft, outside")}  # fmt: skip
        read = [s["runs"]["outside the region"]["before"] - s["runs"]["outside the region"]["read"] for s in value["seeds"].values()]
        forgot = np.mean(drop["everywhere"])
        ours = "; ".join(f"{n}: {spread([100 * x for x in v], '.1f')}" for n, v in drop.items()) + f"; graft read out: {spread([100 * x for x in read], '.1f')}"
        out.append(row(f"Training {b} outside the region of {a} nearly stops forgetting (drop on {a}, points)", "20 → 1.5 (QNLI)", ours,
                       verdict(np.mean(drop["outside the region"]) < 0.25 * forgot, forgot > 0.02), "Secondary source. Holds under a quarter of the plain drop."
                       if forgot > 0.02 else "Plain training forgets under 2 points: nothing to stop."))  # fmt: skip
    return out


def joined(context):
    """The question that joins the two papers."""
    out, main = [], first_bench(context).main
    for method in context.setting.intruders["methods"]:
        value = context.get(f"intruders_{main}_{method}")
        if not value:
            continue
        seeds = [s for s in value["seeds"].values() if "intruders" in s["sets"]]
        name = f"Beyond both papers: the region lies in the intruder dimensions ({LABELS[method]})"
        if not seeds:
            out.append(row(name, "neither answers", f"no intruders in {len(value['seeds'])} runs", OPEN, f"ε = {value['eps']}, k = {value['k']}."))
            continue
        sets = [s["sets"]["intruders"] for s in seeds]
        region, whole, chance = ([x["inside_2"][k] for x in sets] for k in ("region", "whole", "random"))
        holds, rest = ([x["holds_2"][k] for x in sets] for k in ("part_in_region", "rest_in_region"))
        ours = (f"{spread(region, '.1%')} of the region's change is in the span, {spread(whole, '.1%')} of the whole change, {spread(chance, '.1%')} of a random mask's; "
                f"the region holds {spread(holds, '.1%')} of the intruder component and {spread(rest, '.1%')} of the rest")  # fmt: skip
        out.append(row(name, "neither answers", ours, verdict(np.mean(region) > 0.5), f"{sum(s['intruders'] for s in seeds)} intruders in {len(seeds)} runs; "
                       "holds when over half of the region's energy lies in the two-sided span."))  # fmt: skip
    return out


MADE = (  # who judges a claim, and what the row says where nothing was measured
    (sparsity, "0.01 % of the parameters keep > 95 % of the performance", "> 95 %"),
    (gains_kept, "A learnt region holds the skill, a random one of its size does not", "≈ 1 against ≈ 0"),
    (agreement, "A graft answers as the tuned model does", "agreement about 90 %"),
    (calibration, "A graft is better calibrated: ECE falls", "by 40 to 90 %"),
    (other_domains, "A graft is better than the tuned model on other domains", "OOD improves"),
    (optimisers, "AdamW needs an L1 pull to be localisable", "1e-3"),
    (tickets, "Bias-only regions and lottery-ticket zeroing fail without retraining", "fail"),
    (multi, "Regions of a multi-task model are almost disjoint, their overlap tracks task similarity, their union keeps most gains", "yes"),
    (continual, "Training a second task outside the first's region nearly stops forgetting", "20 → 1.5 (QNLI)"),
    (joined, "Beyond both papers: the region lies in the intruder dimensions", "neither answers"),
)


def rows(context):
    """All rows, in the order of the paper."""
    return [r for make, claim, paper in MADE
            for r in make(context) or [row(claim, paper, "–", OPEN, "Not measured at this scale.")]]  # fmt: skip
