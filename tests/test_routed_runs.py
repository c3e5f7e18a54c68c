"""Kernels of several tasks in whole runs of two sources, which may contradict each other: task ids alone tell them apart."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ft_jax import kernels, tree
from ft_jax import train as engine
from ft_jax.errors import UserError
from ft_jax.io import runs
from ft_jax.kernels import mixture
from tests import folders
from tests.helpers import inputs, make_batch, make_model, make_params

LINEAR = r"layers/(attn|mlp)/\w+/kernel"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FT_JAX_CACHE", str(home / "cache"))
        folders.make_model_folder(home / "bert")
        rows = folders.reviews(np.random.default_rng(0), 120)
        folders.write_rows(home / "praise.jsonl", rows)
        folders.write_rows(home / "more.jsonl", folders.reviews(np.random.default_rng(1), 120))
        folders.write_rows(home / "blame.jsonl", [row | {"label": 1 - row["label"]} for row in rows])
        yield home


def config(home, method, sources=("praise", "blame"), **groups):
    files = {name: {"source": str(home / f"{name}.jsonl")} for name in sources}
    data = {"sources": files} if len(files) > 1 else {"source": files[sources[0]]["source"]}
    return {
        "steps": 400, "batch_size": 16, "model": {"path": str(home / "bert"), "head": "classification"},
        "data": data | {"num_labels": 2, "max_length": 16}, "method": {"name": method, "kernels": ((LINEAR, method),)},
        "optimizer": {"learning_rate": 5e-3}, "eval": {"every": 0, "metric": "accuracy"}, "save": {"every": 1000},
        "log": {"every": 10, "tensorboard": False}, "mesh": {"data": 1, "fsdp": 1, "tensor": 1}, **groups,
    }  # fmt: skip


def last_losses(workdir):
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return float(np.mean([row["train/loss"] for row in rows if "train/loss" in row][-4:]))


@pytest.mark.slow
def test_a_bank_learns_contradicting_sources_by_their_task_ids(home):
    """The same texts under opposite labels: a model that sees no ids cannot get under ln 2 = 0.69."""
    engine.train(config(home, "bank(adapters=2, rank=4)"), home / "bank")
    assert last_losses(home / "bank") < 0.45
    model, params, _ = runs.load_run(home / "bank", "last")
    batch = make_batch(model)
    routed = [np.asarray(model.apply(params, inputs(batch) | {"tasks": jnp.full(4, t)})) for t in (0, 1)]
    assert np.abs(routed[0] - routed[1]).max() > 0.5
    merged = kernels.merge(mixture.route(params, 1))
    np.testing.assert_allclose(model.apply(merged, inputs(batch)), routed[1], rtol=0, atol=1e-3)


@pytest.mark.slow
def test_without_task_ids_a_kernel_can_only_guess(home):
    engine.train(config(home, "lora(rank=4)"), home / "lora")
    assert last_losses(home / "lora") > 0.6


SKILLS = ["polytropon(tasks=2, skills=3, rank=4)", "mhr(tasks=2, skills=3, splits=2, rank=4)"]


@pytest.mark.slow
@pytest.mark.parametrize("method", SKILLS)
def test_skills_learn_two_sources_together_and_route_each_its_own_way(method, home):
    cfg = config(home, method, ("praise", "more"), steps=150)
    summary = engine.train(cfg, home / method.split("(")[0])
    assert last_losses(home / method.split("(")[0]) < 0.45 and summary["validation"]["accuracy"] > 0.7, summary
    _, params, made = runs.load_run(home / method.split("(")[0], "last")
    _, start, _, _ = engine.recipe.build(made)
    for path, x in tree.flatten(params).items():
        if path.endswith("/logits"):
            moves = np.asarray(x - tree.flatten(start)[path])
            assert (np.abs(moves).max((0, 2, 3)) > 1e-2).all() and np.abs(moves[:, 0] - moves[:, 1]).max() > 1e-2, path


@pytest.mark.parametrize("method, sources, words", [
    ("polytropon(tasks=2)", ("praise",), "layers/attn/k/kernel holds 2 tasks and the batch has no task ids; data.sources gives them"),
    ("bank(adapters=3)", ("blame",), "layers/attn/k/kernel holds 3 tasks and the batch has no task ids"),
    ("mhr(tasks=1)", ("praise", "blame"), "layers/attn/k/kernel holds 1 tasks, numbered from 0; there is no task 1"),
])  # fmt: skip
def test_a_run_without_fitting_task_ids_is_refused_before_compute(method, sources, words, home):
    with pytest.raises(UserError, match=words) as error:
        engine.train(config(home, method, sources), home / "refused")
    assert "\n" not in str(error.value) and not (home / "refused").exists()


def test_a_thousand_adapters_serve_one_batch_each_as_it_would_alone():
    model = make_model("llama", num_hidden_layers=2)
    params = kernels.adapt(make_params(model), [("layers/attn/[qv]/kernel", "bank(adapters=1000, rank=2)")], jax.random.key(0))
    rng = np.random.default_rng(0)
    for name in "qv":
        k = params["layers"]["attn"][name]["kernel"]
        params["layers"]["attn"][name]["kernel"] = k.replace(b=jnp.asarray(0.1 * rng.standard_normal(k.b.shape), jnp.float32))
    ids = rng.choice(1000, 32, replace=False).astype(np.int32)
    batch = {k: np.repeat(v[:1], 32, 0) for k, v in inputs(make_batch(model)).items()}
    logits = np.asarray(jax.jit(model.apply)(params, batch | {"tasks": ids}))
    assert len(np.unique(np.round(logits[:, -1, 0], 5))) == 32, "every row has an adapter of its own"
    for row in (0, 17, 31):
        alone = model.apply(kernels.merge(mixture.route(params, int(ids[row]))), {k: v[:1] for k, v in batch.items()})
        np.testing.assert_allclose(logits[row], alone[0], rtol=0, atol=1e-4 * np.abs(alone).max())
