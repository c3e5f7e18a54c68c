"""Methods that start from finished runs, by config: parent runs, the child, its resumption and loading when they are gone."""

import json
import shutil

import numpy as np
import pytest

from configs import train as configs
from ft_jax import kernels, train, tree
from ft_jax.errors import UserError
from ft_jax.io import runs
from ft_jax.taps import Tap
from tests import folders
from tests.helpers import make_batch

MHR = "mhr(tasks=2,skills=3,splits=2,rank=4)"
DOMAIN = "mixda_domain(width=8)"


class World:
    """A folder with a tiny encoder, two sources, and the parent runs that are asked for."""

    def __init__(self, home):
        self.home = home
        folders.make_model_folder(home / "bert", head="mlm")
        folders.make_model_folder(home / "other", head="mlm", seed=1)
        for seed, name in enumerate(("film", "more")):
            folders.write_rows(home / f"{name}.jsonl", folders.reviews(np.random.default_rng(seed), 60))

    def config(self, method, sources=("film",), objective="classification", model="bert", **changes):
        data = "+".join(str(self.home / f"{name}.jsonl") for name in sources)
        cfg = configs.get_config(f"model={self.home / model},data={data},method={method},objective={objective}")
        cfg.update({"steps": 8, "batch_size": 8, **changes})
        cfg.data.max_length, cfg.optimizer.learning_rate, cfg.log.tensorboard, cfg.mesh.data = 16, 2e-2, False, 1
        cfg.eval.every, cfg.save.every, cfg.log.every = 0, 4, 4
        return cfg

    def parent(self, name, method, sources=("film",), objective="classification"):
        """The folder of a finished run, trained at the first call."""
        train.train(self.config(method, sources, objective, seed=sum(map(ord, name))), self.home / name)
        return self.home / name

    def parents(self, kind):
        both = ("film", "more")
        made = {
            "mhr": lambda: [self.parent("skills", MHR, both)],
            "lora": lambda: [self.parent("one", "lora(rank=2)"), self.parent("two", "lora(rank=4)", ("more",))],
            "mixda": lambda: [self.parent(name, DOMAIN, both, "mlm") for name in ("films", "books")],
        }
        return made[kind]()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FT_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield World(tmp_path_factory.mktemp("home"))


def typed(params):
    leaves = tree.flatten(params, is_leaf=lambda x: kernels.is_kernel(x) or isinstance(x, Tap))
    return {path: leaf for path, leaf in leaves.items() if kernels.is_kernel(leaf) or isinstance(leaf, Tap)}


def restated(kind, found):
    """What the child holds frozen, or began with, by field, from the parents' leaves at a path."""
    first = found[0]
    if kind == "mhr_z":
        return {"a": first.a, "b": first.b}
    if kind == "mhr_mu":
        a, b = np.asarray(first.a).mean(2), np.asarray(first.b).mean(2)
        return {"a": a.reshape(len(a), -1, 4), "b": np.concatenate(list(np.moveaxis(b, 1, 0)), -1)}
    if kind == "meteora":
        scale, b = 16 / np.asarray([2, 4]), [np.asarray(k.b) for k in found]
        return {"b": np.stack([np.pad(scale[0] * b[0], ((0, 0), (0, 2), (0, 0))), scale[1] * b[1]], 1)}
    return {name: np.concatenate([getattr(tap, name) for tap in found], 1) for name in ("down", "up", "up_bias")}


CHILDREN = {"mhr_z": ("mhr", "", "logits"), "mhr_mu": ("mhr", "", "a"), "meteora": ("lora", ",k=1", "gate"), "mixda": ("mixda", ",width=8", "gate_out")}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["meteora", "mixda", "mhr_z", "mhr_mu"])
def test_a_run_starts_from_finished_runs_and_needs_them_no_more(name, world, tmp_path, monkeypatch):
    kind, rest, trained = CHILDREN[name]
    named = [shutil.copytree(folder, tmp_path / folder.name) for folder in world.parents(kind)]
    held = [typed(runs.load_run(folder)[1]) for folder in named]
    cfg = world.config(f"{name}(runs={':'.join(map(str, named))}{rest})")

    def crash(run, step, metrics, log=runs.Run.log):
        log(run, step, metrics)
        if step == 8:
            raise RuntimeError("stopped here")

    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "log", crash)
        with pytest.raises(RuntimeError, match="stopped here"):
            train.train(cfg, tmp_path / "child")
    for folder in named:
        shutil.rmtree(folder)
    summary = train.train(cfg, tmp_path / "child")
    assert summary["steps"] == 8 and train.train(cfg, tmp_path / "child") == summary
    begun = runs.Run(tmp_path / "child", train.ready(cfg), tensorboard=False).start
    model, params, _ = runs.load_run(tmp_path / "child")
    mine = typed(params)
    assert mine.keys() == held[0].keys()
    for path, leaf in mine.items():
        for field, expected in restated(name, [parent[path] for parent in held]).items():
            np.testing.assert_allclose(begun[f"{path}/{field}"], expected, rtol=2e-5, atol=1e-6)
            assert np.array_equal(begun[f"{path}/{field}"], getattr(leaf, field)) == (field not in leaf.trainable), path
        moved = getattr(leaf, trained) - (begun.get(f"{path}/{trained}", 0))
        assert trained in leaf.trainable and np.abs(moved).max() > 1e-3, path
    assert np.isfinite(model.apply(params, {k: v for k, v in make_batch(model).items() if k in ("input_ids", "attention_mask")})).all()


def unfinished(world, tmp_path):
    (shutil.copytree(world.parents("lora")[0], tmp_path / "run") / "DONE").unlink()
    return tmp_path / "run"


def another_bases(world, tmp_path):
    """A run whose base was another one when it was trained."""
    folder = shutil.copytree(world.parents("lora")[0], tmp_path / "run")
    held = json.loads((folder / "config.json").read_text())
    held["model"]["path"] = str(world.home / "other")
    (folder / "config.json").write_text(json.dumps(held))
    return folder


def one(world, tmp_path):
    return world.parents("lora")[0]


FAULTS = {
    "no run": (lambda w, t: one(w, t).with_name("onne"), "meteora(runs=RUN:RUN)", {}, ["onne holds no run", "nearest: 'one'"]),
    "unfinished": (unfinished, "meteora(runs=RUN:RUN)", {}, ["run is not finished"]),
    "changed base": (another_bases, "meteora(runs=RUN:RUN)", {}, ["is not the one this run was trained on (fingerprint"]),
    "other base": (one, "meteora(runs=RUN:RUN)", {"model": "other"}, ["was trained on", "which is another base than"]),
    "other kind": (one, "mhr_z(runs=RUN)", {}, ["one has a LowRank at layers/attn/k/kernel; mhr_z takes what mhr or polytropon trained"]),
    "no tap": (one, "mixda(runs=RUN)", {}, ["one has nothing at layers/taps/ffn_out; mixda takes what mixda_domain trained"]),
    "changed matrix": (lambda w, t: w.parent("pissa", "pissa(rank=2)"), "meteora(runs=RUN:RUN)", {}, ["stands around something else than the base's own"]),
    "one adapter": (one, "meteora(runs=RUN)", {}, ["layers/attn/k/kernel: one adapter leaves meteora's gate nothing to choose"]),
    "none named": (one, "meteora(k=1)", {}, ["layers/attn/k/kernel: meteora starts from finished runs and names none"]),
    "a number": (one, "mixda(runs=3)", {}, ["runs: 3 holds no run"]),
    "no tasks": (one, "meteora(runs=RUN:RUN,gate_loss=1.0)", {}, ["the gate's loss takes task t to adapter t of 2, and the data have 0 tasks"]),
    "layers": (one, "meteora(runs=RUN:RUN)", {"freeze": 1}, ["is of (3, 32, 32) there and of (2, 32, 32) here"]),
    "no other text": (one, DOMAIN, {"objective": "mlm"}, ["layers/taps/ffn_out: mixda_domain keeps the layers' outputs on other texts"]),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_started_from_is_said_before_compute(fault, world, tmp_path):
    make, method, changes, words = FAULTS[fault]
    cfg = world.config(method.replace("RUN", str(make(world, tmp_path))), **{k: v for k, v in changes.items() if k != "freeze"})
    cfg.method.freeze_layers = changes.get("freeze", 0)
    with pytest.raises(UserError) as error:
        train.train(cfg, tmp_path / "child")
    assert all(w in str(error.value) for w in words) and "\n" not in str(error.value), str(error.value)
    assert not (tmp_path / "child").exists()
