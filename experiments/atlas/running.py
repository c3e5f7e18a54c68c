"""The runs of the atlas: rates tried, seeds trained at the best one, what a step costs, what became of the weights."""

import functools
import math
import shutil
import time

import jax
import numpy as np

from configs.train import method as method_of
from experiments import measure
from experiments.atlas.settings import FASTER, METHODS
from ft_jax import flops, importance, population, train, tree
from ft_jax.analysis import forgetting, predictions, spectral, topk
from ft_jax.data import pipeline, sources
from ft_jax.io import hf, tokenizer
from ft_jax.io.runs import load_run
from ft_jax.kernels import is_kernel, merge
from ft_jax.kernels.mixture import Experts

K, EPS = 10, (0.5, 0.9)
CLOCKED = 6  # steps of a method and of full fine-tuning that are timed in turn
KEPT = ("trainable_parameters", "total_parameters", "optimizer_bytes", "validation")


def base(context, task):
    """The task's base model: an encoder gets its frozen prototype head, made once and saved with it."""
    if task.objective != "classification":
        return task.model
    folder = context.workdir / "base" / task.data["source"].replace("/", "-").replace(":", "-")
    return str(measure.prototype_base(task.model, task.data, folder, batch_size=task.eval_batch))


def config(context, task, method, seed, rate):
    """The train config of one run; ``method`` is a name of METHODS."""
    text = METHODS[method][1]
    for kind in ("fisher", "gradient", "change"):
        text = text.replace(f"scores={kind.upper()}", f"scores={context.workdir / 'scores' / _slug(task) / kind}")
    group, optimizer = method_of(text)
    if group.get("kernels") or group.get("taps"):  # the head stays frozen, as it does for full fine-tuning of the layers
        group["mask"] = "+".join(["declared", *([group["mask"]] if group["mask"] != "rules" else [])])
    return {
        "seed": seed, "steps": task.steps, "batch_size": task.batch_size, "objective": task.objective,
        "model": {"path": base(context, task), "dropout": False}, "data": task.data, "method": group,
        "optimizer": {"learning_rate": rate, "schedule": "linear", "warmup": 0.06, "clip": 1.0, **optimizer},
        "eval": {"every": 0, "batch_size": task.eval_batch, "metric": "accuracy"},
        "save": {"every": 10**6, "keep": 1}, "log": {"every": 10, "tensorboard": False}, "mesh": {"data": 1},
    }  # fmt: skip


def _slug(task):
    return f"{task.model}-{task.data['source']}".replace("/", "-").replace(":", "-")


def scores(context, task):
    """Writes what masks pick by: Fisher information and gradients at the start, the change of a full run."""
    folder, cfg = context.workdir / "scores" / _slug(task), config(context, task, "full", 0, task.rates[0])
    for kind in ("fisher", "gradient"):
        importance.save(folder / kind, importance.of_config(cfg, kind, task.scored), kind)
    run = context.workdir / "runs" / f"{_slug(task)}-scores"
    done = train.train(cfg, run, label="full run for scores")
    importance.save(folder / "change", importance.change_of_run(run), "change")
    shutil.rmtree(run / "checkpoints")
    return {"examples": task.scored, "rate": task.rates[0], "validation": done["validation"]}


# One method


def method(context, name, task, row):
    """The runs of one method on one task: rates tried with the first seed, the other seeds at the best."""
    folder, (first, *others) = context.workdir / "runs" / f"{name}-{row}", task.seeds
    done = population.train({f"rate{i}": config(context, task, row, first, r) for i, r in enumerate(rates(task, row))}, folder / "rates",
                            label=f"{row}: rates")  # fmt: skip
    tried = [_tried(rate, summary) for rate, summary in zip(rates(task, row), done.values(), strict=True)]
    finite = [t for t in tried if t["loss"] is not None]
    if not finite:
        return {"method": METHODS[row][1], "tried": tried, "rate": None, "runs": []}
    best = min(finite, key=lambda t: t["loss"])
    chosen = f"rate{tried.index(best)}"
    more = population.train({f"seed{s}": config(context, task, row, s, best["rate"]) for s in others}, folder / "seeds", label=f"{row}: seeds")
    world, runs = open_world(context, task), []
    for seed, run, summary in [(first, folder / "rates" / chosen, done[chosen]), *((s, folder / "seeds" / f"seed{s}", more[f"seed{s}"]) for s in others)]:
        if "failed" in summary:
            runs.append({"seed": seed, "failed": summary["failed"]})
            continue
        _, params, _ = load_run(run, which="last")
        runs.append({"seed": seed, **{k: summary[k] for k in KEPT}, **world.measure(params, seed == first)})
    found = {"method": METHODS[row][1], "tried": tried, "rate": best["rate"], "runs": runs}
    shutil.rmtree(folder)  # what stays of the runs is what this part holds
    return found


def rates(task, row):
    """The learning rates that a method tries."""
    return tuple(r * FASTER.get(row, 1.0) for r in task.rates)


def _tried(rate, summary):
    """``{rate, loss, accuracy}`` on validation data; loss None where the run diverged."""
    held = summary.get("validation", {})
    return {"rate": rate, "loss": held.get("loss"), "accuracy": held.get("accuracy")}


# What a step costs


def _step(context, task, row):
    """``(step, state, frozen, batch)`` of one run by itself."""
    parts = train.prepare(train.ready(config(context, task, row, 0, task.rates[0])))
    trainable, frozen = tree.split(parts["params"], parts["mask"])
    state = train.TrainState(jax.numpy.zeros((), jax.numpy.int32), trainable, parts["tx"].init(trainable))
    batch = next(iter(pipeline.batches(parts["data"]["train"], task.batch_size, 0)))
    return train.make_step(parts["objective"], parts["tx"], 1, 0), state, frozen, batch


@functools.lru_cache(maxsize=1)
def _full_step(context, task):
    return _compiled(*_step(context, task, "full"))


def _compiled(step, *arguments):
    return flops.count(step, *arguments), jax.jit(step).lower(*arguments).compile(), *arguments


def cost(context, task, row):
    """FLOPs of a step's products (loops as often as they run, which XLA's own count has once), and its time over that of full fine-tuning, timed in turn: the least of each, which others on the machine disturb least."""
    (mine, *own), (theirs, *full) = _compiled(*_step(context, task, row)), _full_step(context, task)
    times = {0: [], 1: []}
    for i in range(2 * (CLOCKED + 1)):
        step, *arguments = (own, full)[i % 2]
        started = time.perf_counter()
        jax.block_until_ready(step(*arguments))
        times[i % 2].append(time.perf_counter() - started)
    least = [min(times[i][1:]) for i in (0, 1)]
    return {"flops": mine, "flops_of_full": mine / theirs, "time_of_full": least[0] / least[1]}


# What became of the weights, and what they can do


@functools.lru_cache(maxsize=1)
def open_world(context, task):
    return World(context, task)


class World:
    """A task's base model and everything that its runs are measured on, opened once."""

    def __init__(self, context, task):
        folder, f = base(context, task), task.forgetting
        self.task, (self.model, self.params) = task, hf.load(folder)
        self.model, tok = measure.interned(self.model), tokenizer.load(hf.resolve(folder))
        split, limit = task.test
        self.test = pipeline.build({**task.data, "eval_limit": limit}, split, tok, task.objective, self.model.config.vocab_size)
        if task.objective == "classification":
            rows = sources.load(f["source"], "test")
            texts = list(dict.fromkeys(rows[i]["text"] for i in range(len(rows))))[: f["texts"]]
            halves = [" ".join(text.split()[: f["words"]]) for text in texts]
            self.passages = measure.halves(folder, halves, batch_size=f["batch"], length=f["length"])
        else:
            novels = pipeline.build(f, "test", tok, "causal_lm", self.model.config.vocab_size)
            self.passages = list(pipeline.eval_batches(novels, task.eval_batch))
        self.spectra_base = measure.matrices(self.params)

    def scores(self, params):
        """``{task: scores, forgetting: loss}`` of a tree, taps and all."""
        task = self.task
        found = predictions.scores(measure.predict(self.model, params, self.test, task.objective, task.eval_batch))
        if task.objective == "classification":
            return {"task": found, "forgetting": measure.contrastive(self.model, params, self.passages)["loss"]}
        return {"task": found, "forgetting": forgetting.perplexity(self.model.apply, params, self.passages, label="novels")["loss"]}

    def measure(self, params, spectra_too):
        """Scores, the share of weights that changed and, if wanted (seeds matter little to them), the spectra of what changed."""
        # Experts weighed by the input stand for no one matrix: they are scored as they are, and leave the base's weights as adapters do.
        beside = jax.tree.map(lambda x: x.base if isinstance(x, Experts) else x, params, is_leaf=is_kernel)
        # Placed like the base's: a jitted function that has seen one tree is not compiled again for the next.
        dense = jax.tree.map(lambda x: jax.numpy.asarray(np.asarray(x)), merge(beside))
        mixed = any(isinstance(x, Experts) for x in jax.tree.leaves(params, is_leaf=is_kernel))
        found = {"scores": self.scores(params if mixed else dense), "changed": changed(self.params, dense)}
        return found | ({"spectra": spectra(self.spectra_base, measure.matrices(dense))} if spectra_too else {})


def changed(first, second):
    """The share of the base model's weights that are not what they were."""
    after = tree.flatten(second)
    pairs = [(np.asarray(w), np.asarray(after[path])) for path, w in tree.flatten(first).items()]
    return sum(int((w != other).sum()) for w, other in pairs) / sum(w.size for w, _ in pairs)


def spectra(first, second):
    """Intruders at each ε, mean effective rank and ‖ΔW‖ over all matrices; None where a method leaves them as they are."""
    changed = {p: w for p, w in first.items() if not np.array_equal(w, second[p])}
    total = sum(len(w) for w in first.values())
    if not changed:
        return {"matrices": total, "intruders": None, "effective_rank": None, "delta_norm": 0.0}
    cosine = np.concatenate([topk.intruders(w, second[p], k=K)["max_cosine"] for p, w in changed.items()])
    found = [spectral.delta(one, other) for p, w in changed.items() for one, other in zip(w, second[p], strict=True)]
    moved = [f for f in found if f["delta_norm"] > 0]
    return {"matrices": total, "intruders": [int((cosine < eps).sum()) for eps in EPS],
            "effective_rank": float(np.mean([f["effective_rank"] for f in moved])),
            "delta_norm": math.sqrt(sum(float(f["delta_norm"]) ** 2 for f in moved))}  # fmt: skip


def reference(context, task):
    """The base model by itself."""
    return open_world(context, task).scores(open_world(context, task).params)
