"""The fine-tuning runs of a bench: one part for each task and method, its seeds trained as one program."""

import math

from experiments.skill_localization import world
from experiments.skill_localization.settings import METHODS
from ft_jax import population
from ft_jax.errors import UserError


def config(context, bench, task, method, seed, rate, steps=None):
    """The train config of one run: the seed draws the shots and their order."""
    group, optimizer = METHODS[method]
    return {
        "seed": seed, "steps": steps or bench.steps, "batch_size": bench.batch_size, "objective": "classification",
        "model": world.model_group(context, bench, task), "data": {**bench.tasks[task], "shots_seed": seed},
        "method": {"name": method, **group}, "optimizer": {**optimizer, "learning_rate": rate},
        "eval": {"every": 0, "batch_size": bench.eval_batch, "metric": "accuracy"},
        "save": {"every": 10**6, "keep": 1}, "log": {"tensorboard": False}, "mesh": {"data": 1},
    }  # fmt: skip


def tune(context, bench, task):
    """SGD's learning rate, once, on the first task: lowest loss on the first seed's validation shots, none of the test.

    Clipped gradients make a step as long whatever the head's steepness, so that the other tasks can take it over.
    """
    seed = bench.runs[task]["sgd"][0]
    configs = {f"{bench.name}-{task}-tune-{rate:g}": config(context, bench, task, "sgd", seed, rate, bench.tune_steps) for rate in bench.sgd_rates}
    done = population.train(configs, context.workdir / "runs", label="learning rate")
    rows = []
    for (name, summary), rate in zip(done.items(), bench.sgd_rates, strict=True):
        held = summary.get("validation", {})
        rows.append({"rate": rate, "loss": held.get("loss"), "accuracy": held.get("accuracy"), "failed": summary.get("failed"), "run": name})
    fit = [r for r in rows if r["loss"] is not None and math.isfinite(r["loss"])]
    if not fit:
        raise UserError(f"SGD diverges on {task} at every learning rate of {', '.join(f'{r:g}' for r in bench.sgd_rates)}")
    return {"task": task, "steps": bench.tune_steps, "rows": rows, "chosen": min(fit, key=lambda r: r["loss"])["rate"]}


def rate_of(context, bench, method):
    """A method's learning rate: the tuned one for SGD where the bench tunes it."""
    return context.value(f"tune_{bench.name}")["chosen"] if method == "sgd" and bench.sgd_rates else bench.rates[method]


def runs(context, bench, task, method):
    """Trains every seed; {seed: summary}. A run that diverged fails the part: the graft of half the seeds misleads."""
    rate, seeds = rate_of(context, bench, method), bench.runs[task][method]
    configs = {world.run_name(bench, task, method, seed): config(context, bench, task, method, seed, rate) for seed in seeds}
    done = population.train(configs, context.workdir / "runs", label=f"{task} {method}")
    if failed := {name: s["failed"] for name, s in done.items() if "failed" in s}:
        name, message = next(iter(failed.items()))
        raise UserError(f"{name} failed: {message}")
    kept = ("validation", "trainable_parameters", "steps_per_second", "seconds")
    return {"learning_rate": rate, "seeds": {str(seed): {k: s[k] for k in kept} for seed, s in zip(seeds, done.values(), strict=True)}}
