"""The base model with its frozen head, and the four runs that start from it."""

from experiments import measure
from ft_jax import train


def base(s, workdir):
    """Path of the base model. An encoder gets its frozen prototype head here, once, and is saved with it."""
    if s.objective != "classification":
        return s.model
    return measure.prototype_base(s.model, s.data, workdir / "base", batch_size=s.eval_batch)


def config(s, base_folder, method, learning_rate):
    """The train config of one run: same seed and budget for all, no weight decay, linear schedule, warm-up 0.06."""
    return {
        "seed": s.seed, "steps": s.steps, "batch_size": s.batch_size, "objective": s.objective,
        "model": {"path": str(base_folder), "dropout": False},
        "data": s.data, "method": method,
        "optimizer": {"name": "adamw", "learning_rate": learning_rate, "schedule": "linear", "warmup": 0.06, "clip": 1.0},
        "eval": {"every": 0, "batch_size": s.eval_batch, "metric": "accuracy"},
        "save": {"every": 50, "keep": 1}, "mesh": {"data": 1},
    }  # fmt: skip


def run_all(s, base_folder, workdir):
    """Trains (or resumes, or skips) every run; returns {name: summary}."""
    return {
        name: train.train(config(s, base_folder, method, lr), workdir / "runs" / name, label=f"{name:>9}")
        for name, (method, lr) in s.runs.items()
    }
