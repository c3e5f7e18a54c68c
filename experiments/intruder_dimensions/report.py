"""The page of the study, drawn from its parts alone; what is not done yet is left out."""

import numpy as np

from experiments.intruder_dimensions import analyse, claims, continual, figures, settings, sweep
from experiments.intruder_dimensions.analyse import count
from experiments.study import Missing, spread
from ft_jax.analysis import report as page

READING = (
    "An intruder is one of the ten strongest output directions of a fine-tuned matrix (left singular vectors, in the paper's convention) that "
    "resembles none of the base matrix's directions: its largest cosine with any of them is below ε, which is .5 unless a figure says otherwise.",
    "A band spans the least and the largest of the seeds, the line is their mean; a table gives mean ± standard deviation over seeds. The seed "
    "draws the order of the training texts and the adapter's start; test texts, task and base model are the same for all.",
    "Forgetting is by how much a loss on text of the base model's pre-training kind rose; below zero the model improved there. ρ is Spearman's "
    "rank correlation with a 95 % bootstrap interval over runs. The seeds of a variant are near copies of each other, so that the interval is "
    "narrower than it would be over as many different variants.",
)


def pages(context):
    """``(title, subtitle, sections)`` from the parts that are done."""
    sections = [("How to read this", list(READING))]
    for which in sweep.grids(context.setting):
        sections += _grid(context, which)
    if claims.continued(context.setting):
        sections += continual.sections(context)
    if found := context.get("sanity"):
        sections.append(("Sanity", _sanity(found)))
    return "Intruder dimensions: LoRA against full fine-tuning", _subtitle(context), sections


def _subtitle(context):
    grids = sweep.grids(context.setting).values()
    return "; ".join(f"{settings.LINES.get(g.model, 'a tiny model')}: {len(g.runs)} runs of {g.steps} steps" for g in grids)


def _grid(context, which):
    try:
        grid, t = getattr(context.setting, which), claims.Table(context, which)
    except Missing:
        return []
    name = {"encoder": "Encoder", "decoder": "Language model"}[which]
    out = [(f"{name}: what was trained", [_setup(grid), *_failures(context, which, t), _runs(context, which, t)]),
           (f"{name}: intruders", _intruders(context, t)), (f"{name}: the change itself", _change(context, which, t)),
           (f"{name}: forgetting", _forgetting(context, which, t))]  # fmt: skip
    edits = [p for p in context.setting and claims.editing.variants(context.setting, which) if context.get(f"{which}_edit_{p}")]
    if edits and context.get(f"{which}_base"):
        out.append((f"{name}: the intervention", _edits(context, which)))
    return out


def _setup(grid):
    data = grid.data
    texts = f"{data['limit']:,} texts" if data["limit"] else "all texts"
    unit = f"packed rows of {data['max_length']} tokens" if data.get("packing") else f"texts of up to {data['max_length']} tokens"
    head = "The head is frozen at the class means of the base model's embeddings, so that all that is learnt lies in the layers. "
    return (f"{settings.LINES.get(grid.model, 'A tiny model')} on {data['source'].rsplit('/', 1)[-1]} ({texts}): {grid.steps} steps of {grid.batch_size} "
            f"{unit}, AdamW without decay, linear schedule, warm-up 0.06. {head if grid.objective == 'classification' else ''}Full fine-tuning trains "
            "all layers; kernels sit on every linear layer. Learning rates are the paper's (full 1e-5, α · lr = 2.4e-3)"
            + (f" times {grid.lr_scale:g}, because so few steps replace its tens of thousands and Adam moves a weight by about the learning rate a "
               "step: the ratio between the variants stays the paper's." if grid.lr_scale != 1 else "."))  # fmt: skip


def _failures(context, which, t):
    out = []
    lost = [f"{run} ({s['failed'].split(';')[0]})" for g in getattr(context.setting, which).groups
            for run, s in context.get(sweep.part(which, g), {}).items() if "failed" in s]  # fmt: skip
    if lost:
        out.append(f"Runs that diverged and are left out: {'; '.join(lost)}.")
    if fallen := claims.collapses(context, t):
        out.append(f"{fallen}: every text has the same embedding, the contrastive loss is exactly that of guessing, and accuracy is that of one class. These "
                   "runs stay in the tables and correlations; their forgetting is as large as this measure can show for a model that tells nothing apart.")  # fmt: skip
    return out


def _runs(context, which, t):
    base, task = context.get(f"{which}_base"), analyse.task(which)
    shown = []
    for name, rows in t.by.items():
        shown.append({
            "run": rows[0]["label"], "seeds": len(rows), "accuracy": spread(t.values(name, lambda r: 100 * r["accuracy"]), ".1f"),
            "loss": spread(t.values(name, lambda r: r["loss"])), "ece": _of(t, name, lambda r: 100 * r["scores"]["test"]["ece"], ".1f"),
            "ood": _of(t, name, lambda r: 100 * r["scores"]["ood"]["accuracy"], ".1f") if base and "ood" in base else None,
            **{q: _of(t, name, lambda r, q=q: 100 * r["scores"][q]["accuracy_norm"], ".1f") for q in ("hellaswag", "arc_challenge") if base and q in base},
            "n": spread(t.counts(name), ".1f"), "n9": spread(t.counts(name, 0.9), ".1f"),
            **{m: _of(t, name, lambda r, m=m: r["forgotten"][m], "+.3f") for m in rows[0]["forgotten"]},
        })  # fmt: skip
    if base:
        shown.insert(0, {"run": "base", "accuracy": f"{100 * base[task]['accuracy']:.1f}", "loss": f"{base['test']['loss']:.3f}",
                         "ece": f"{100 * base['test']['ece']:.1f}", "ood": f"{100 * base['ood']['accuracy']:.1f}" if "ood" in base else None,
                         **{q: f"{100 * base[q]['accuracy_norm']:.1f}" for q in ("hellaswag", "arc_challenge") if q in base}})  # fmt: skip
    present = {k for row in shown for k, v in row.items() if v is not None}
    columns = [("run", "run"), ("seeds", "seeds"), ("accuracy", "accuracy (%)"), ("loss", "test loss"), ("ece", "ECE (%)"), ("ood", "other domain (%)"),
               ("hellaswag", "HellaSwag (%)"), ("arc_challenge", "ARC-C (%)"), ("n", "intruders"), ("n9", "at ε = .9"),
               *((m, f"rise of {label}") for m, label in analyse.MEASURES[which].items())]  # fmt: skip
    first = t.found[0]["scores"][task]
    size = first.get("count", first.get("questions"))
    p = base[task]["accuracy"] if base else 0.5
    caption = (f"All runs. Accuracy on {size} {'questions' if 'questions' in first else 'texts'}: standard error {100 * (p * (1 - p) / size) ** 0.5:.1f} "
               "points, but the same ones for every run. Rises in nats over the base model.")  # fmt: skip
    return page.table(shown, [c for c in columns if c[0] in present], caption)


def _of(t, name, of, spec):
    return spread(t.values(name, of), spec).replace("± +", "± ")


def _intruders(context, t):
    out = [_said(t), figures.by_eps(t)]
    if any(r["alpha"] == 8 for r in t.found) and len(t.ladder(lambda r: r["alpha"] == 8)) > 1:
        out.append(figures.by_rank(t))
    out.append(figures.surfaces(t))
    if others := figures.kernels(t):
        out.append(others)
    return [*out, *figures.sweeps(t)]


def _said(t):
    total = t.found[0]["spectra"]["matrices"]
    ranks = t.doubled()
    low = ranks[0][1]
    return (f"Of {total * analyse.K} directions ({analyse.K} in each of {total} matrices), full fine-tuning turned {t.mean('full', lambda r: count(r['spectra'])):.1f} into "
            f"intruders, LoRA r = {ranks[0][0]} {t.mean(low, lambda r: count(r['spectra'])):.1f} (mean over seeds).")  # fmt: skip


def _change(context, which, t):
    shown = [{
        "run": rows[0]["label"], "erank": _of(t, n, lambda r: r["spectra"]["effective_rank"], ".1f"),
        "srank": _of(t, n, lambda r: r["spectra"]["stable_rank"], ".2f"), "norm": _of(t, n, lambda r: r["spectra"]["delta_norm"], ".2f"),
        "rel": _of(t, n, lambda r: 100 * r["spectra"]["delta_norm_relative"], ".2f"),
    } for n, rows in t.by.items() if rows[0]["rate"] == rows[0]["share"] == 1]  # fmt: skip
    columns = [("run", "run"), ("erank", "effective rank of ΔW"), ("srank", "stable rank"), ("norm", "‖ΔW‖"), ("rel", "‖ΔW‖/‖W₀‖ (%)")]
    out = [page.table(shown, columns, "Ranks and relative norm are means over matrices, ‖ΔW‖ is taken over all of them.")]
    if found := context.get(f"{which}_maps"):
        out.append(figures.similarity(found, t))
    if found := context.get(f"{which}_angles"):
        out.append(_angles(found, t))
    return out


def _angles(found, t):
    def label(r):
        a, b = (t.by[n][0]["label"] if n in t.by else n for n in (r["first"], r["second"]))
        return f"{a}, two seeds" if r["first"] == r["second"] else f"{a} and {b}"

    pairs = {}
    for r in found["rows"]:
        pairs.setdefault(label(r), []).append(r)
    shown = [{"pair": name, "top": rows[0]["top"], "overlap": spread([r["overlap"] for r in rows]), "chance": rows[0]["chance"]}
             for name, rows in pairs.items()]  # fmt: skip
    columns = [("pair", "runs"), ("top", "dimensions"), ("overlap", "mean cos² of the angles"), ("chance", "random spans", ".3f")]
    return page.table(shown, columns, f"Principal angles between the strongest left directions of two runs' ΔW ({'; '.join(found['matrices'])}): 1 is the same "
                      "span. Pairs of different variants share their seed.")  # fmt: skip


def _forgetting(context, which, t):
    out = []
    if head := context.get(f"{which}_head"):
        out.append(_head(head))
    found = context.get(f"{which}_correlations")
    for measure in t.found[0]["forgotten"]:
        out.append(figures.scatter(t, measure, analyse.MEASURES[which][measure], found))
    if found:
        out += [*_which_tells_more(found, t), _correlations(found, which)]
    return out


def _which_tells_more(found, t):
    """A sentence that sets the count against the plain size of the change, over all runs."""
    measure = next(iter(t.found[0]["forgotten"]))
    rho = {c["quantity"]: c["rho"] for c in found if c["group"] == "all runs" and c["target"] == measure and c["rho"] is not None}
    counted = {q: r for q, r in rho.items() if q.startswith("intruders")}
    if not counted or "‖ΔW‖" not in rho:
        return []
    best = max(counted, key=counted.get)
    more = "more than" if rho["‖ΔW‖"] > counted[best] else "less than"
    return [f"Over all runs the size of the change, ‖ΔW‖, goes with forgetting {more} any count of intruders: ρ = {rho['‖ΔW‖']:.2f} against "
            f"{counted[best]:.2f} for {best}."]  # fmt: skip


def _head(head):
    said = f"The base model's pseudo-perplexity on {head['base']['tokens']} tokens of held-out novel passages, each masked in turn, is {head['base']['pseudo_perplexity']:.1f}"
    if not head["fitted"]:
        return f"{said}, by the MLM head of its checkpoint."
    return (f"This encoder was published without its MLM head. One was fitted to the frozen base ({head['steps']} steps on {head['texts']:,} other passages) and is the "
            f"same for all runs. {said}, against {np.exp(head['unigram']):.0f} for guessing tokens by their frequency: a weak head, but one that reads the "
            "hidden states, and what it loses after fine-tuning is what those no longer hold where the base model held it.")  # fmt: skip


def _correlations(found, which):
    def cell(c):
        return "–" if c["rho"] is None else f"{c['rho']:+.2f} [{c['low']:+.2f}, {c['high']:+.2f}]"

    targets = list(dict.fromkeys(c["target"] for c in found))
    rows = {}
    for c in found:
        rows.setdefault((c["group"], c["quantity"]), {"runs": f"{c['group']} ({c['n']})", "quantity": c["quantity"]})[c["target"]] = cell(c)
    names = {**{m: f"rise of {label}" for m, label in analyse.MEASURES[which].items()}, "accuracy": "accuracy"}
    columns = [("runs", "runs"), ("quantity", "quantity"), *((m, names[m]) for m in targets)]
    return page.table(list(rows.values()), columns, "Spearman's ρ with 95 % bootstrap intervals; a dash where the quantity does not vary.")


def _edits(context, which):
    found = {m: claims.edits(context, which, m) for m in analyse.MEASURES[which] if m in context.get(f"{which}_base")}
    e = claims.editing.measuring.how(context.setting, which).edits
    labels = {v: claims.edit_label(context, which, v) for v in next(iter(found.values()))}
    edited = {v: context.value(f"{which}_edit_{v}") for v in labels}
    has = "; ".join(f"{labels[v]} in {spread([r['matrices'] for r in runs.values()], '.1f')}" for v, runs in edited.items())
    out = [f"In every matrix that has one, the top-ranked intruder's singular value is multiplied by λ (k = {e.k}). Matrices that have one, of "
           f"{next(iter(claims.Table(context, which).found))['spectra']['matrices']}: {has}. Two controls scale something else: the pretrained direction next in "
           "rank by the same λ, and all of ΔW in that matrix by a change of the same norm."]  # fmt: skip
    for measure, per in found.items():
        if any(c["forgetting"] is not None for cells in per.values() for c in cells.values()):
            out += [figures.intervention(per, labels, analyse.MEASURES[which][measure]), _edit_table(per, labels, measure, which)]
        else:
            out.append(f"By the {analyse.MEASURES[which][measure]} these runs forgot nothing that could be undone.")
    return out


def _edit_table(per, labels, measure, which):
    shown = [{"run": labels[v], "what": figures.EDITS[control, extent], "factor": factor, "accuracy": spread(c["accuracy"], "+.1f").replace("± +", "± "),
              "forgetting": c["forgetting"], "induced": spread(c["induced"], "+.3f").replace("± +", "± ")}
             for v, cells in per.items() for (control, extent, factor), c in cells.items()]  # fmt: skip
    columns = [("run", "run"), ("what", "scaled"), ("factor", "λ", ".2f"), ("accuracy", "accuracy (%)"), ("forgetting", "induced forgetting (%)", "+.1f"),
               ("induced", "induced (nats)")]  # fmt: skip
    table = page.table(shown, columns, f"Change of accuracy and of the forgetting that fine-tuning had induced ({analyse.MEASURES[which][measure]}); −100 % is all undone.")
    return page.details(f"All edits, by the {analyse.MEASURES[which][measure]}", table)


def _sanity(found):
    spikes = sorted({r["spike"] for r in found["rows"]})
    shown = [{"spike": s, "n": ", ".join(str(r["intruders"]) for r in found["rows"] if r["spike"] == s)} for s in spikes]
    return [page.table(shown, [("spike", "λ / σ₁(W)", ".2f"), ("n", "intruders, by draw")],
                       f"A Gaussian matrix of {found['width']} × {found['width']} and the same with λ v vᵀ added, v random: the definition at work.")]  # fmt: skip
