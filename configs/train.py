"""One training run: ``--config=configs/train.py:model=minilm,data=imdb,method=lora`` plus ``--config.KEY=VALUE``.

model:  an asset name, a local folder, a .gguf file or hf:org/name
data:   a bundled source (imdb, bbc, rte, winogrande, …), a .jsonl/.csv/.parquet file, tfds:NAME, procedural:NAME(…);
        several joined by + train together, each with a task id: data=imdb+rte,method=polytropon(tasks=2)
method: full, layers, head, or a kernel, a tap, a mask or an update by name, with hyper-parameters as lora(rank=4,alpha=8).
        Joined by +, at most one kernel, any taps (at the sites that each declares, one tap a site; other sites: method.taps),
        any masks (all must keep a weight; a|b: either), at most one update: lora+lisa(n=1)+layerwise_decay(decay=0.9)
objective: classification (default for encoders' data with labels), causal_lm, mlm, instruction_alignment(weight=0.5) (data.paraphrases)
prompt: encoder or decoder: classification of a bundled task by its label words (model.head=label_words), no new weights

Few examples: ``--config.data.shots=64 --config.data.shots_seed=13``. A prompt of one's own (model.label_ids is filled in):
``--config.model.head=label_words --config.data.template='{text} It was [MASK].' --config.data.label_words="('bad','good')"``
"""

import re

from ml_collections import ConfigDict

from ft_jax import masks, registry, taps, updates
from ft_jax.data import pipeline, tasks, templates
from ft_jax.errors import UserError, nearest
from ft_jax.kernels import parse_rule
from ft_jax.train import DEFAULTS

LINEAR = r"layers/(attn|mlp)/\w+/kernel"  # every linear layer but embeddings and heads
METHODS = {
    "full": {},
    "layers": {"trainable": (("layers/.*", True),)},  # every layer weight; embeddings and head frozen
    "head": {"trainable": (("(head|pooler)/.*", True),)},
}
CLAIMS = {  # what two methods of a kind would fight over
    "preset": "say which leaves train", "kernel": "take the same matrices", "update": "are the optimiser",
    "mask": "are the same mask", "tap": "are the same tap",
}  # fmt: skip
HEADS = {"classification": "classification", "causal_lm": "lm", "mlm": "mlm", "instruction_alignment": "lm"}


def _kind(name, hp):
    """What a method's name stands for: ``preset`` (a row of METHODS), ``kernel``, ``tap``, ``mask`` or ``update``."""
    if name in METHODS:
        if hp:
            raise UserError(f"method {name!r} takes no parameters, got {sorted(hp)}")
        return "preset"
    known = {m.name: m.kind for kind in ("update", "mask", "tap", "kernel") for m in registry.methods(kind)}
    if name not in known:
        raise UserError(f"no method called {name!r}{nearest(name, [*METHODS, *known])}")
    return known[name]


def _sites(text, name, rules):
    """The sites of a tap by name; UserError where it declares none, or where a tap of ``rules`` is already."""
    sites = registry.get("tap", name).traits["sites"]
    if not sites:
        raise UserError(f"method {text!r}: the tap {name!r} has no sites of its own; say in method.taps where it goes")
    for taken, rule in rules:
        if both := set(taps.sites([(taken, rule)])) & set(taps.sites([(sites, name)])):
            raise UserError(f"method {text!r}: {rule!r} and {name!r} both take the site {min(both)!r}; give one of them")
    return sites


def method(text):
    """``(method group, optimizer group)`` of names joined by ``+``: presets, a kernel on every linear layer, taps, masks, an update."""
    group, optimizer, single, parts = {"name": text, "mask": [], "taps": ()}, {}, {}, masks.split_outside(text, "+")
    for part in parts:
        name, hp = parse_rule(masks.split_outside(part, "|")[0])
        kind = _kind(name, hp)
        other = name if kind in ("mask", "tap") else single.setdefault(kind, name)
        if other != name or parts.count(part) > 1:
            raise UserError(f"method {text!r}: {other!r} and {name!r} both {CLAIMS[kind]}; give one of them")
        if kind == "preset":
            group |= METHODS[name]
        elif kind == "kernel":
            group["kernels"] = ((LINEAR, part.strip()),)
        elif kind == "tap":
            group["taps"] += ((_sites(text, name, group["taps"]), part.strip()),)
        elif kind == "mask":
            group["mask"].append(part.strip())
        else:
            clip = 0.0 if name in updates.PRIVATE else DEFAULTS["optimizer"]["clip"]
            optimizer = {"name": name, "hp": hp, "clip": clip}
    return group | {"mask": "+".join(group["mask"]) or "rules"}, optimizer


def data(text, objective):
    """The data group of one source, or of several joined by ``+``, each under a name without punctuation."""
    known = tasks.TASKS if objective == "classification" else ()
    found = [tasks.settings(name) if name in known else {"source": name, "num_labels": 2}
             for name in masks.split_outside(text, "+")]  # fmt: skip
    if len(found) == 1:
        return found[0]
    names = [re.sub(r"\W+", "_", one["source"]) for one in found]
    if len(set(names)) < len(names):
        raise UserError(f"data={text} names a source twice")
    return {"sources": dict(zip(names, found)), "num_labels": max(one["num_labels"] for one in found)}


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
    cfg.model.head = HEADS.get(parse_rule(cfg.objective)[0], "")
    group, optimizer = method(options["method"])
    cfg.method = ConfigDict(DEFAULTS["method"] | group)
    adapted = bool(cfg.method.kernels or cfg.method.taps)
    cfg.optimizer.update({"learning_rate": 2e-4 if adapted else 2e-5, **optimizer})
    cfg.data = ConfigDict(pipeline.DEFAULTS | data(options["data"], cfg.objective))
    if options["prompt"]:
        if cfg.objective != "classification":
            raise UserError(f"prompt={options['prompt']} is for classification, not for {cfg.objective!r}")
        cfg.data.update(templates.settings(options["data"], options["prompt"]))
        cfg.model.head = "label_words"
    cfg.eval.metric = "accuracy" if cfg.objective == "classification" else "loss"
    return cfg
