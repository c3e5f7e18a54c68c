"""Tasks in sequence: fine-tune, merge, start the next adapter on what is left, and test every task so far with a fresh head.

Each method and seed is one part. A task is learnt under a head of its own that is fitted to convergence on the embeddings
that the current weights give some of its training texts, then frozen (a linear probe before fine-tuning, arXiv:2202.10054):
whatever is learnt lies in the layers, and no learning rate of a head comes between the methods. It is a penalised logistic
regression, because class means of so few texts have a scale that is right for those texts alone. Before every test the head
is retrained in the same way on held-out texts and tested across folds: forgetting is what the *layers* no longer hold.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from experiments import measure
from experiments.demo.settings import LAYERS, LINEAR
from experiments.intruder_dimensions import continual_page
from ft_jax import kernels, registry, train, tree, updates
from ft_jax.analysis import forgetting, spectral
from ft_jax.data import pipeline, sources
from ft_jax.errors import UserError, nearest
from ft_jax.io import hf, tokenizer
from ft_jax.models.linear_head import cross_fitted, linear_head

K = 10
SWEEP = tuple(round(0.1 * i, 1) for i in range(1, 10))
UNUSED = -1e9  # bias of the classes that a task lacks: all heads have one shape, so that a method compiles once
# Opinion and topic in turns: what the layers learn for the one is of little use for the other.
TASKS = tuple((name, {"source": name, "num_labels": n})
              for name, n in (("imdb", 2), ("bbc", 5), ("vader_tweets", 2), ("subjects", 4), ("vader_amazon", 2)))  # fmt: skip
NOVELS = {"measure": "contrastive", "source": "lambada", "split": "test"}


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity: what is loaded for a setting is kept by it
class ContinualSetting:
    """A sequence of tasks and how each is learnt and tested; ``lr_scale`` multiplies the paper's rates (see the demo)."""

    tasks: tuple[tuple[str, dict], ...]
    ranks: tuple[int, ...] = (1, 8, 64)
    seeds: tuple[int, ...] = (0, 1, 2)
    model: str = "minilm"
    steps: int = 30
    batch_size: int = 16
    length: int = 32
    lr_scale: float = 8.0
    head_texts: int = 128  # training texts that a task's head is fitted to before its layers learn
    test_texts: int = 240
    widths: tuple[int, ...] = (16, 24, 32)  # test texts are padded to the least of these that holds them
    eval_batch: int = 16
    folds: int = 5
    l2: float = 3e-3
    forgetting: dict = dataclasses.field(default_factory=lambda: {**NOVELS, "texts": 64, "batch": 64, "max_length": 24})

    @property
    def methods(self):
        """{name: (kernel rules, trainable rules, learning rate)}: full at 1e-5, LoRA with α = 2r and α · lr = 2.4e-3, times lr_scale."""
        out = {"full": ((), (LAYERS,), 1e-5 * self.lr_scale)}
        for r in self.ranks:
            rules, trains = ((LINEAR, f"lora(rank={r}, alpha={2 * r})"),), ((f"{LINEAR}/[ab]", True),)
            out[f"lora_r{r}"] = (rules, trains, 2.4e-3 / (2 * r) * self.lr_scale)
        return out


SETTINGS = {  # by scale; a scale that is not here has no sequence
    "smoke": ContinualSetting(
        tasks=TASKS[:2], ranks=(1,), seeds=(0,), steps=4, head_texts=32, test_texts=40, widths=(32,),
        forgetting={**NOVELS, "texts": 32, "batch": 32, "max_length": 24}),
    "cpu": ContinualSetting(tasks=TASKS),
    "full": ContinualSetting(
        tasks=TASKS, ranks=(1, 2, 4, 8, 16, 64), seeds=(0, 1, 2, 3, 4), model="hf:FacebookAI/roberta-base", steps=2000,
        length=256, lr_scale=1.0, head_texts=1000, test_texts=1000, widths=(64, 256), eval_batch=64,
        forgetting={"measure": "pseudo_loss", "source": "lambada", "split": "test", "texts": 256, "batch": 16, "max_length": 64}),
}  # fmt: skip


def of(setting):
    """The sequence of a study's setting: its field ``continual``, else the one of its scale; None where it has none."""
    return getattr(setting, "continual", None) or SETTINGS.get(getattr(setting, "name", ""))


def parts(setting):
    """``{name: Context -> value}``: the base model's scores, and a part for each method and seed."""
    s = of(setting)
    if s is None:
        return {}
    out = {"continual_base": lambda context: untouched(s)}
    for method in s.methods:
        for seed in s.seeds:
            out[f"continual_{method}_s{seed}"] = lambda context, m=method, n=seed: sequence(_same(context, s), m, n)
    return out


def _plain(s):
    return json.loads(json.dumps(dataclasses.asdict(s)))


def _same(context, s):
    """The setting, which must be that of the base's part: rows of a table that were made differently are none."""
    theirs, ours = context.value("continual_base")["setting"], _plain(s)
    if odd := sorted(k for k in {**ours, **theirs} if ours.get(k) != theirs.get(k)):
        raise UserError(f"{context.workdir}/parts holds a sequence with another {', '.join(odd)}; remove its continual_* to begin anew")
    return s


@dataclasses.dataclass(frozen=True)
class Task:
    """A task's texts: for training, for its head, and for tests; the latter two in groups of equal width."""

    name: str
    num_labels: int
    train: pipeline.Dataset
    head: list
    test: list


def load_tasks(s, vocab_size):
    """Every task of the sequence, tokenised."""
    tok, out = tokenizer.load(hf.resolve(s.model)), []
    for name, data in s.tasks:
        data = {"max_length": s.length, **data}
        train_set = pipeline.build({**data, "limit": s.steps * s.batch_size}, "train", tok, "classification", vocab_size)
        head = pipeline.subset(len(train_set), s.head_texts)
        test = pipeline.build({**data, "eval_limit": s.test_texts}, "test", tok, "classification", vocab_size)
        out.append(Task(name, data["num_labels"], dataclasses.replace(train_set, length=s.length),
                        by_width(train_set, head, s.widths), by_width(test, np.arange(len(test)), s.widths)))  # fmt: skip
    return out


def by_width(data, chosen, widths):
    """The examples ``chosen`` of a dataset in groups, each padded to the least of ``widths`` that holds it."""
    offsets, ids = data.arrays["offsets"], data.arrays["ids"]
    lengths = np.diff(offsets)[chosen]
    slot = np.searchsorted(widths, lengths)
    if slot.max() >= len(widths):
        raise UserError(f"a text of {data.name} has {lengths.max()} tokens; the largest width is {max(widths)}")
    out = []
    for at in np.unique(slot):
        rows = chosen[slot == at]
        texts = [ids[offsets[i] : offsets[i + 1]] for i in rows]
        arrays = {"ids": np.concatenate(texts), "offsets": np.cumsum([0, *map(len, texts)]),
                  "starts": data.arrays["starts"][rows], "labels": data.arrays["labels"][rows]}  # fmt: skip
        out.append(dataclasses.replace(data, length=widths[at], arrays=arrays, info={**data.info, "examples": len(rows)}))
    return out


def embedded(s, model, params, groups):
    """``(embeddings [N, D], labels [N])`` of the texts in ``groups``, in the same order for all weights."""
    params = {k: v for k, v in params.items() if k != "head"}
    found = [measure.embeddings(model, params, group, s.eval_batch) for group in groups]
    return tuple(np.concatenate(x) for x in zip(*found))


def accuracy(s, model, params, task):
    """Share of a task's test texts that a head retrained on their other folds gets right."""
    x, y = embedded(s, model, params, task.test)
    return float((cross_fitted(x, y, task.num_labels, folds=s.folds, l2=s.l2) == y).mean())


@functools.lru_cache(maxsize=1)
def loaded(s):
    """``(model with pooled embeddings, base params, tasks, params -> pre-training loss)``, read once for all parts.

    The params hold the masked-LM head where the loss is measured by it.
    """
    kind = s.forgetting["measure"]
    if kind not in MEASURES:
        raise UserError(f"no measure of forgetting called {kind!r}{nearest(kind, MEASURES)}")
    head = "mlm" if kind == "pseudo_loss" else "pooled"
    if absent := hf.missing_head(s.model, head):
        raise UserError(f"{s.model} has no weights for {', '.join(absent)}: measure its forgetting by contrastive, not by {kind}")
    model, params = hf.load(s.model, head=head)
    model = model.with_head("pooled")
    return model, params, load_tasks(s, model.config.vocab_size), MEASURES[kind](s, model)


def _contrast(s, model):
    spec = s.forgetting
    source = sources.load(spec["source"], spec["split"])
    texts = [source[i]["text"] for i in range(spec["texts"])]
    batches = measure.halves(s.model, texts, batch_size=spec["batch"], length=spec["max_length"])
    # One apply for all calls: another one, though equal, would compile anew.
    return lambda params: forgetting.contrastive_loss(model.apply, params, batches)["loss"]


def _masked(s, model):
    spec, tok = s.forgetting, tokenizer.load(hf.resolve(s.model))
    data = {"source": spec["source"], "max_length": spec["max_length"], "eval_limit": spec["texts"]}
    batches = pipeline.eval_batches(pipeline.build(data, spec["split"], tok, "mlm", model.config.vocab_size), spec["batch"])
    apply = model.with_head("mlm").apply
    return lambda params: forgetting.pseudo_loss(apply, params, batches, mask_id=tok.mask_id)["loss"]


# What the model was pre-trained to do, on texts of no task: params -> loss (nats); a rise says what was forgotten.
MEASURES = {"contrastive": _contrast, "pseudo_loss": _masked}


def untouched(s):
    """What the base model scores on every task and at its pre-training objective."""
    model, params, tasks, forgot = loaded(s)
    start = [accuracy(s, model, params, task) for task in tqdm(tasks, desc="base", unit="task", leave=False)]
    majority = [float(np.bincount(np.concatenate([g.arrays["labels"] for g in t.test])).max() / s.test_texts) for t in tasks]
    return {"setting": _plain(s), "tasks": [t.name for t in tasks], "classes": [t.num_labels for t in tasks], "start": start,
            "majority": majority, "pretraining": forgot(params)}  # fmt: skip


@functools.lru_cache(maxsize=8)
def _trainer(model, steps, learning_rate):
    """``(transformation, jitted step)`` of one method: all its seeds and tasks run the same program."""
    tx, _ = updates.build("adamw", learning_rate=learning_rate, steps=steps, warmup=0.06, clip=1.0)
    cfg = {"objective": "classification", "model": {"dropout": False}, "data": {"num_labels": model.config.num_labels}}
    step = train.make_step(train.make_objective(cfg, model, None), tx, accumulate=1, seed=0)
    return tx, jax.jit(step, donate_argnums=0)


def padded(head, classes):
    """A head of ``classes`` outputs, the ones beyond its own never chosen."""
    beyond = classes - head["bias"].shape[0]
    return {"kernel": jnp.pad(head["kernel"], ((0, 0), (0, beyond))),
            "bias": jnp.pad(head["bias"], (0, beyond), constant_values=UNUSED)}  # fmt: skip


def learn(s, model, params, method, task, rng, seed):
    """``(merged weights, losses)`` after a task: a head, a new adapter, ``s.steps`` steps, the adapter merged."""
    rules, trains, rate = s.methods[method]
    classes = max(data["num_labels"] for _, data in s.tasks)
    head = linear_head(*embedded(s, model, params, task.head), task.num_labels, l2=s.l2)
    params = kernels.adapt({**params, "head": padded(head, classes)}, rules, rng)
    trainable, frozen = tree.split(params, registry.call("mask", "rules", params, 0, trainable=trains))
    tx, step = _trainer(model.with_head("prototype", classes), s.steps, rate)
    trainable = jax.tree.map(jnp.copy, trainable)  # the step takes its state over; these may be the base's own arrays
    state, losses = train.TrainState(jnp.zeros((), jnp.int32), trainable, tx.init(trainable)), []
    batches = pipeline.batches(task.train, s.batch_size, seed)
    for i in tqdm(range(s.steps), desc=f"{method} {task.name}", unit="step", leave=False):
        state, metrics = step(state, frozen, batches[i])
        losses.append(metrics["loss"])
    losses = np.asarray(jnp.stack(losses))
    if not np.isfinite(losses).all():
        raise UserError(f"{method}: the loss on {task.name} stopped being finite at step {int(np.argmin(np.isfinite(losses)))}; lower lr_scale")
    merged = kernels.merge(tree.join(state.trainable, frozen))
    return {k: v for k, v in merged.items() if k != "head"}, losses


def opened(base, params):
    """Intruders among the top K of every linear layer by ε, and ‖ΔW‖_F over all of them, against the weights before any task."""
    found = spectral.over_tree(spectral.intruder_dimensions, base, params, include=LINEAR, k=K)
    cosines = np.concatenate([x["max_cosine"].reshape(-1, K) for x in found.values()])
    first, second = tree.flatten(base), tree.flatten(params)
    moved = sum(float(np.square(np.asarray(second[p], np.float64) - np.asarray(first[p], np.float64)).sum()) for p in found)
    return {"matrices": len(cosines), "delta_norm": moved**0.5,
            "intruders": {str(eps): int(spectral.count_intruders(cosines, k=K, eps=eps).sum()) for eps in SWEEP}}  # fmt: skip


def sequence(s, method, seed):
    """The forgetting matrix of one method and seed, and what the weights look like after each task.

    ``matrix[i][j]`` is the accuracy on task j after task i: every task so far, the next one, None beyond.
    """
    model, base, tasks, forgot = loaded(s)
    params, matrix, stages = base, [], []
    for i, task in enumerate(tasks):
        params, losses = learn(s, model, params, method, task, jax.random.fold_in(jax.random.key(seed), i), seed)
        seen = tasks[: i + 2]  # the next one too, for forward transfer
        row = [accuracy(s, model, params, t) for t in tqdm(seen, desc=f"{method} tests", unit="task", leave=False)]
        matrix.append(row + [None] * (len(tasks) - len(row)))
        ends = max(1, s.steps // 6)
        stages.append({"task": task.name, "loss": [float(losses[:ends].mean()), float(losses[-ends:].mean())],
                       "pretraining": forgot(params), **opened(base, params)})  # fmt: skip
    return {"matrix": matrix, "stages": stages}


def sections(context):
    """The part of the report on the sequence of tasks, from the parts that are done."""
    s = of(context.setting)
    return continual_page.sections(s, context) if s else []


def claims(context):
    """Claim rows on the sequence of tasks."""
    s = of(context.setting)
    return continual_page.claims(s, context) if s else []
