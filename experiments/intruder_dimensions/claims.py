"""The paper's claims, a row each: its figure, ours, and whether it holds by a rule that stands here in code."""

import numpy as np

from experiments.intruder_dimensions import analyse, continual, editing
from experiments.intruder_dimensions.analyse import count
from experiments.study import Missing, spread

HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be tested here"
PAPER_ACCURACY = "SST-2: full .944, r = 1 .942, r = 8 .947, r = 64 .947; MNLI .875, .868, .870, .872"
PAPER_EDIT = "r = 8: λ = .7 MNLI −0.2 %/−14.5 %, QQP 0.0 %/−33.2 %; λ = .3 −1.9 %/−23.1 %, −1.6 %/−50.6 %"


def row(claim, paper, ours, verdict, why):
    """``verdict`` is True, False or None for what cannot be told."""
    said = OPEN if verdict is None else HOLDS if verdict else FAILS
    return {"claim": claim, "paper": paper, "ours": ours, "verdict": said, "why": why}


def claims(context):
    """All rows, from parts alone."""
    setting = context.setting
    asked = {
        "the encoder": _of_encoder if setting.encoder else None, "language models": _of_decoder if setting.decoder else None,
        "the sanity case": _sanity, "tasks in sequence": continual.claims if continued(setting) else None,
    }  # fmt: skip
    out = []
    for name, make in asked.items():
        try:
            out += make(context) if make else []
        except Missing as error:  # the other groups stand without it
            out.append(row(f"All claims about {name}", "–", "–", None, f"Not run yet: {error}."))
    return out


def continued(setting):
    """Whether the scale has a sequence of tasks."""
    return bool(getattr(setting, "continual", None)) or setting.name in continual.SETTINGS


class Table:
    """The runs of a grid by variant, with short ways to the numbers that claims are about."""

    def __init__(self, context, which):
        self.context, self.which, self.found = context, which, analyse.rows(context, which)
        self.by = analyse.by_variant(self.found)
        if "full" not in self.by or not self.doubled():
            raise Missing(f"full fine-tuning and LoRA of the {which} are not both measured")

    def __contains__(self, names):
        return all(n in self.by for n in ([names] if isinstance(names, str) else names))

    def collapsed(self, name):
        """Whether any run of a variant gives all texts one embedding."""
        return any(analyse.collapsed(self.context, self.which, r) for r in self.by[name])

    def values(self, name, of):
        return [of(r) for r in self.by[name]]

    def mean(self, name, of):
        return float(np.mean(self.values(name, of)))

    def counts(self, name, eps=analyse.E):
        return self.values(name, lambda r: count(r["spectra"], eps=eps))

    def ladder(self, of=lambda r: True):
        """``[(rank, variant)]`` of plain LoRA at the main learning rate and data size that meet a condition."""
        chosen = {r["rank"]: r["variant"] for r in self.found
                  if r["kernel"] == "lora" and r["update"] == "adamw" and r["rate"] == r["share"] == 1 and of(r)}  # fmt: skip
        return sorted(chosen.items())

    def doubled(self):
        """The ladder of α = 2r."""
        return self.ladder(lambda r: r["alpha"] == 2 * r["rank"])


def collapses(context, t):
    """``"LoRA r = 1, lr × 2 and PiSSA r = 1 collapsed"``, or nothing."""
    names = [t.by[n][0]["label"] for n in t.by if t.collapsed(n)]
    return f"{' and '.join(names)} collapsed" if names else ""


def _of_encoder(context):
    t, measure = Table(context, "encoder"), _main(context, "encoder")
    total = t.found[0]["spectra"]["matrices"] * analyse.K
    out = [_accuracy(t), _full_has_none(t, total), _up_to(t), _fixed_alpha(t), _data(t), _seeds(t)]
    out += [_variant(t, "b", "Freezing A at orthonormal directions and training B alone gives far fewer intruders", "a figure: far fewer",
                     lambda ours, lora: ours <= lora / 2, "at most half of LoRA's of the same rank"),
            _variant(t, "pissa", "PiSSA has many intruders", "a figure: many", lambda ours, lora: ours >= lora, "at least as many as LoRA of the same rank"),
            _variant(t, "plus", "LoRA+ has about as many intruders as LoRA", "a figure: about as many",
                     lambda ours, lora: lora / 2 <= ours <= 2 * lora, "between half and twice LoRA's")]  # fmt: skip
    out += [_effective_rank(t), *_correlated(context, "encoder", measure), *_less_and_more(t, measure)]
    return out + _edited(context, "encoder", measure)


def _main(context, which):
    """The measure of forgetting that claims are judged by."""
    base = context.value(f"{which}_base")
    return next(m for m in analyse.MEASURES[which] if m in base)


def _accuracy(t):
    acc = {name: t.values(name, lambda r: r["accuracy"]) for name in ("full", *(n for _, n in t.doubled()))}
    gaps = {n: np.mean(v) - np.mean(acc["full"]) for n, v in acc.items() if n != "full"}
    ours = "; ".join(f"{t.by[n][0]['label']} {spread(v)}" for n, v in acc.items())
    worst = max(gaps.values(), key=abs)
    return row("LoRA of every rank reaches the accuracy of full fine-tuning (α = 2r)", PAPER_ACCURACY, ours, abs(worst) <= 0.03,
               f"Holds if no rank's mean is more than 3 points from full fine-tuning's. Largest gap {100 * worst:+.1f} points.")  # fmt: skip


def _full_has_none(t, total):
    found = {eps: t.counts("full", eps) for eps in (0.5, 0.9)}
    return row("Full fine-tuning has hardly any intruder", "a figure: about none", f"{spread(found[0.5], '.1f')} of {total} at ε = .5; "
               f"{spread(found[0.9], '.1f')} at ε = .9", max(found[0.5]) <= 0.01 * total,
               f"k = {analyse.K}, ε = .5 over all matrices. Holds if no seed has more than 1 % of the directions.")  # fmt: skip


def _up_to(t):
    ranks, at = t.doubled(), {}
    for eps in (0.5, 0.9):
        with_some = [r for r, n in ranks if min(t.counts(n, eps)) > max(t.counts("full", eps))]
        at[eps] = max(with_some, default=0)
    ours = "; ".join(f"r = {r}: {spread(t.counts(n, 0.5), '.1f')} (ε = .9: {spread(t.counts(n, 0.9), '.1f')})" for r, n in ranks)
    return row("LoRA has intruders up to r ≈ 16 (α = 2r)", "a figure: RoBERTa-base up to r = 16", ours, 8 <= at[0.5] <= 32,
               f"Holds if the largest rank with more intruders than full fine-tuning in every seed at ε = .5 lies between 8 and 32. It is {at[0.5]} "
               f"at ε = .5 and {at[0.9]} at ε = .9; runs here travel far less than the paper's (see the sweeps).")  # fmt: skip


def _fixed_alpha(t):
    fixed = t.ladder(lambda r: r["alpha"] == 8.0)
    at = {eps: [r for r, n in fixed if min(t.counts(n, eps)) > max(t.counts("full", eps))] for eps in (0.5, 0.9)}
    ours = "; ".join(f"r = {r}: {spread(t.counts(n, 0.5), '.1f')} (ε = .9: {spread(t.counts(n, 0.9), '.1f')})" for r, n in fixed)
    claim, paper = "With α = 8 fixed LoRA has intruders at every rank", "a figure: at every rank, 768 included"
    if len(fixed) < 3:
        return row(claim, paper, ours or "–", None, "This scale has too few ranks with α = 8.")
    return row(claim, paper, ours, len(at[0.5]) == len(fixed),
               f"Holds if every rank has more than full fine-tuning in every seed at ε = .5. At ε = .9 {len(at[0.9])} of {len(fixed)} ranks have.")  # fmt: skip


def _data(t):
    claim, paper = "The count of r = 8 grows with the amount of data, that of r = 1 saturates", "a figure"
    found = {r: [f"{r}_data0.25", f"{r}_data0.5", r, f"{r}_data2"] for r in ("r1", "r8")}
    if [n for names in found.values() for n in names] not in t:
        return row(claim, paper, "–", None, "This scale has no sweep of the amount of data.")
    # The threshold at which r = 8 has enough to be counted, the paper's first.
    eps = next((e for e in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95) if t.mean("r8_data2", lambda r, e=e: count(r["spectra"], eps=e)) >= 5), None)
    series = {r: [np.mean(t.counts(n, eps or 0.95)) for n in names] for r, names in found.items()}
    ours = "; ".join(f"{r[0]} = {r[1:]}: " + ", ".join(f"{x:.1f}" for x in xs) for r, xs in series.items()) + f" at ε = {eps or 0.95:g}"
    if eps is None:
        return row(claim, paper, ours, None, "r = 8 has too few intruders to count even at ε = .95.")
    grows = bool(np.all(np.diff(series["r8"]) >= 0)) and series["r8"][-1] > series["r8"][0]
    last = [xs[-1] / max(xs[-2], 1e-9) for xs in (series["r1"], series["r8"])]
    return row(claim, paper, ours, grows and last[0] < last[1],
               "A quarter, a half, all and twice the data and steps, mean of the seeds. Holds if r = 8 never falls and the last doubling multiplies it "
               f"by more than r = 1's count (× {last[1]:.2f} against × {last[0]:.2f}).")  # fmt: skip


def _seeds(t):
    claim, paper = "The seed matters little for the number of intruders", "a figure"
    groups = [np.array(t.counts(n, 0.9), float) for n in t.by if len(t.by[n]) > 1]
    if len(groups) < 3:
        return row(claim, paper, "–", None, "This scale has one seed.")
    within, means = np.mean([g.var(ddof=1) for g in groups]), np.array([g.mean() for g in groups])
    share = max(0.0, means.var(ddof=1) - within / np.mean([len(g) for g in groups]))
    share = share / (share + within) if share + within else 0.0
    return row(claim, paper, f"{share:.0%} of the variance lies between variants; standard deviation over seeds {within**0.5:.1f}", share >= 0.8,
               "Intraclass correlation of the counts at ε = .9 (there all variants have some). Holds from 80 %.")  # fmt: skip


def _variant(t, prefix, claim, paper, rule, said):
    pairs = [(f"{prefix}{r}", f"r{r}") for r in (1, 8)]
    if [n for pair in pairs for n in pair] not in t:
        return row(claim, paper, "–", None, "This scale does not train it.")
    told = [pair for pair in pairs if not t.collapsed(pair[0])]
    eps = 0.5 if all(t.mean(n, lambda r: count(r["spectra"])) >= 2 for _, n in pairs) else 0.9
    means = [[float(np.mean(t.counts(n, eps))) for n in pair] for pair in told]
    ours = ". ".join(f"ε = {e:g}: " + "; ".join(
        f"{t.by[a][0]['label']} {spread(t.counts(a, e), '.1f')} against {spread(t.counts(b, e), '.1f')}" for a, b in pairs) for e in (0.5, 0.9))  # fmt: skip
    left = "".join(f" {t.by[a][0]['label']} collapsed and is not judged." for a, _ in pairs if t.collapsed(a))
    judged = [rule(*m) for m in means if max(m) >= 2]  # counts of one or none on both sides tell nothing
    return row(claim, paper, ours, all(judged) if judged else None,
               f"Mean of the seeds, r = 1 and r = 8, judged at ε = {eps:g} (.5 where both LoRA ranks have at least two there, else .9). Holds if {said}, at every rank where "
               f"either has two.{left}")  # fmt: skip


def _effective_rank(t):
    claim, paper = "ΔW of full fine-tuning has a high effective rank, of LoRA with r = d a much lower one, with α = 8 lower still", (
        "MNLI, d = 768: full > 400 (.52 d), r = 768 with α = 2r > 100 (.13 d), with α = 8 < 50 (.07 d)")  # fmt: skip
    width = max(r for r, _ in t.doubled())
    names = ("full", f"r{width}", f"r{width}_a8")
    if names not in t or width < 128:
        return row(claim, paper, "–", None, "This scale has no LoRA of full rank.")
    found = [t.values(n, lambda r: r["spectra"]["effective_rank"]) for n in names]
    ours = "; ".join(f"{t.by[n][0]['label']} {spread(v, '.1f')} ({np.mean(v) / width:.2f} d)" for n, v in zip(names, found))
    return row(claim, paper, ours, min(found[0]) > max(found[1]) and min(found[1]) > max(found[2]),
               f"Mean over matrices, d = {width}. Holds if the order is that in every seed; the figures are the paper's only as shares of d.")  # fmt: skip


def _correlated(context, which, measure):
    found = context.value(f"{which}_correlations")

    def pick(target, group, eps):
        return next(c for c in found if (c["target"], c["group"], c["quantity"]) == (target, group, f"intruders, ε = {eps:g}"))

    def said(c):
        return "–" if c["rho"] is None else f"ρ = {c['rho']:.2f} [{c['low']:.2f}, {c['high']:.2f}] (p = {c['p']:.2g}, {c['n']} runs)"

    paper = {"encoder": ("Spearman .971 (RoBERTa-base)", "not significant"), "decoder": ("Spearman .59 (LLaMA2-7B)", "not significant")}[which]
    model = {"encoder": "encoder", "decoder": "language model"}[which]
    out = []
    for target, claim, figure in ((measure, f"Intruders go with forgetting ({model})", paper[0]),
                                  ("accuracy", f"Intruders do not go with accuracy ({model})", paper[1])):  # fmt: skip
        main, at9, lora = pick(target, "all runs", 0.5), pick(target, "all runs", 0.9), pick(target, "LoRA, no sweeps", 0.5)
        verdict = None if main["rho"] is None or main["n"] < 8 else main["low"] > 0 if target == measure else main["p"] > 0.05
        rule = "the bootstrap interval lies above 0" if target == measure else "p > .05"
        few = f"; {main['n']} runs are too few to tell" if verdict is None else ""
        out.append(row(claim, figure, f"{said(main)} at ε = .5; {said(at9)} at ε = .9; LoRA without the sweeps {said(lora)}", verdict,
                       f"Over all runs. Holds if {rule}{few}. Forgetting is the rise of the {analyse.MEASURES[which][measure]}."))  # fmt: skip
    return out


def _less_and_more(t, measure):
    def rises(name):
        return t.values(name, lambda r: r["forgotten"][measure])

    equal = [n for _, n in t.doubled() if abs(t.mean(n, lambda r: r["accuracy"]) - t.mean("full", lambda r: r["accuracy"])) <= 0.02]
    ours = "; ".join(f"{t.by[n][0]['label']} {spread(rises(n), '+.3f').replace('± +', '± ')}" for n in ("full", *equal))
    less = float(np.mean([np.mean(rises(n)) for n in equal])) < np.mean(rises("full")) if equal else None
    out = [row("LoRA forgets less than full fine-tuning at equal accuracy", "a figure", ours, less,
               "Ranks (α = 2r) whose mean accuracy is within 2 points of full fine-tuning's; rise of the loss in nats. Holds if they forget less in "
               "their mean.")]  # fmt: skip
    claim, names = "At a large learning rate LoRA forgets more than full fine-tuning", [("r1_lr2", "full_lr2"), ("r8_lr4", "full_lr4")]
    if [n for pair in names for n in pair] not in t:
        return [*out, row(claim, "a figure", "–", None, "This scale has no sweep of learning rates.")]
    ours = "; ".join(f"{t.by[a][0]['label']} {spread(rises(a), '+.3f')} against {spread(rises(b), '+.3f')}" for a, b in names).replace("± +", "± ")
    fallen = "".join(f" {t.by[a][0]['label']} collapsed." for a, _ in names if t.collapsed(a))
    return [*out, row(claim, "a figure", ours, all(np.mean(rises(a)) > np.mean(rises(b)) for a, b in names),
                      "The largest multiples of the main learning rates, which are in the paper's ratio. Holds if so at both, in the mean." + fallen)]  # fmt: skip


# The intervention


def edits(context, which, measure):
    """``{variant: {(control, which, factor): {accuracy, forgetting, runs}}}``: % changes over the runs that forgot something.

    accuracy = 100 (a(λ) / a(1) − 1), mean over runs; forgetting = 100 Σ (L(λ) − L(1)) / Σ (L(1) − L(base)), pooled, because
    the share of a single run that hardly forgot says nothing.
    """
    base, out, task = context.value(f"{which}_base"), {}, analyse.task(which)
    for variant in editing.variants(context.setting, which):
        runs = [r for r in context.value(f"{which}_edit_{variant}").values() if r["rows"]]
        cells = {}
        for i in range(len(runs[0]["rows"]) if runs else 0):
            key = tuple(runs[0]["rows"][i][k] for k in ("control", "which", "factor"))
            acc = [100 * (r["rows"][i]["scores"][task]["accuracy"] / r["tuned"][task]["accuracy"] - 1) for r in runs]
            induced = [r["tuned"][measure]["loss"] - base[measure]["loss"] for r in runs]
            change = [r["rows"][i]["scores"][measure]["loss"] - r["tuned"][measure]["loss"] for r in runs]
            cells[key] = {"accuracy": acc, "change": change, "induced": induced,
                          "forgetting": 100 * sum(change) / sum(induced) if sum(induced) > 0.01 * len(runs) else None}  # fmt: skip
        out[variant] = cells
    return out


def edit_label(context, which, variant):
    """An edited variant in the report's words, with the threshold of its intruders."""
    eps = editing.measuring.how(context.setting, which).edits.variants[variant]
    return f"{getattr(context.setting, which).variants[variant].label} (ε = {eps:g})"


ENOUGH = 0.25  # share of the matrices that must have an intruder before its removal can be expected to show


def _edited(context, which, measure):
    found = {v: c for v, c in edits(context, which, measure).items() if c and all(x["forgetting"] is not None for x in c.values())}
    labels = {v: edit_label(context, which, v) for v in found}
    model = {"encoder": "encoder", "decoder": "language model"}[which]
    claim = f"Scaling the top intruders down undoes forgetting at little cost of accuracy ({model})"
    paper = PAPER_EDIT if which == "encoder" else "LLaMA2-7B MetaMath r = 16: λ = .7 −2.7 %/−28.2 %; r = 256: λ = .5 1.8 %/−25.2 %"
    if not found:
        return [row(claim, paper, "–", None, "No edited run both has intruders and forgot something.")]
    total = analyse.rows(context, which)[0]["spectra"]["matrices"]
    matrices = {v: float(np.mean([r["matrices"] for r in context.value(f"{which}_edit_{v}").values()])) for v in found}
    judged = [v for v in found if matrices[v] >= ENOUGH * total]
    few = "".join(f" {labels[v]} is not judged: {matrices[v]:.1f} of {total} matrices have an intruder." for v in found if v not in judged)

    def said(control):
        return "; ".join(f"{labels[v]}, λ = {f:g}: {np.mean(c['accuracy']):+.1f} %/{c['forgetting']:+.1f} %"
                         for v in found for f in (0.3, 0.7) if (c := found[v].get((control, "top", f))))  # fmt: skip

    def verdict(rule):
        return all(map(rule, judged)) if judged else None

    def at(v, control, factor=0.7):
        return found[v][control, "top", factor]

    near = {v: [c for (control, _, f), c in found[v].items() if control == "neighbour" and f < 1] for v in found}
    return [
        row(claim, paper, said("none"), verdict(lambda v: at(v, "none")["forgetting"] < -5 and np.mean(at(v, "none")["accuracy"]) > -2),
            "Change of accuracy / of the forgetting that fine-tuning had induced. Holds if at λ = .7 more than 5 % of the forgetting and less than 2 % "
            f"of the accuracy goes, in every variant with an intruder in at least a quarter of its matrices.{few}"),
        row(f"Control: scaling the neighbouring pretrained direction hurts accuracy and forgetting ({model})", "both get worse for λ < 1", said("neighbour"),
            verdict(lambda v: all(c["forgetting"] > 0 and np.mean(c["accuracy"]) < 0 for c in near[v])),
            f"Holds if forgetting grows and accuracy falls at every λ < 1 that was tried, in the same variants.{few}"),
        row(f"Control: removing the intruder does better than a uniform shrink of ΔW of the same norm ({model})",
            "not in the paper; an independent note says that it does not", said("shrink"),
            verdict(lambda v: at(v, "none")["forgetting"] < at(v, "shrink")["forgetting"]),
            f"Holds if at λ = .7 the intruder's edit undoes more forgetting than the shrink of ΔW by as much, in the same variants.{few}"),
    ]  # fmt: skip


# The language model and the sanity case


def _of_decoder(context):
    t, measure = Table(context, "decoder"), _main(context, "decoder")
    found = {n: t.counts(n) for n in ("full", *(n for _, n in t.doubled()))}
    ours = "; ".join(f"{t.by[n][0]['label']} {spread(v, '.1f')} (ε = .9: {spread(t.counts(n, 0.9), '.1f')})" for n, v in found.items())
    low = t.doubled()[0][1]
    out = [row("Language models: LoRA has intruders, full fine-tuning hardly any", "LLaMA2-7B: LoRA up to r = 256, full hardly any", ours,
               min(found[low]) > max(found["full"]) and max(found["full"]) <= 0.1 * t.found[0]["spectra"]["matrices"],
               "Holds if the lowest rank has more than full fine-tuning in every run, and full at most one in ten matrices (k = 10, ε = .5). "
               "How far up the ranks go cannot be told: the runs are short.")]  # fmt: skip
    return out + _correlated(context, "decoder", measure) + _edited(context, "decoder", measure)


def _sanity(context):
    found = context.value("sanity")["rows"]
    by = {s: sorted({r["intruders"] for r in found if r["spike"] == s}) for s in sorted({r["spike"] for r in found})}
    ok = all(n == [0] for s, n in by.items() if s <= 0.25) and all(n == [1] for s, n in by.items() if s > 1)
    ours = "; ".join(f"λ = {s:g} σ₁: {' or '.join(map(str, n))}" for s, n in by.items())
    return [row("Sanity: W Gaussian, W + λ v vᵀ with a random v", "0 intruders for λ well under σ₁(W), exactly 1 above", ours, ok,
               "768 × 768, three draws, k = 10, ε = .5. Holds if 0 at λ ≤ σ₁/4 and 1 at every λ above σ₁. In between the spike's own singular value, "
               "λ + n/λ, already exceeds σ₁.")]  # fmt: skip


