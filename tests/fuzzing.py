"""Damaged files and odd configs for every loader: a case ends well, or with a UserError; never otherwise, never huge, never wrong.

A target is a folder with one good file, the function that loads it, and what must hold of what it loaded. Hypothesis draws the
damage; `run` counts.
"""

import contextlib
import functools
import json
import pathlib
import tempfile
from typing import NamedTuple

import hypothesis
import numpy as np
from hypothesis import strategies as st

from tests.damage import ODD, bounds, bytes_damaged, json_damaged, outcome, places, put  # noqa: F401 (bounds: for tests)


class Target(NamedTuple):
    """``make(folder)`` writes what is good; ``load(folder)`` reads it; ``right(folder, loaded, how)`` says what is wrong, or None."""

    make: callable
    file: str
    load: callable
    right: callable = lambda folder, loaded, how: None
    head: int = 0  # bytes at the beginning that most damage goes to; 0: the file is text, and is cut and changed anywhere
    cut: bool = True  # whether a file that was cut has to be refused


# Targets. Imports stand inside: the script starts without them.


def _bert(folder):
    from tests import folders

    folders.make_model_folder(folder)


def _load(folder):
    from ft_jax.io import hf

    return hf.load(folder, head="none")


def plain(file):
    """``{name: (kind, shape, bytes)}`` of a safetensors file, read by itself."""
    data = pathlib.Path(file).read_bytes()
    size = int.from_bytes(data[:8], "little")
    rows = {k: v for k, v in json.loads(data[8 : 8 + size]).items() if k != "__metadata__"}
    return {k: (v["dtype"], v["shape"], data[8 + size + v["data_offsets"][0] : 8 + size + v["data_offsets"][1]]) for k, v in rows.items()}


def _exact(folder, loaded, how):
    """The numbers that were read are those of the file as it is now."""
    del loaded, how
    from ft_jax.io import safetensors

    held, ours = plain(next(folder.glob("*model.safetensors"))), safetensors.Checkpoint(next(folder.glob("*model.safetensors")))
    for name, (kind, shape, data) in held.items():
        if kind == "F32" and (list(ours.shape(name)) != shape or ours.read(name).tobytes() != data):
            return f"{name} is not what the file holds"
    return None if sorted(held) == ours.names else "other tensors than the file's"


def _shards(folder):
    from ft_jax.io import safetensors

    safetensors.save(folder, [(f"t{i}", np.full(30, i, np.float32)) for i in range(4)], max_shard_bytes=200)


def _read_shards(folder):
    from ft_jax.io import safetensors

    return dict(safetensors.Checkpoint(folder).items())


def _known(folder, loaded, how):
    """Each tensor is the one of its name, whatever the index says of its place."""
    del folder, how
    return next((f"{n} is another tensor's" for n, x in loaded.items() if n not in ("t0", "t1", "t2", "t3") or not (x == int(n[1])).all()), None)


def _gguf(folder):
    from tests import gguf_files

    gguf_files.write(folder / "a.gguf")


def _load_gguf(folder):
    from ft_jax.io import gguf

    with tempfile.TemporaryDirectory() as made:
        gguf.to_folder(folder / "a.gguf", pathlib.Path(made) / "m")
        return {k: v[2] for k, v in plain(pathlib.Path(made) / "m" / "model.safetensors").items()}


def _one_at_most(folder, loaded, how):
    """A flipped bit of the numbers changes one tensor at most."""
    del how
    good, now = _good_gguf(), (folder / "a.gguf").read_bytes()
    differs = [i for i, (a, b) in enumerate(zip(good[0], now, strict=False)) if a != b]
    changed = [name for name in loaded if good[1].get(name) != loaded[name]]
    return f"{changed} all changed" if len(now) == len(good[0]) and len(differs) == 1 and differs[0] > 20_000 and len(changed) > 1 else None


@functools.cache
def _good_gguf():
    with tempfile.TemporaryDirectory() as folder:
        _gguf(pathlib.Path(folder))
        return (pathlib.Path(folder) / "a.gguf").read_bytes(), _load_gguf(pathlib.Path(folder))


def _tokenize(folder):
    from ft_jax.io import tokenizer

    made = tokenizer.load(folder)
    made.encode_batch(["the film was good", ""], max_length=8)
    return made.pad_id, made.special_ids


def _config(folder):
    from ft_jax.io import hf

    return hf.load(folder)


@functools.cache
def _llama():
    from ft_jax import models
    from tests import helpers

    model = models.Model(models.config_from_hf({**helpers.CONFIGS["llama"], "num_hidden_layers": 2}))
    return model, helpers.make_params(model)


def _adapter(folder):
    import jax

    from ft_jax.io import peft
    from ft_jax.kernels import adapt

    model, base = _llama()
    peft.save_adapter(folder, model, adapt(base, [("layers/attn/(q|v)/kernel", "lora(rank=2)")], jax.random.key(0)), "base", base=base)


def _prompt(folder):
    import jax

    from ft_jax import taps
    from ft_jax.io import peft

    model, base = _llama()
    peft.save_adapter(folder, model, taps.attach(model, base, [("prompt", "prompt_tuning(length=3)")], jax.random.key(0)), "base", base=base)


def _load_adapter(folder):
    from ft_jax.io import peft

    return peft.load_adapter(folder, *_llama())


def _finite(folder, loaded, how):
    del folder, how
    from ft_jax import tree

    return next((f"{p} holds {x}" for p, x in tree.flatten(loaded).items() if not np.isfinite(x).all()), None)


def _mask(folder):
    from ft_jax.weights import graft

    graft.save_mask(folder / "mask.safetensors", {"layers/a": np.ones((3, 5), bool), "b": np.zeros((2, 2), bool)})


def _load_mask(folder):
    from ft_jax.weights import graft

    return graft.load_mask(folder / "mask.safetensors")


def _scores(folder):
    from ft_jax import importance

    importance.save(folder, {"layers/a": np.ones((3, 5), np.float32)}, "fisher")


def _load_scores(folder):
    from ft_jax.masks.weights import scores_of

    return scores_of(folder, "fisher", {"layers": {"a": np.zeros((3, 5), np.float32)}})


def _search(folder):
    from ft_jax import search

    space = {"parameters": {"rank": [1, 2]}, "settings": {"seed": "{rank}"}}
    made = {"config": "configs/train.py:model=a", "space": space, "sampler": "tpe", "seed": 0}
    with search.opened(folder, made):
        study = search._study(folder, "accuracy")
        for i in range(3):
            trial = study.ask(search.distributions(space["parameters"]))
            trial.set_user_attr("row", {"parameters": dict(trial.params), "settings": {}, "run": "runs/a", "size": i, "score": 0.5})
            study.tell(trial, [i, 0.5])


def _load_search(folder):
    from ft_jax import search
    from ft_jax.io import files

    made = json.loads(_good("search")["search.json"])
    with search.opened(folder, made):
        return files.entries(folder), search.write(search._study(folder, "accuracy"), folder, "accuracy")


def _run_folder(folder):
    from ft_jax.io import files

    files.write_json(folder / "config.json", {"steps": 3, "seed": 0})
    files.write_json(folder / "DONE", {"steps": 3, "best_loss": 0.5})
    files.write_json(folder / "population.json", {"members": ["a", folder.name]})
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": i, "train/loss": 0.5}) + "\n" for i in range(9)))


def _load_run(folder):
    from ft_jax import population
    from ft_jax.io import runs

    run = runs.Run(folder, {"steps": 3, "seed": 0}, tensorboard=False)
    return run.summary, run.metrics(), population._companions(run)


def _same_config(folder, loaded, how):
    del loaded, how
    return None if json.loads((folder / "config.json").read_text()) == {"steps": 3, "seed": 0} else "another config was taken"


def _part(folder):
    from ft_jax.io import files

    files.write_json(folder / "part.json", {"seconds": 1.0, "machine": "x", "value": {"loss": [0.5, 0.25]}})


def _load_part(folder):
    from experiments import study

    return study.held(folder / "part.json")


def _space(folder):
    from ft_jax.io import files

    files.write_json(folder / "space.json", {
        "parameters": {"kind": ["lora", "dora"], "rank": {"low": 1, "high": 8, "log": True}, "layers": {"subset": 3}},
        "settings": {"method": "{kind}(rank={rank})", "method.mask": "only_layers(layers='{layers}')", "steps": 3}})  # fmt: skip


def _load_space(folder):
    from ft_jax import search
    from ft_jax.io import files

    parameters, settings = search.check(files.read_json(folder / "space.json"))
    drawn = {name: d.choices[0] if hasattr(d, "choices") else d.low for name, d in search.distributions(parameters).items()}
    return search.config_of("configs/train.py:model=minilm,data=imdb", search.filled(settings, search.values_of(parameters, drawn)))


TARGETS = {
    "model.safetensors": Target(_bert, "model.safetensors", _load, _exact, head=4000),
    "shard": Target(_shards, "model-00002-of-00004.safetensors", _read_shards, head=120),
    "index": Target(_shards, "model.safetensors.index.json", _read_shards, _known),
    "gguf": Target(_gguf, "a.gguf", _load_gguf, _one_at_most, head=900),
    "gguf tensors": Target(_gguf, "a.gguf", _load_gguf, _one_at_most, head=20_000),
    "config.json": Target(_bert, "config.json", _config),
    "tokenizer.json": Target(_bert, "tokenizer.json", _tokenize),
    "tokenizer_config.json": Target(_bert, "tokenizer_config.json", _tokenize),
    "adapter_config.json": Target(_adapter, "adapter_config.json", _load_adapter, _finite),
    "adapter_model.safetensors": Target(_adapter, "adapter_model.safetensors", _load_adapter, _exact, head=1500),
    "prompt adapter": Target(_prompt, "adapter_config.json", _load_adapter),
    "graft mask": Target(_mask, "mask.safetensors", _load_mask, head=200),
    "scores": Target(_scores, "model.safetensors", _load_scores, _exact, head=150),
    "search.json": Target(_search, "search.json", _load_search),
    "search": Target(_search, "journal.jsonl", _load_search, cut=False),
    "run config": Target(_run_folder, "config.json", _load_run, _same_config),
    "DONE": Target(_run_folder, "DONE", _load_run),
    "metrics": Target(_run_folder, "metrics.jsonl", _load_run, cut=False),
    "population.json": Target(_run_folder, "population.json", _load_run),
    "study part": Target(_part, "part.json", _load_part),
    "search space": Target(_space, "space.json", _load_space),
}  # fmt: skip
CONFIGS = ("config", "method string", "prepared config")


@functools.cache
def _good(name):
    """``{file: bytes}`` of a target's good folder."""
    with tempfile.TemporaryDirectory() as folder:
        TARGETS[name].make(pathlib.Path(folder))
        return {p.name: p.read_bytes() for p in sorted(pathlib.Path(folder).iterdir()) if p.is_file()}


# Cases


def case(name, how, data):
    """The outcome of one damaged file."""
    target = TARGETS[name]
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place) / "folder"
        folder.mkdir()
        for file, whole in _good(name).items():
            (folder / file).write_bytes(data if file == target.file else whole)
        found = outcome(lambda: target.load(folder), lambda loaded: target.right(folder, loaded, how))
    whole = _good(name)[target.file]
    if found == "loaded" and how == "cut" and target.cut and data.strip() != whole.strip():
        return "wrong: a file that was cut was loaded"
    return found


def strategy(name):
    """Strategy of ``(how, bytes)`` for a target, of ``(how, value)`` for configs."""
    if name == "method string":
        pieces = ["lora", "dora", "full", "(rank=", "4", ")", "+", "lisa", "prompt_tuning(length=3)", "@", "nf4(block=64)", "(", ",",
                  "alpha=", "-1", "1e99", "'", "layerwise_decay", "bitfit", "|", "=", " ", "__import__('os')", "[1,2]", "{}", "None", "\n", "ä", "lambda: 1", "sgd"]  # fmt: skip
        return st.lists(st.sampled_from(pieces), min_size=1, max_size=7).map(lambda p: ("text", "".join(p)))
    if name in CONFIGS:
        cfg = json.loads(json.dumps(_config_of("M", "D")))
        names = st.sampled_from(["steps", "stps", "optimizer.learning_rat", "", "mesh", "\u0000", "data.splits"])
        change = st.tuples(st.sampled_from([p for p in places(cfg) if p]), st.sampled_from(ODD), st.integers(0, 5), names)
        return st.lists(change, min_size=1, max_size=2).map(lambda changes: ("value", functools.reduce(_changed, changes, cfg)))
    data, target = _good(name)[TARGETS[name].file], TARGETS[name]
    return bytes_damaged(data, target.head) if target.head or target.file.endswith(".jsonl") else json_damaged(data)


def _changed(cfg, change):
    path, new, kind, name = change
    with contextlib.suppress(KeyError, TypeError, IndexError, AttributeError):  # the change before took this place away
        return put(cfg, (*path[:-1], name), new, False) if kind == 0 else put(cfg, path, new, kind == 1)
    return cfg


def _config_of(model, data):
    from ft_jax import train

    return train.complete({"steps": 2, "batch_size": 4, "model": {"path": model, "head": "classification"}, "mesh": {"data": 1},
                           "method": {"kernels": [["layers/attn/[qv]/kernel", "lora(rank=2)"]]},
                           "data": {"source": data, "num_labels": 2, "max_length": 8}, "optimizer": {"hp": {"weight_decay": 0.1}}})  # fmt: skip


def _load_config(name, home, value):
    if name == "method string":
        import runpy

        return runpy.run_path("configs/train.py")["get_config"](f"model=minilm,data=imdb,method={value}")
    from ft_jax import train

    named = json.loads(json.dumps(value).replace('"M"', json.dumps(str(home / "bert"))).replace('"D"', json.dumps(str(home / "reviews.jsonl"))))
    if name == "config":
        return train.ready(named)
    if isinstance(named.setdefault("model", {}), dict):
        named["model"].setdefault("path", str(home / "bert"))  # the default one is fetched
    return train.prepare(train.ready(named), dry=True)


def cases(name, count, seed, home):
    """``[(what was drawn, outcome)]`` of ``count`` cases."""
    found = []
    if name == "prepared config":  # what it imports is not the first case's time
        _load_config(name, home, _config_of("M", "D"))

    @hypothesis.seed(f"{seed} {name}")
    @hypothesis.settings(max_examples=count, database=None, deadline=None, phases=[hypothesis.Phase.generate],
                         suppress_health_check=list(hypothesis.HealthCheck))  # fmt: skip
    @hypothesis.given(strategy(name))
    def draw(drawn):
        if name in CONFIGS:
            found.append((drawn, outcome(lambda: _load_config(name, home, drawn[1]))))
        else:
            found.append((drawn, case(name, *drawn)))

    draw()
    return found


def run(home, count, seed=0, names=(*TARGETS, *CONFIGS)):
    """``{cases, targets: {name: {loaded, refused, failed}}, failed: [what went wrong]}``; ``home`` has a tiny model and data."""
    from tqdm.auto import tqdm

    shares = {name: 1.0 for name in names} | {name: 0.5 for name in ("prepared config", "gguf", "gguf tensors") if name in names}
    counts, failed = {}, []
    with tqdm(total=count, desc="fuzz", unit="case") as bar:
        for name in names:
            found = cases(name, max(1, round(count * shares[name] / sum(shares.values()))), seed, home)
            outcomes = [what for _, what in found]
            bad = [(drawn, what) for drawn, what in found if what not in ("loaded", "refused")]
            counts[name] = {"loaded": outcomes.count("loaded"), "refused": outcomes.count("refused"), "failed": len(bad)}
            failed += [f"{name}: {drawn[0]}: {what}" for drawn, what in bad]
            bar.update(len(found))
    return {"cases": sum(sum(c.values()) for c in counts.values()), "targets": counts, "failed": failed}
