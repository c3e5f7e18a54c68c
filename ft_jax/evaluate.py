"""What checkpoints can do: their task, and the text they were pretrained on. One model is in memory at a time."""

import dataclasses
import json

import jax
from tqdm.auto import tqdm

from ft_jax import kernels, train
from ft_jax.analysis import forgetting, predictions
from ft_jax.data import pipeline
from ft_jax.errors import UserError
from ft_jax.io import hf, peft, tokenizer
from ft_jax.io.adapted import Adapted
from ft_jax.models import Model
from ft_jax.objectives import inputs_of

BATCH = 16
HEAD_OF_TASK = {"CAUSAL_LM": "lm", "SEQ_CLS": "classification"}  # what PEFT calls a task, where it tells the head
HEAD_TENSORS = ("classifier.weight", "classifier.out_proj.weight", "score.weight")  # as many rows as labels


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured on which data: ``data`` is ``{"task": Dataset, "text": Dataset}`` or a part of it."""

    model: Model
    base: object
    objective: str | None
    data: dict


def plan(base, tuned, asked):
    """The ``Plan`` for a base and a tuned checkpoint (a folder, or `Adapted`), its data read and tokenised.

    asked: ``{"task" or "text": a data source, or a JSON object of data settings}``; the validation split is measured.
    task: accuracy and loss by the tuned model's head. text: next-token loss, for language models. UserError for a model
    without such a head and for whatever is wrong with the data.
    """
    folder = tuned.base if isinstance(tuned, Adapted) else tuned
    head, labels = _adapter_head(tuned) if isinstance(tuned, Adapted) else (None, None)
    config = hf.read_config(folder, head, labels)
    objective = next((o for o in predictions.TARGETS if config.head in train.OBJECTIVE_HEADS[o]), None)
    if "task" in asked and objective is None:
        raise UserError(f"{tuned}: a model with head {config.head!r} answers no task; leave --task out")
    if "text" in asked and config.head != "lm":
        raise UserError(f"{tuned}: --text measures a language model's next-token loss; this one has head {config.head!r}")
    home = next((f for f in (getattr(tuned, "folder", tuned), base) if (f / "tokenizer.json").is_file()), base)
    tok, data = tokenizer.load(home), {}
    for name, spec in asked.items():
        kind = objective if name == "task" else "causal_lm"
        own = {"num_labels": config.num_labels} if kind == "classification" else {"append_eos": name == "task"}
        data[name] = pipeline.build({**own, **_settings(name, spec)}, "validation", tok, kind, config.vocab_size)
        limit = config.max_positions - (config.family == "roberta") * (1 + config.pad_token_id)
        if data[name].length > limit:
            raise UserError(f"--{name}: max_length {data[name].length} is beyond the model's {limit} positions")
    return Plan(Model(config), base, objective, data)


def _adapter_head(tuned):
    adapter = peft.open_adapter(tuned.folder)
    keys = [key for name, key in adapter.whole.items() if name.endswith(HEAD_TENSORS)]
    return HEAD_OF_TASK.get(adapter.config.get("task_type")), adapter.checkpoint.shape(keys[0])[0] if keys else None


def _settings(name, spec):
    if not spec.lstrip().startswith("{"):
        return {"source": spec}
    try:
        return json.loads(spec)
    except ValueError as error:
        raise UserError(f"--{name} {spec!r} is no JSON object: {error}") from None


def _load(plan, source):
    """Dense parameters of a checkpoint under the plan's head."""
    own = {"head": plan.model.config.head, "num_labels": plan.model.config.num_labels}
    if not isinstance(source, Adapted):
        return hf.load(source, **own)[1]
    return jax.jit(kernels.merge)(peft.load_adapter(source.folder, plan.model, hf.load(source.base, **own)[1]))


def measure(plan, sources):
    """``{"task": {name: scores}, "text": {name: {loss, perplexity, tokens}}}`` of ``sources = {name: checkpoint}``.

    A checkpoint that lacks the weights of the head is left out of the task.
    """
    found = {name: {"source": data.name} for name, data in plan.data.items()}
    predict = predictions.predictor(lambda params, batch: plan.model.apply(params, inputs_of(batch)), plan.objective)
    for label, source in sources.items():
        params = _load(plan, source)
        headless = not isinstance(source, Adapted) and hf.missing_head(
            source, plan.model.config.head, plan.model.config.num_labels)  # fmt: skip
        for name, data in plan.data.items():
            batches = pipeline.eval_batches(data, BATCH)
            if name == "text":
                found[name][label] = forgetting.perplexity(plan.model.apply, params, batches, label=f"text: {label}")
            elif not headless:
                bar = tqdm(batches, desc=f"task: {label}", unit="batch", leave=False)
                found[name][label] = predictions.scores(predict(params, bar))
    return found
