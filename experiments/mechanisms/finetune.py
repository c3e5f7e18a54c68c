"""The procedural-task study of arXiv:2311.12786: pretrain, fine-tune, probe, prune, revert."""

import functools

import jax
import numpy as np

from experiments.mechanisms import counting, engine
from experiments.mechanisms.settings import CONTROL
from ft_jax import tree
from ft_jax.analysis import probe
from ft_jax.objectives import inputs_of
from ft_jax.weights import prune

SOLVED = 0.95  # accuracy at which a capability counts as there


def path(context, *names):
    return context.workdir / "models" / f"{'-'.join(str(n).replace(' ', '_') for n in names)}.safetensors"


def model_of(context, *names):
    return engine.kept(path(context, *names))


def fit(context, params, families, prior, spurious, *, seed, steps, rate, marks=(), answer=None, tests=tuple(counting.TESTS), mask=None):
    s = context.setting.counting
    model = counting.make(s)
    draw = counting.stream(seed, s.batch, s.length, families, prior, spurious, answer)
    return engine.fit(counting.objective(model), params, draw, steps=steps, rate=rate, marks=marks, mask=mask,
                      evaluate=lambda p: counting.scores(model, p, s, tests))  # fmt: skip


def pretrain(context, prior):
    """One model a seed; {seeds: {seed: {test: accuracy}}}. The control counts b alone, all else being the same."""
    s = context.setting.counting
    weights = counting.only(counting.TUNED) if prior == CONTROL else s.priors[prior]
    families = tuple(f for f in s.families if not (prior == CONTROL and f == "recount"))
    out = {}
    for seed in s.seeds:
        start = engine.fresh(counting.make(s), seed)
        params, seen, _ = fit(context, start, families, weights, counting.NATURAL, seed=seed, steps=s.steps, rate=s.rate, marks=(s.steps,))
        engine.keep(path(context, prior, seed), params)
        out[str(seed)] = seen[s.steps]
    return {"prior": weights, "families": families, "parameters": tree.count(params), "seeds": out}


def tune(context, prior):
    """Fine-tunes to count b, for each rate and correlation; rows {rate, correlation, seed, curve: {step: {test: accuracy}}}."""
    s, rows = context.setting.counting, []
    for seed in s.seeds:
        base = model_of(context, prior, seed)
        for name, rate in s.rates.items():
            for spurious in s.correlations[name]:
                params, seen, _ = fit(context, base, ("count",), counting.only(counting.TUNED), spurious, seed=1000 + seed,
                                       steps=s.tune_steps, rate=rate, marks=s.tune_marks)  # fmt: skip
                engine.keep(path(context, prior, name, spurious, seed), params)
                rows.append({"rate": name, "correlation": spurious, "seed": seed, "curve": seen})
    return {"rows": rows}


def unlearn(context, prior):
    """randFT (appendix E.4): trains the model to answer ``count a`` with the count of b, so that it unlearns counting a."""
    s, rows = context.setting.counting, []
    for seed in s.seeds:
        params, seen, _ = fit(context, model_of(context, prior, seed), ("count",), counting.only(counting.PRETRAINED), 0.0, seed=2000 + seed,
                               steps=s.tune_steps, rate=s.rates["medium"], marks=s.tune_marks, answer=counting.TUNED)  # fmt: skip
        engine.keep(path(context, prior, "unlearnt", seed), params)
        rows.append({"seed": seed, "curve": seen})
    return {"rows": rows}


def revert(context, prior):
    """reFT: steps until the count of a is back. Starts: fine-tuned, unlearnt; for the control: Scr. + FT and random weights."""
    s, rows = context.setting.counting, []
    for seed in s.seeds:
        starts = {"Scr. + FT": model_of(context, CONTROL, seed), "from scratch": engine.fresh(counting.make(s), 100 + seed)}
        if prior != CONTROL:
            starts = {f"C={c:g}": model_of(context, prior, "medium", c, seed) for c in (0.0, 1.0)}
            starts["unlearnt"] = model_of(context, prior, "unlearnt", seed)
        for name, params in starts.items():
            _, seen, _ = fit(context, params, ("count",), counting.only(counting.PRETRAINED), 0.0, seed=3000 + seed, steps=s.revert_steps,
                              rate=s.revert_rate, marks=s.revert_marks, tests=("pretrained",))  # fmt: skip
            curve = {step: found["pretrained"] for step, found in seen.items()}
            rows.append({"start": name, "seed": seed, "curve": curve, "solved": next((t for t, a in curve.items() if a >= SOLVED), None)})
    return {"rows": rows, "steps": s.revert_steps}


def _features(context, params, operand, rows, seed):
    """(residual stream at the answer request [layers + 1, rows, d], counts of the operand) on prompts that ask for it."""
    s = context.setting.counting
    batch = counting.batch(np.random.default_rng(seed), rows, s.length, ("count",), counting.only(operand), 0.0)
    found = probe.residuals(counting.make(s).apply, params, [inputs_of(batch)], place=-2)
    return found, batch["input_ids"][:, -1] - counting.ids(s.length)["0"]


def probes(context, prior):
    """Held-out accuracy of linear probes for both counts after every block: rows {model, rate, correlation, seed, pretrained, tuned}."""
    s, rows = context.setting.counting, []
    for seed in s.seeds:
        models = {("pretrained", None, None): (prior, seed)}
        if prior != CONTROL:
            models |= {("tuned", r, c): (prior, r, c, seed) for r in s.rates for c in s.correlations[r]}
            models[("unlearnt", None, None)] = (prior, "unlearnt", seed)
        for (kind, rate, spurious), names in models.items():
            params, row = model_of(context, *names), {"model": kind, "rate": rate, "correlation": spurious, "seed": seed}
            for count, operand in (("pretrained", counting.PRETRAINED), ("tuned", counting.TUNED)):
                train, test = (_features(context, params, operand, n, 4000 + i) for i, n in enumerate(s.probe_rows))
                row[count] = probe.probe(train, test, s.length + 1).tolist()
            rows.append(row)
    return {"rows": rows}


SCORES = ("first-order", "movement", "random")


@functools.lru_cache(maxsize=2)
def _gradient(model):
    run = counting.objective(model)
    return jax.jit(jax.grad(lambda params, rows: run(params, rows, None)[0]))


def _pruned(context, base, params, score, seed):
    """``count -> mask`` of neurons by a score; the gradient is that of the loss on the pretrained task, on rows of its own."""
    s = context.setting.counting
    if score == "first-order":
        rows = counting.batch(np.random.default_rng(5000 + seed), s.test_rows, s.length, ("count",), counting.only(counting.PRETRAINED), 0.0)
        found = prune.first_order(params, _gradient(counting.make(s))(params, rows))
    else:
        found = prune.movement(base, params)
    found = prune.of_units(found, "neuron")
    rng = np.random.default_rng(6000 + seed)
    return (lambda n: prune.random(found, n, rng)) if score == "random" else (lambda n: prune.top(found, n))


def pruning(context, prior):
    """Accuracy on both tasks by the number of neurons pruned: rows {rate, correlation, seed, score, curve: {count: {test: accuracy}}}."""
    s, rows, tests = context.setting.counting, [], ("pretrained", "tuned_spurious", "tuned_clean")
    model = counting.make(s)
    for seed in s.seeds:
        base = model_of(context, prior, seed)
        for rate in s.rates:
            for spurious in (c for c in s.correlations[rate] if c in (0.0, 1.0)):
                params = model_of(context, prior, rate, spurious, seed)
                whole = counting.scores(model, params, s, tests)
                for score in SCORES:
                    mask_of = _pruned(context, base, params, score, seed)
                    curve = {n: counting.scores(model, prune.apply(params, mask_of(n)), s, tests) for n in s.prune}
                    rows.append({"rate": rate, "correlation": spurious, "seed": seed, "score": score, "curve": {0: whole, **curve}})
    return {"rows": rows, "neurons": sum(m.size for m in mask_of(0).values())}
