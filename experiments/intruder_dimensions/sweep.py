"""The runs of the study: a part for each group of variants, its seeds and variants trained as one program where they can be."""

import dataclasses

from experiments import measure
from ft_jax import population

KEPT = ("validation", "trainable_parameters", "steps_per_second", "seconds", "peak_memory_bytes")


def base(context, which):
    """Path of the base model. An encoder gets its frozen prototype head here, once, and is saved with it."""
    grid = getattr(context.setting, which)
    if grid.objective != "classification":
        return grid.model
    return str(measure.prototype_base(grid.model, grid.data, context.workdir / "base", batch_size=grid.eval_batch))


def steps(grid, variant):
    return max(1, round(grid.steps * variant.share))


def config(grid, model, variant, seed):
    """The train config of one run: the seed draws the order of the data and the adapter; no weight decay."""
    return {
        "seed": seed, "steps": steps(grid, variant), "batch_size": grid.batch_size, "objective": grid.objective,
        "model": {"path": model, "dropout": False},
        "data": {**grid.data, "limit": round(grid.data["limit"] * variant.share)}, "method": variant.method,
        "optimizer": {"name": variant.update, "learning_rate": variant.learning_rate * grid.lr_scale, "schedule": "linear",
                      "warmup": 0.06, "clip": 1.0},
        "eval": {"every": 0, "batch_size": grid.eval_batch, "metric": "accuracy"},
        "save": {"every": 10**6, "keep": 1}, "log": {"every": 10, "tensorboard": False}, "mesh": {"data": 1},
    }  # fmt: skip


def folder(context, which, run):
    return context.workdir / "runs" / f"{which}-{run}"


def train(context, which, group):
    """Trains a group; ``{run: what is kept of its summary, or {"failed": message}}``."""
    grid, model = getattr(context.setting, which), base(context, which)
    chosen = grid.groups[group]
    configs = {f"{which}-{name}-s{seed}": config(grid, model, variant, seed)
               for name, variant in chosen.variants.items() for seed in chosen.seeds}  # fmt: skip
    done = population.train(configs, context.workdir / "runs", label=f"{which} {group}")
    return {name.removeprefix(f"{which}-"): s if "failed" in s else {k: s[k] for k in KEPT} for name, s in done.items()}


def grids(setting):
    """The grids that a setting has, by name."""
    return {f.name: found for f in dataclasses.fields(setting) if dataclasses.is_dataclass(found := getattr(setting, f.name))}


def part(which, group):
    """Name of the part that trains a group."""
    return f"{which}_train_{group}"


def parts(setting):
    return {part(which, group): lambda context, w=which, g=group: train(context, w, g)
            for which, grid in grids(setting).items() for group in grid.groups}  # fmt: skip


def trained(context, which, group):
    """The runs of a group that reached their end."""
    return [run for run, summary in context.value(part(which, group)).items() if "failed" not in summary]
