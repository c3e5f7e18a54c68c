"""Opening a bench: bases with their heads, data, the trees of finished runs, masks and trees on disk, short training loops."""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file
from safetensors.numpy import save as to_bytes
from tqdm.auto import tqdm

from experiments import measure
from experiments.skill_localization.settings import METHODS
from ft_jax import registry, train, tree, updates
from ft_jax.analysis import calibration, predictions
from ft_jax.data import pipeline, prompts
from ft_jax.io import files, hf, tokenizer
from ft_jax.objectives import inputs_of
from ft_jax.weights import graft

BINS = 10  # of the reliability diagrams


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """A task of a bench, opened: the model, its base with the task's head, and its data."""

    model: Any
    base: dict
    folder: str
    data: dict
    validation: pipeline.Dataset
    test: pipeline.Dataset
    tok: Any
    eval_batch: int

    def train(self, seed):
        """The K shots of a seed."""
        return self.build({**self.data, "shots_seed": seed}, "train")

    def build(self, data, split):
        return pipeline.build(data, split, self.tok, "classification", self.model.config.vocab_size)

    def predict(self, params, data=None, label=None):
        return measure.predict(self.model, params, data or self.test, "classification", self.eval_batch, label)

    def accuracy(self, params, data=None, label=None):
        return float(self.predict(params, data, label)["correct"].mean())


def base_folder(context, bench, task):
    """Folder of the base of a task: the encoder with the task's frozen prototype head, or the model as it is."""
    if bench.head != "prototype":
        return bench.model
    data = {k: v for k, v in bench.tasks[task].items() if k != "shots"}
    return str(measure.prototype_base(bench.model, data, context.workdir / "bases" / f"{bench.name}-{task}", examples=bench.head_examples,
                                      batch_size=bench.eval_batch))  # fmt: skip


def model_group(context, bench, task):
    """The model group of a train config."""
    head = {} if bench.head == "prototype" else {"head": bench.head}
    return {"path": base_folder(context, bench, task), "dropout": False, **head}


def view(context, bench, task):
    """The `View` of a task; the last few stay open."""
    spec = {"model": model_group(context, bench, task), "data": bench.tasks[task], "test": bench.test_limit,
            "validation": bench.validation_limit, "batch": bench.eval_batch}  # fmt: skip
    return _view(json.dumps(spec))


@functools.lru_cache(maxsize=6)
def _view(spec):
    spec = json.loads(spec)
    folder, data = spec["model"]["path"], spec["data"]
    source, head = hf.resolve(folder), spec["model"].get("head")
    tok, words = tokenizer.load(source), None
    if head == "label_words":
        words = prompts.label_ids(tok, hf.read_config(source, "none").kind, pipeline.settings(data))
    model, base = hf.load(folder, head=head, num_labels=data["num_labels"], label_ids=words)

    def build(split, **more):
        return pipeline.build({**data, **more}, split, tok, "classification", model.config.vocab_size)

    held = first(build("validation"), spec["validation"])
    return View(model, base, folder, data, held, build("test", eval_limit=spec["test"]), tok, spec["batch"])


def first(data, count):
    """The first ``count`` examples of a dataset; its rows stand in a random order."""
    return dataclasses.replace(data, info={**data.info, "examples": min(count, data.info["examples"])})


# What lies in the study's folder


def run_name(bench, task, method, seed):
    return f"{bench.name}-{task}-{method}-s{seed}"


def tuned(context, bench, task, method, seed):
    """Dense parameters of a finished run."""
    return measure.tuned(context.workdir / "runs" / run_name(bench, task, method, seed))


def mask_path(context, name):
    return context.workdir / "masks" / f"{name}.safetensors"


def region(context, bench, task, method, seed):
    """The region that the graft part of a run found."""
    return graft.load_mask(mask_path(context, run_name(bench, task, method, seed)))


def keep_layers(path, params):
    """Writes the layers of a tree to a safetensors file."""
    flat = {p: np.asarray(x) for p, x in tree.flatten(params).items() if p.startswith("layers/")}
    files.make_folder(path.parent)
    files.write(path, to_bytes(flat))


def with_layers(base, path_or_tree):
    """``base`` with the layers of another tree, or of a file that `keep_layers` wrote: its own embeddings and head stay."""
    if isinstance(path_or_tree, dict):
        return {**base, "layers": path_or_tree["layers"]}
    return {**base, "layers": tree.nest({p: jnp.asarray(x) for p, x in load_file(path_or_tree).items()})["layers"]}


# What a tree answers


def scored(found, reference=None):
    """Scores of predictions with their reliability table: ``[count, mean confidence, accuracy]`` a bin."""
    rows = calibration.reliability(found["confidence"], found["correct"], bins=BINS)
    return {**predictions.scores(found, reference), "bins": [[r["count"], r["confidence"], r["accuracy"]] for r in rows]}


@functools.lru_cache(maxsize=16)
def loss_of(model):
    """``(params, batch) -> mean loss`` in evaluation mode, one function object a model."""
    fn = registry.get("objective", "classification").fn
    return lambda params, batch: fn(lambda p, inputs, rng: model.apply(p, inputs), params, batch, None)[0]


def micro_batches(data, examples, micro, seed):
    """Endless batches ``[examples / micro, micro, …]``; all examples where there are fewer."""
    for batch in pipeline.prefetch(pipeline.batches(data, examples, seed)):
        yield {k: np.reshape(v, (examples // micro, micro, *v.shape[1:])) for k, v in batch.items()}


def learn(bench, opened, tuned_params, sparsity, seed, label, flips=None):
    """(mask, history): the graft of a tuned tree, learnt on the task's shots and chosen on its validation."""
    g = bench.graft
    batches = micro_batches(opened.train(seed), g["examples"], g["micro"], seed)
    return graft.learn_mask(
        opened.base, tuned_params, loss_of(opened.model), batches, lambda p: opened.accuracy(p, opened.validation),
        sparsity=sparsity, steps=g["steps"], flips=flips or g["flips"], seed=seed, label=label,
    )  # fmt: skip


# Short training loops with a gate


def _optimiser(method, rate, steps):
    opt = METHODS[method][1]
    return updates.build(opt["name"], learning_rate=rate, steps=steps, schedule_name=opt["schedule"], warmup=opt["warmup"],
                         clip=opt["clip"])[0]  # fmt: skip


@functools.lru_cache(maxsize=16)
def _stepper(model, method, steps):
    """``step(state, frozen, batch, rate)``, compiled once for all rates (and all lengths of a constant schedule)."""
    fn = registry.get("objective", "classification").fn

    def objective(params, batch, rng):
        moving = {p: jnp.where(params["gate"][p], x, jax.lax.stop_gradient(x)) for p, x in params["theta"].items()}
        return fn(lambda p, inputs, _: model.apply(p, inputs), tree.nest({**params["rest"], **moving}), batch, rng)

    def step(state, frozen, batch, rate):
        return train.make_step(objective, _optimiser(method, rate, steps), 1, 0)(state, frozen, batch)

    return jax.jit(step, donate_argnums=0)


def fit(lanes, start, gate, *, method, rate, steps, label):
    """Trains the parameters that ``gate`` (``{path: bool array}``) marks, by a method's optimiser without decay or pull.

    lanes: ``[(view, batches)]``, a batch of each in turn, under its own task's frozen head.
    Returns (tree like ``start``, [loss of each step]).
    """
    flat = tree.flatten(start)
    theta = {p: jnp.array(flat[p], copy=True) for p in gate}  # the step takes its memory
    frozen = [{"theta": dict.fromkeys(gate), "gate": {p: jnp.asarray(m) for p, m in gate.items()},
               "rest": {p: x for p, x in tree.flatten(v.base).items() if p not in gate}} for v, _ in lanes]  # fmt: skip
    constant = METHODS[method][1]["schedule"] == "constant"
    steppers = [_stepper(v.model, method, 1 if constant else steps) for v, _ in lanes]
    trainable = {"theta": theta, "gate": dict.fromkeys(gate), "rest": dict.fromkeys(frozen[0]["rest"])}
    state, losses = train.TrainState(jnp.zeros((), jnp.int32), trainable, _optimiser(method, rate, steps).init(trainable)), []
    for i in tqdm(range(steps), desc=label, unit="step", leave=False):
        lane = i % len(lanes)
        batch = next(lanes[lane][1])
        state, metrics = steppers[lane](state, frozen[lane], {**inputs_of(batch), "label": batch["label"]}, rate)
        losses.append(metrics["loss"])
    return tree.nest({**flat, **state.trainable["theta"]}), [float(x) for x in losses]


def everywhere(params):
    """The gate of ordinary fine-tuning: every eligible parameter."""
    flat = tree.flatten(params)
    return {p: np.ones(flat[p].shape, bool) for p in graft.eligible_paths(params)}


def shots(data, batch_size, seed):
    """Endless training batches of a dataset."""
    return pipeline.prefetch(pipeline.batches(data, batch_size, seed))
