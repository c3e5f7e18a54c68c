"""The two founding studies' views of these models: singular directions of ΔW, full against LoRA, and grafts that hold the wrapper."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.mechanisms import counting, engine, finetune, implicit
from ft_jax import kernels, tree
from ft_jax.analysis import spectral
from ft_jax.weights import graft

EVERYTHING = ((r".*", True),)  # fine-tuning moved embeddings and norms too, so a graft may take them
TOP, EPS = 10, 0.5


def spectrum(base, tuned):
    """Means and sums over the matrices of the layers: intruders, effective rank, ‖ΔW‖ / ‖W0‖, lowest cosine of each matrix."""
    found = spectral.over_tree(spectral.spectral, base, tuned, k=TOP, eps=EPS)
    every = {name: np.concatenate([np.asarray(x[name]).reshape(-1) for x in found.values()])
             for name in ("intruders", "effective_rank", "stable_rank", "delta_norm_relative")}  # fmt: skip
    lowest = np.concatenate([np.asarray(x["max_cosine"]).min(-1).reshape(-1) for x in found.values()])
    return {"intruders": int(every["intruders"].sum()), "matrices": lowest.size, "effective_rank": float(every["effective_rank"].mean()),
            "stable_rank": float(every["stable_rank"].mean()), "delta_norm": float(every["delta_norm_relative"].mean()),
            "lowest_cosine": float(lowest.mean())}  # fmt: skip


def _loras(params, ranks, seed):
    for rank in ranks:
        yield rank, *engine.lora(params, rank, seed)


def counting_spectra(context, prior):
    """Rows {method, correlation, seed, scores of every test, what `spectrum` says}: full fine-tuning, and LoRA of the same steps."""
    s, rows = context.setting.counting, []
    for seed in s.seeds:
        base = finetune.model_of(context, prior, seed)
        for spurious in s.lora_correlations:
            tuned = {"full": finetune.model_of(context, prior, "medium", spurious, seed)}
            for rank, params, mask in _loras(base, s.ranks, seed):
                found, _, _ = finetune.fit(context, params, ("count",), counting.only(counting.TUNED), spurious, seed=1000 + seed,
                                           steps=s.tune_steps, rate=s.lora_rate, mask=mask)  # fmt: skip
                tuned[f"LoRA r={rank}"] = kernels.merge(found)
            for method, params in tuned.items():
                scores = counting.scores(counting.make(s), params, s)
                rows.append({"method": method, "correlation": spurious, "seed": seed, **scores, **spectrum(base, params)})
    return {"rows": rows}


def icl_spectra(context):
    """The same for the regression models, their scores being errors over all places."""
    s, rows = context.setting.regression, []
    for seed in s.seeds:
        base = implicit.model_of(context, "icl", seed)
        tuned = {"full": implicit.model_of(context, "icl", "tuned", seed)}
        for rank, params, mask in _loras(base, s.ranks, seed):
            draw = implicit.stream(s, 1000 + seed, 1.0)
            found, _, _ = engine.fit(implicit.objective(s), params, draw, steps=s.tune_steps, rate=s.lora_rate, mask=mask)
            tuned[f"LoRA r={rank}"] = kernels.merge(found)
        for method, params in tuned.items():
            scores = {branch: float(np.mean(e)) for branch, e in implicit.errors(s, params).items()}
            rows.append({"method": method, "seed": seed, **scores, **spectrum(base, params)})
    return {"rows": rows}


def _both_ways(base, tuned, shares):
    """(share, graft alone on the base, tuned model with exactly that graft put back to the base's values)."""
    for share in shares:
        mask = graft.magnitude_mask(base, tuned, share, EVERYTHING)
        yield share, graft.apply_graft(base, tuned, mask), graft.apply_graft(tuned, base, mask)


def counting_grafts(context, prior):
    """Rows {rate, correlation, seed, base, tuned, curve: [{share, kept: {test}, removed: {test}}]}."""
    s, rows, tests = context.setting.counting, [], ("pretrained", "tuned_spurious", "tuned_clean")
    model = counting.make(s)

    def score(params):
        return counting.scores(model, params, s, tests)

    for seed in s.seeds:
        base = finetune.model_of(context, prior, seed)
        for rate in s.rates:
            for spurious in (c for c in s.correlations[rate] if c in (0.0, 1.0)):
                tuned = finetune.model_of(context, prior, rate, spurious, seed)
                curve = [{"share": share, "kept": score(on), "removed": score(off)} for share, on, off in _both_ways(base, tuned, s.shares)]
                rows.append({"rate": rate, "correlation": spurious, "seed": seed, "base": score(base), "tuned": score(tuned), "curve": curve})
    return {"rows": rows, "parameters": tree.count(base)}


def icl_grafts(context):
    """Rows {seed, base, tuned, curve: [{share, kept: {branch: error}, removed: {branch: error}}]}."""
    s, rows = context.setting.regression, []

    def score(params):
        params = jax.tree.map(jnp.asarray, params)
        return {branch: float(np.mean(e)) for branch, e in implicit.errors(s, params).items()}

    for seed in s.seeds:
        base, tuned = implicit.model_of(context, "icl", seed), implicit.model_of(context, "icl", "tuned", seed)
        curve = [{"share": share, "kept": score(on), "removed": score(off)} for share, on, off in _both_ways(base, tuned, s.shares)]
        rows.append({"seed": seed, "base": score(base), "tuned": score(tuned), "curve": curve})
    return {"rows": rows, "parameters": tree.count(base)}
