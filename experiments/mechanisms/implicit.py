"""Implicit inference (arXiv:2309.10105): a mixture is learnt, one branch is fine-tuned, the other comes back by conjugate prompting."""

import functools

import jax
import numpy as np

from experiments.mechanisms import engine, regression
from experiments.mechanisms.finetune import path
from ft_jax import tree

TASK_SEED = 77  # of the discrete distribution


@functools.lru_cache(maxsize=2)
def make(s):
    return regression.make(s.dimension, s.layers, s.width, s.heads)


@functools.lru_cache(maxsize=2)
def objective(s):
    return make(s).objective


@functools.lru_cache(maxsize=2)
def apply(s):
    return jax.jit(make(s).apply)


def known(s):
    return regression.tasks(s.tasks, s.dimension, TASK_SEED)


def model_of(context, *names):
    return engine.kept(path(context, *names))


def stream(s, seed, share):
    rng = np.random.default_rng(seed)

    def draw(count):
        made = [regression.prompts(rng, regression.draw_weights(rng, s.batch, known(s), share), s.pairs, s.noise) for _ in range(count)]
        return {k: np.stack([b[k] for b in made]) for k in made[0]}

    return draw


@functools.lru_cache(maxsize=4)
def tests(s):
    """``{branch: (prompts, w·x)}``: fresh prompts of each branch and the noiseless truth that errors are measured against."""
    out = {}
    for i, (name, share) in enumerate((("discrete", 1.0), ("continuous", 0.0))):
        rng = np.random.default_rng(10**6 + i)
        out[name] = _with_truth(s, rng, regression.draw_weights(rng, s.test_rows, known(s), share))
    return out


def _with_truth(s, rng, weights):
    batch = regression.prompts(rng, weights, s.pairs, s.noise)
    return batch, np.einsum("bkd,bd->bk", batch["x"], weights)


def errors(s, params, factor=1.0):
    """``{branch: error by number of pairs [k]}`` of a model under conjugate prompting by a factor (1: none)."""
    return {name: regression.error(regression.conjugate(apply(s), params, batch, factor), truth).tolist()
            for name, (batch, truth) in tests(s).items()}  # fmt: skip


def optimal(s):
    """``{estimator: {branch: error [k]}}`` of the closed forms."""
    said = {"discrete": lambda b: regression.discrete(b["x"], b["y"], known(s), s.noise)[0],
            "ridge": lambda b: regression.ridge(b["x"], b["y"], s.noise)[0],
            "mixture": lambda b: regression.mixture(b["x"], b["y"], known(s), s.noise, s.share)[0]}  # fmt: skip
    return {name: {branch: regression.error(fn(b), truth).tolist() for branch, (b, truth) in tests(s).items()} for name, fn in said.items()}


def pretrain(context):
    """Models on the mixture, one a seed, against the optimal estimators; {optimal, seeds: {seed: {branch: error [k]}}}."""
    s, out = context.setting.regression, {}
    for seed in s.seeds:
        params, _, _ = engine.fit(objective(s), engine.fresh(make(s), seed), stream(s, seed, s.share), steps=s.steps, rate=s.rate)
        engine.keep(path(context, "icl", seed), params)
        out[str(seed)] = errors(s, params)
    return {"optimal": optimal(s), "seeds": out, "parameters": tree.count(params)}


def tune(context):
    """Fine-tuning on the discrete branch alone; {seeds: {seed: {step: {branch: error [k]}}}}."""
    s, out = context.setting.regression, {}
    for seed in s.seeds:
        params, seen, _ = engine.fit(
            objective(s), model_of(context, "icl", seed), stream(s, 1000 + seed, 1.0), steps=s.tune_steps, rate=s.tune_rate,
            marks=s.tune_marks, evaluate=lambda p: errors(s, p))  # fmt: skip
        engine.keep(path(context, "icl", "tuned", seed), params)
        out[str(seed)] = seen
    return {"seeds": out}


def near(context):
    """Forgetting on continuous tasks by their distance from the nearest discrete one, in bins of as many tasks each.

    {distances: [bin's mean], seeds: {seed: {model: [error]}}, optimal: {ridge, discrete: [error], posterior: [bin]}}. Errors are
    means over places; ``posterior`` is what the optimal mixture believes of the discrete branch at the last place.
    """
    s, rng = context.setting.regression, np.random.default_rng(2 * 10**6)
    weights = rng.standard_normal((4 * s.test_rows, s.dimension)).astype(np.float32)
    batch, truth = _with_truth(s, rng, weights)
    away = np.linalg.norm(weights[:, None] - known(s), axis=-1).min(1)
    bins = np.array_split(np.argsort(away), s.bins)

    def binned(said):
        wrong = np.square(np.asarray(said, float) - truth).mean(1)
        return [float(wrong[rows].mean()) for rows in bins]

    posterior = regression.mixture(batch["x"], batch["y"], known(s), s.noise, s.share)[1][:, -1]
    best = {"ridge": binned(regression.ridge(batch["x"], batch["y"], s.noise)[0]),
            "discrete": binned(regression.discrete(batch["x"], batch["y"], known(s), s.noise)[0]),
            "posterior": [float(posterior[rows].mean()) for rows in bins]}  # fmt: skip
    out = {}
    for seed in s.seeds:
        models = {"pretrained": model_of(context, "icl", seed), "tuned": model_of(context, "icl", "tuned", seed)}
        out[str(seed)] = {name: binned(apply(s)(params, batch["x"], batch["y"])) for name, params in models.items()}
    return {"distances": [float(away[rows].mean()) for rows in bins], "seeds": out, "optimal": best}


def conjugate(context):
    """Errors by γ of the pretrained and the fine-tuned models: {factors, seeds: {seed: {model: {branch: [γ][k]}}}}.

    ``shrunk`` is the control: the fine-tuned model's answers over γ with the labels as they are. ``oracle``: the closed-form
    mixture under the same γ, and with the prior of a model that believes more in the discrete branch.
    """
    s, out = context.setting.regression, {}
    for seed in s.seeds:
        models = {"pretrained": model_of(context, "icl", seed), "tuned": model_of(context, "icl", "tuned", seed)}
        found = {name: [errors(s, params, g) for g in s.factors] for name, params in models.items()}
        said = {branch: np.asarray(apply(s)(models["tuned"], b["x"], b["y"])) for branch, (b, _) in tests(s).items()}
        found["shrunk"] = [{branch: regression.error(said[branch] / g, truth).tolist() for branch, (_, truth) in tests(s).items()} for g in s.factors]
        out[str(seed)] = {name: {branch: [f[branch] for f in rows] for branch in rows[0]} for name, rows in found.items()}
    oracle = {}
    for share in (s.share, 0.999):
        oracle[f"{share:g}"] = {
            branch: [regression.error(regression.mixture(b["x"], g * b["y"], known(s), s.noise, share)[0] / g, truth).tolist() for g in s.factors]
            for branch, (b, truth) in tests(s).items()}  # fmt: skip
    return {"factors": list(s.factors), "seeds": out, "oracle": oracle}
