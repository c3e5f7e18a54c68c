"""Every claim of the two papers as a row: what they say and where, ours, and what ours says; all of it read from the parts."""

import numpy as np

from experiments.mechanisms.report import best_factor, curves, ends, priors, value
from experiments.mechanisms.settings import CONTROL
from experiments.study import spread

HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be tested here"
HIDDEN, CLEAR = 0.2, 0.1  # a capability is hidden once it has lost this much accuracy; a difference that counts
FEW = 20  # neurons; the paper prunes 5 to 15
ETA = {"medium": "η_M", "small": "η_S"}


def rows(context):
    made = (_weak, _strong, _plummets, _prune, _probe, _revert, _unlearn, _alias, _localised, _untested,
            _mixture, _tradeoff, _near, _conjugate, _models, _views)  # fmt: skip
    return [row for fn in made for row in fn(context)]


def _row(claim, paper, ours, verdict, why):
    return {"claim": claim, "paper": paper, "ours": ours, "verdict": verdict, "why": why}


def _verdict(holds, testable=True):
    return OPEN if not testable else HOLDS if holds else FAILS


def _weakest(context):
    return next(iter(context.setting.counting.priors))


def _strongest(context):
    return list(context.setting.counting.priors)[-1]


def _p(values):
    return spread([100 * v for v in values], ".0f") + " %"


def _weak(context):
    """Figure 5c."""
    found = priors(context, "tune")[_weakest(context)]["rows"]
    with_it, without = (ends(found, t, rate="medium", correlation=1.0) for t in ("tuned_spurious", "tuned_clean"))
    yield _row(
        "With a weakly relevant capability (low prior of b) the fine-tuned model is right only where the spurious attribute is",
        "Fig. 5c: high accuracy for C_Te = 1, low for C_Te = 0",
        f"C_Tr = 1, η_M: {_p(with_it)} with the attribute, {_p(without)} without",
        _verdict(np.mean(with_it) > np.mean(without) + CLEAR, np.mean(with_it) > 0.5),
        "Without the attribute every row is wrong for a model that adds one to the count of a.")  # fmt: skip


def _strong(context):
    """Figure 5a, b against c, imperfect correlation."""
    found, mixed = priors(context, "tune"), [c for c in context.setting.counting.correlations["medium"] if 0 < c < 1]
    if not mixed:
        return
    c = max(mixed)
    low, high = (ends(found[p]["rows"], "tuned_clean", rate="medium", correlation=c) for p in (_weakest(context), _strongest(context)))
    before = [s["tuned_clean"] for s in value(context, f"pretrain_{_strongest(context)}")["seeds"].values()]
    yield _row(
        "With a strongly relevant capability (high prior of b) an imperfect correlation is not exploited",
        "Fig. 5a, b: high accuracy for C_Te = 0 too",
        f"C_Tr = {c:g}, C_Te = 0: {_p(high)} after a high prior (before: {_p(before)}), {_p(low)} after a low one",
        _verdict(np.mean(high) > np.mean(low) + CLEAR),
        "η_M. Here the high prior has already taught the count of b; in the paper fine-tuning still improves it.")  # fmt: skip


def _plummets(context):
    """Figure 6."""
    found, weak = priors(context, "tune"), _weakest(context)
    low, high = (ends(found[p]["rows"], "pretrained", rate="medium", correlation=1.0) for p in (weak, _strongest(context)))
    yield _row(
        "Accuracy on the pretrained task falls most where the prior of b was low",
        "Fig. 6: it plummets for the low prior, less for the high one",
        f"count a after C_Tr = 1, η_M: {_p(low)} (low prior), {_p(high)} (high)",
        _verdict(np.mean(high) > np.mean(low) + CLEAR), "Asked for with the family token that fine-tuning uses.")  # fmt: skip
    both = [c for c in (0.0, 1.0) if c in context.setting.counting.correlations["small"]]
    rate = "small" if len(both) == 2 else "medium"
    none, full = (ends(found[weak]["rows"], "pretrained", rate=rate, correlation=c) for c in (0.0, 1.0))
    other = ends(found[weak]["rows"], "pretrained", rate="medium", correlation=0.0)
    yield _row(
        "For the low prior it falls more the stronger the spurious correlation", "Fig. 6, section 5.1",
        f"count a, C_Tr = 1 against 0: {_p(full)}, {_p(none)} ({ETA[rate]}); {_p(low)}, {_p(other)} (η_M)",
        _verdict(np.mean(full) < np.mean(none) - CLEAR), f"Judged at {ETA[rate]}: where both are at chance there is nothing to compare.")  # fmt: skip


def _best_pruned(found, rate, score, few):
    """Per seed ``(count a before, after, count b before, after)`` at the number of neurons that is best for the count of a."""
    steps, first = curves(found, "pretrained", rate=rate, correlation=1.0, score=score)
    second = curves(found, "tuned_spurious", rate=rate, correlation=1.0, score=score)[1]
    places = [max((steps.index(n) for n in few), key=ys.__getitem__) for ys in first]
    return np.asarray([(a[0], a[i], b[0], b[i]) for a, b, i in zip(first, second, places, strict=True)]).T


def _prune(context):
    """Figure 7."""
    found, few = priors(context, "prune")[_weakest(context)]["rows"], [n for n in context.setting.counting.prune if n <= FEW]
    whole = [s["pretrained"] for s in value(context, f"pretrain_{_weakest(context)}")["seeds"].values()]
    for rate, paper in (("small", "Fig. 7b: count a comes back after 5 to 15 neurons, and count b falls"), ("medium", "Fig. 7a: less so")):
        was, now, tuned, after = _best_pruned(found, rate, "first-order", few)
        control, free = _best_pruned(found, rate, "random", few)[1], _best_pruned(found, rate, "movement", few)[1]
        hidden = was.mean() < 1 - HIDDEN
        share = (now.mean() - was.mean()) / max(np.mean(whole) - was.mean(), HIDDEN)
        holds = share >= 0.5 and now.mean() > control.mean() + CLEAR and tuned.mean() - after.mean() > CLEAR
        yield _row(
            f"Pruning a few neurons revives the pretrained task ({ETA[rate]}, C_Tr = 1, low prior)", paper,
            f"count a {_p(was)} to {_p(now)} with at most {FEW} neurons (random {_p(control)}, movement {_p(free)}); "
            f"count b {_p(tuned)} to {_p(after)}",
            _verdict(holds, hidden),
            f"Best number of neurons for each seed and score. {share:.0%} of the loss is undone; holds if half is, b falls, and random "
            "neurons do not do it." if hidden else "Fine-tuning at this rate has not hidden the count of a: nothing to revive.")  # fmt: skip


def _last_probe(found, count, **chosen):
    return [r[count][-1] for r in found if all(r[k] == v for k, v in chosen.items())]


def _probe(context):
    """Figure 8."""
    found, control = priors(context, "probe"), value(context, f"probe_{CONTROL}")["rows"]
    floor, early = _last_probe(control, "pretrained"), [max(r["pretrained"]) for r in control]
    for prior in (_weakest(context), _strongest(context)):
        v = found[prior]["rows"]
        before = _last_probe(v, "pretrained", model="pretrained")
        ours = {(r, c): _last_probe(v, "pretrained", rate=r, correlation=c) for r, c in (("medium", 0.0), ("medium", 1.0), ("small", 1.0))}
        said = "; ".join(f"{ETA[r]}, C_Tr = {c:g}: {_p(x)}" for (r, c), x in ours.items() if x)
        middle = (np.mean(before) + np.mean(floor)) / 2
        yield _row(
            f"A linear probe still reads the count of a after fine-tuning ({prior} prior)",
            "Fig. 8: as from the pretrained model; a drop only at η_M with a low prior",
            f"last block: pretrained {_p(before)}; {said}; never counted a {_p(floor)}",
            _verdict(all(np.mean(x) > middle for x in ours.values() if x), np.mean(before) > np.mean(floor) + CLEAR),
            "Holds if every probe is nearer to the pretrained model's than to that of the model that never counted a. The last block, "
            f"because an earlier one of that control gives {_p(early)}: one attention layer counts every letter at once.")  # fmt: skip


def _steps(found, steps, **chosen):
    """Steps until solved, the whole run where it never was; how many seeds were; how many there are."""
    found = [r["solved"] for r in found if all(r[k] == v for k, v in chosen.items())]
    return [steps if t is None else t for t in found], sum(t is not None for t in found), len(found)


def _told(found, steps):
    taken, solved, seeds = found
    return f"{spread(taken, '.0f')} steps" if solved == seeds else f"over {steps} steps for {seeds - solved} of {seeds} seeds"


def _speed(found, **chosen):
    """Mean accuracy over the run by seed: also tells runs apart that are not solved by its end."""
    out = []
    for r in found:
        if all(r[k] == v for k, v in chosen.items()):
            steps = np.asarray([int(t) for t in r["curve"]], float)
            out.append(float(np.trapezoid(list(r["curve"].values()), steps) / np.ptp(steps)))
    return out


def _baselines(context):
    """({name: mean accuracy over the run by seed}, the steps that they take, in words)."""
    control, steps = value(context, f"revert_{CONTROL}")["rows"], context.setting.counting.revert_steps
    names = ("Scr. + FT", "from scratch")
    return {n: _speed(control, start=n) for n in names}, "; ".join(f"{n}: {_told(_steps(control, steps, start=n), steps)}" for n in names)


def _revert(context):
    """Figure 9."""
    steps, (base, others) = context.setting.counting.revert_steps, _baselines(context)
    for prior, v in priors(context, "revert").items():
        back = {c: _steps(v["rows"], steps, start=f"C={c}") for c in (0, 1)}
        ours = {c: _speed(v["rows"], start=f"C={c}") for c in back}
        slowest = min(np.mean(x) for x in ours.values())
        yield _row(
            f"Reverse fine-tuning brings counting a back in far fewer steps than learning it takes ({prior} prior)",
            "Fig. 9: 0.1–1 K iterations (high, medium prior), 3 K (low), 4.5 K for Scr. + FT",
            f"C_Tr = 0: {_told(back[0], steps)}; C_Tr = 1: {_told(back[1], steps)}; {others}",
            _verdict(all(slowest > np.mean(b) + CLEAR for b in base.values())),
            f"Steps to 95 %, all at one rate. Mean accuracy on the way: {_p(ours[0])}, {_p(ours[1])}; "
            + ", ".join(f"{n} {_p(b)}" for n, b in base.items()) + ".")  # fmt: skip


def _unlearn(context):
    """Appendix E.4, figures 28 and 30."""
    steps, (base, others) = context.setting.counting.revert_steps, _baselines(context)
    for prior, v in priors(context, "revert").items():
        gone, ours = ends(priors(context, "unlearn")[prior]["rows"], "pretrained"), _speed(v["rows"], start="unlearnt")
        back, usual = _steps(v["rows"], steps, start="unlearnt"), _steps(v["rows"], steps, start="C=1")
        yield _row(
            f"Training the model to answer wrongly (randFT) does not remove the capability either ({prior} prior)",
            "Fig. 28: reFT of randFT is about as fast as reFT, and faster than Scr. + FT and from scratch",
            f"count a {_p(gone)} after unlearning; back in {_told(back, steps)} (after C_Tr = 1: {_told(usual, steps)}; {others})",
            _verdict(all(np.mean(ours) > np.mean(b) for b in base.values()), np.mean(gone) < 1 - HIDDEN),
            "`count a` was answered with the count of b. Judged by mean accuracy on the way back: "
            f"{_p(ours)}; " + ", ".join(f"{n} {_p(b)}" for n, b in base.items()) + ".")  # fmt: skip


def _alias(context):
    """Appendix E.2, figure 24."""
    for prior, v in priors(context, "tune").items():
        asked, alias = (ends(v["rows"], t, rate="medium", correlation=1.0) for t in ("pretrained", "alias"))
        strong = prior == _strongest(context)
        clean = [ends(v["rows"], t, rate="medium", correlation=0.0) for t in ("pretrained", "alias")]
        yield _row(
            f"Jailbreak: with a {prior} prior a family token that fine-tuning did not use "
            f"{'still gets the count of a' if strong else 'does not help'}",
            "Fig. 24: perfectly for a sufficiently high prior" if strong else "Fig. 24: not for the low prior",
            f"count a by the token fine-tuned on, and by the other: {_p(asked)}, {_p(alias)} (C_Tr = 1); {_p(clean[0])}, {_p(clean[1])} (C_Tr = 0)",
            _verdict(np.mean(alias) > 0.9 if strong else np.mean(alias) < 0.9),
            "η_M, judged at C_Tr = 1. Both tokens meant the same in pretraining, and here fine-tuning reaches both alike.")  # fmt: skip


def _localised(context):
    """Section 1's "extremely localized", as a graft."""
    v, shares = priors(context, "graft")[_weakest(context)]["rows"], context.setting.counting.shares
    found = [r for r in v if r["rate"] == "medium" and r["correlation"] == 1.0]
    tuned, base = np.mean([r["tuned"]["tuned_spurious"] for r in found]), np.mean([r["base"]["pretrained"] for r in found])

    def least(which, test, wanted):
        means = np.mean([[c[which][test] for c in r["curve"]] for r in found], axis=0)
        return next((s for s, a in zip(shares, means, strict=True) if a >= wanted), None)

    keep, back = least("kept", "tuned_spurious", 0.9 * tuned), least("removed", "pretrained", 0.9 * base)
    told = [f"{s:.1%}" if s else f"more than {shares[-1]:.0%}" for s in (keep, back)]
    yield _row(
        "The wrapper is a few weights: they carry the new behaviour, and without them the old one is back",
        "Section 1: wrappers are extremely localised (no share is given)",
        f"90 % of the new accuracy from {told[0]} of the parameters grafted on the base; 90 % of count a back after removing {told[1]}",
        _verdict(bool(keep and back and max(keep, back) <= 0.1), np.mean([r["tuned"]["pretrained"] for r in found]) < base - HIDDEN),
        "Magnitude grafts over all parameters, low prior, C_Tr = 1, η_M; holds if a tenth does both. AdamW without an L1 pull moves every "
        "parameter about alike, so the largest changes are not a region.")  # fmt: skip


def _untested(context):
    del context
    yield _row(
        "Attention maps of compiled Tracr models keep looking at the pretrained token", "Fig. 10", "–", OPEN,
        "Needs the Tracr compiler; its Counter task on letters is here as procedural:counter.")  # fmt: skip
    yield _row(
        "A fine-tuned story model keeps the feature it was trained to drop",
        "Fig. 11, table 1: probes barely fall, reFT within 30–300 iterations", "–", OPEN, "Needs TinyStories and a 91 M-parameter model trained on it.")  # fmt: skip


def _mixture(context):
    v = context.value("icl_pretrain")
    best = {name: float(np.mean(v["optimal"]["mixture"][name])) for name in ("discrete", "continuous")}
    ours = {name: [float(np.mean(s[name])) for s in v["seeds"].values()] for name in best}
    nothing = {name: v["optimal"]["mixture"][name][0] for name in best}  # no pair seen: what a constant gets
    gap = {name: (np.mean(ours[name]) - best[name]) / (nothing[name] - best[name]) for name in best}
    yield _row(
        "A transformer pretrained on the mixture comes close to the Bayes-optimal mixture estimator", "arXiv:2309.10105, section 2 (curves)",
        "; ".join(f"{name} {spread(ours[name])}, optimal {best[name]:.3f}" for name in best), _verdict(max(gap.values()) < 0.15),
        f"Mean squared error over places; holds within 15 % of the way from optimal to knowing nothing ({max(gap.values()):.0%} here).")  # fmt: skip


def _tradeoff(context):
    seeds = [list(s.values()) for s in context.value("icl_tune")["seeds"].values()]
    change = {name: [np.mean(s[-1][name]) - np.mean(s[0][name]) for s in seeds] for name in ("discrete", "continuous")}
    yield _row(
        "Fine-tuning on the discrete tasks improves them at the expense of the continuous ones", "Abstract and section 2 (curves)",
        f"error change: discrete {spread(change['discrete'])}, continuous {spread(change['continuous'])}",
        _verdict(max(change["discrete"]) < 0 < min(change["continuous"])), "Mean squared error over places; every seed has to agree.")  # fmt: skip


def _near(context):
    v = context.value("icl_near")
    before, after = (np.asarray([s[m] for s in v["seeds"].values()]) for m in ("pretrained", "tuned"))
    rise, ratio = (after - before).mean(0), (after / before - 1).mean(0)
    peak = int(np.argmax(ratio))
    way = rise / (np.asarray(v["optimal"]["discrete"]) - before.mean(0))
    yield _row(
        "Forgetting is worst for continuous tasks near the fine-tuning tasks, and slighter far from them",
        "Abstract and section 2: the drop is largest close to the fine-tuning distribution",
        "rise of the error by distance: " + ", ".join(f"{d:.2f}: {r:+.2f} ({x:+.0%})" for d, r, x in zip(v["distances"], rise, ratio, strict=True)),
        _verdict(peak < len(ratio) - 1 and ratio[peak] > 2 * ratio[-1] and ratio[0] > ratio[-1]),
        f"Gaussian tasks in bins by the nearest discrete task; the relative rise is largest in bin {peak + 1} of {len(ratio)}. Holds if that "
        "is over twice the farthest bin's, and the nearest bin's is larger than it too. Of the way to the discrete estimator's error the model "
        f"has gone {way[0]:.0%} in the nearest bin and {way[-1]:.0%} in the farthest.")  # fmt: skip


def _conjugate(context):
    v = context.value("icl_conjugate")
    seeds, best, one = v["seeds"].values(), best_factor(v), v["factors"].index(1.0)
    plain, scaled = ([float(np.mean(s["tuned"]["continuous"][i])) for s in seeds] for i in (one, v["factors"].index(best)))
    before = [float(np.mean(s["pretrained"]["continuous"][one])) for s in seeds]
    control = [min(float(np.mean(e)) for e in s["shrunk"]["continuous"]) for s in seeds]
    back = [(p - c) / (p - b) for p, c, b in zip(plain, scaled, before, strict=True)]
    yield _row(
        "Conjugate prompting (labels times γ, answer over γ) recovers part of the lost regression", "Abstract and section 3 (curves)",
        f"continuous error {spread(plain)} at γ = 1, {spread(scaled)} at γ = {best:g}, pretrained {spread(before)}: "
        f"{_p(back)} of the loss undone; dividing the answer alone: {spread(control)} at best",
        _verdict(best > 1 and np.all(np.less(scaled, np.minimum(plain, control))) and np.mean(back) > 0.1, np.mean(plain) > np.mean(before)),
        "γ chosen on the mean of the seeds, the control's for each seed; holds if γ > 1, every seed gains, more than by the control, and a "
        "tenth of the loss is undone.")  # fmt: skip


def _models(context):
    del context
    yield _row(
        "Prompts in other languages recover what tuned language models no longer do in English", "Abstract, sections 4 and 5", "–", OPEN,
        "Needs pairs of pretrained and instruction-tuned language models and a translator.")  # fmt: skip


def _views(context):
    """The first founding study's claim on these models."""
    for name, label in (("spectra", "counting"), ("icl_spectra", "regression")):
        found = context.value(name)["rows"]
        methods = list(dict.fromkeys(r["method"] for r in found))
        count, cosine = ({m: [r[k] for r in found if r["method"] == m] for m in methods} for k in ("intruders", "lowest_cosine"))
        low = methods[1]
        yield _row(
            f"Low-rank adapters bring intruder dimensions, full fine-tuning hardly any ({label})",
            "arXiv:2410.21228: up to r ≈ 16 in RoBERTa, hardly any for full fine-tuning",
            "; ".join(f"{m}: {spread(count[m], '.1f')}, lowest cosine {spread(cosine[m], '.2f')}" for m in methods),
            _verdict(sum(count[low]) > sum(count["full"]) and max(cosine[low]) < min(cosine["full"])),
            f"Of {found[0]['matrices']} matrices × 10 directions, ε = 0.5, which few pass: matrices this small have high cosines by chance. "
            f"Holds if {low} has more in all seeds together and its lowest cosines are lower in every seed.")  # fmt: skip
