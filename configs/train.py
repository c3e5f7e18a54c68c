"""One training run: ``--config=configs/train.py:model=minilm,data=imdb,method=lora`` plus ``--config.KEY=VALUE``.

model:  an asset name, a local folder, a .gguf file or hf:org/name
data:   a bundled source (imdb, bbc, rte, winogrande, …), a .jsonl/.csv/.parquet file, tfds:NAME, procedural:NAME(…)
method: full, lora, rslora, bitfit, head; with hyper-parameters as lora(rank=4,alpha=8)
objective: classification (default for encoders' data with labels), causal_lm, mlm
prompt: encoder or decoder: classification of a bundled task by its label words (model.head=label_words), no new weights

Few examples: ``--config.data.shots=64 --config.data.shots_seed=13``. A prompt of one's own (model.label_ids is filled in):
``--config.model.head=label_words --config.data.template='{text} It was [MASK].' --config.data.label_words="('bad','good')"``
"""

import re

from ml_collections import ConfigDict

from ft_jax.data import pipeline, tasks, templates
from ft_jax.errors import UserError, nearest
from ft_jax.kernels import parse_rule
from ft_jax.train import DEFAULTS

LINEAR = r"layers/(attn|mlp)/\w+/kernel"  # every linear layer but embeddings and heads
METHODS = {
    "full": {"trainable": ()},
    "layers": {"trainable": (("layers/.*", True),)},  # every layer weight; embeddings and head frozen
    "head": {"trainable": (("(head|pooler)/.*", True),)},
    "bitfit": {"mask": "bitfit"},
}
HEADS = {"classification": "classification", "causal_lm": "lm", "mlm": "mlm"}


def method(text):
    """The ``method`` group for a name: a row of METHODS, or a kernel on every linear layer."""
    name, hp = parse_rule(text)
    if name in METHODS and not hp:
        return {"name": text, **METHODS[name]}
    if name in METHODS:
        raise UserError(f"method {name!r} takes no parameters, got {sorted(hp)}")
    from ft_jax import registry

    kernels = [m.name for m in registry.methods("kernel")]
    if name not in kernels:
        raise UserError(f"no method called {name!r}{nearest(name, [*METHODS, *kernels])}")
    return {"name": text, "kernels": ((LINEAR, text),)}


def get_config(arg=""):
    options = {"model": "minilm", "data": "imdb", "method": "full", "objective": "classification", "prompt": ""}
    for part in filter(None, re.split(r",(?![^()]*\))", arg or "")):
        key, sep, value = part.partition("=")
        if not sep or key not in options:
            raise UserError(f"cannot read {part!r} in the config string{nearest(key, options)}")
        options[key] = value
    cfg = ConfigDict({k: dict(v) if isinstance(v, dict) else v for k, v in DEFAULTS.items()})
    cfg.objective = options["objective"]
    cfg.model.path = options["model"]
    cfg.model.head = HEADS.get(cfg.objective, "")
    cfg.method = ConfigDict(DEFAULTS["method"] | method(options["method"]))
    adapted = bool(cfg.method.kernels)
    cfg.optimizer.learning_rate = 2e-4 if adapted else 2e-5
    cfg.data = ConfigDict(pipeline.DEFAULTS)
    cfg.data.source = options["data"]
    cfg.data.num_labels = 2
    if cfg.objective == "classification" and options["data"] in tasks.TASKS:
        cfg.data.update(tasks.settings(options["data"]))
    if options["prompt"]:
        if cfg.objective != "classification":
            raise UserError(f"prompt={options['prompt']} is for classification, not for {cfg.objective!r}")
        cfg.data.update(templates.settings(options["data"], options["prompt"]))
        cfg.model.head = "label_words"
    cfg.eval.metric = "accuracy" if cfg.objective == "classification" else "loss"
    return cfg
