"""The base model with its frozen head, and the four runs that start from it."""

import jax
import numpy as np
from tqdm.auto import tqdm

from ft_jax import train
from ft_jax.data import pipeline
from ft_jax.io import hf, tokenizer
from ft_jax.models.prototype import prototype_head

PROTOTYPE_EXAMPLES = 1000


def base(s, workdir):
    """Path of the base model. An encoder gets its frozen prototype head here, once, and is saved with it."""
    if s.objective != "classification":
        return s.model
    folder = workdir / "base"
    if (folder / "config.json").exists():
        return folder
    source = hf.resolve(s.model)
    model, params = hf.load(source, head="pooled")
    data = pipeline.build({**s.data, "limit": PROTOTYPE_EXAMPLES}, "train", tokenizer.load(source), s.objective,
                          model.config.vocab_size)  # fmt: skip
    embed = jax.jit(lambda p, b: model.apply(p, {k: b[k] for k in ("input_ids", "attention_mask")}))
    rows = list(tqdm(pipeline.eval_batches(data, s.eval_batch), desc="prototype head", unit="batch"))
    keep = np.concatenate([b["weight"] for b in rows]) > 0
    embeddings = np.concatenate([np.asarray(embed(params, b)) for b in rows])[keep]
    labels = np.concatenate([b["label"] for b in rows])[keep]
    head = prototype_head(embeddings, labels, s.data["num_labels"])
    hf.save(folder, model.with_head("prototype", s.data["num_labels"]), {**params, "head": head}, source)
    return folder


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
