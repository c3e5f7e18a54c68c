"""Statistics that kernels start from, and runs that begin with them: by name, resumed, rebuilt without their data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import train as configs
from ft_jax import calibrate, importance, kernels, masks, population, recipe, train, tree
from ft_jax.errors import UserError
from ft_jax.io import runs
from tests import folders
from tests.helpers import FAMILIES, assert_trees_close, inputs, make_batch, make_model, make_params

METHODS = ("corda(rank=4)", "corda(rank=4,mode=ipm)", "eva(rank=2)", "lora_ga(rank=4)")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    folders.make_model_folder(home / "bert")
    folders.write_rows(home / "reviews.jsonl", folders.reviews(np.random.default_rng(0), 200))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FT_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield home


def config(home, method, **changes):
    cfg = configs.get_config(f"model={home / 'bert'},data={home / 'reviews.jsonl'},method={method}")
    cfg.update({"steps": 40, "batch_size": 8, **changes})
    cfg.data.max_length, cfg.optimizer.learning_rate, cfg.log.tensorboard = 16, 5e-3, False
    cfg.eval.every, cfg.save.every, cfg.log.every, cfg.method.start_examples = 20, 20, 10, 40
    cfg.mesh.data = 1
    return cfg


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_moments_are_those_of_the_inputs_of_each_matrix(family):
    """x W as the model has it: what a site holds times the matrix is what comes out of it; padding does not count."""
    model = make_model(family)
    params, batches = make_params(model), [inputs(make_batch(model, rows=3, seed=seed)) for seed in range(2)]
    sites = sorted({calibrate.SITE_OF[m] for m in calibrate.SITE_OF})
    found = calibrate.moments(model, params, batches, sites)
    rows = {site: [] for site in (*sites, "q", "ffn_out")}
    for batch in batches:
        _, seen = model.apply(params, batch, capture=tuple(rows))
        real = np.asarray(batch["attention_mask"]).astype(bool)
        for site in rows:
            rows[site].append(np.asarray(seen[site], np.float64)[:, real])
    rows = {site: np.concatenate(parts, 1) for site, parts in rows.items()}
    for site in sites:
        x = rows[site]
        np.testing.assert_allclose(found[site]["covariance"], np.swapaxes(x, 1, 2) @ x / x.shape[1], rtol=0, atol=1e-4)
        np.testing.assert_allclose(found[site]["mean"], x.mean(1), rtol=0, atol=1e-5)
    layers = params["layers"]
    for matrix, site in ((layers["attn"]["q"], "q"), (layers["mlp"]["down"], "ffn_out")):
        before = rows["attn_in" if site == "q" else "ffn_hidden"]
        after = before @ np.asarray(matrix["kernel"]) + np.asarray(matrix.get("bias", np.zeros((len(before), 1))))[:, None]
        np.testing.assert_allclose(after, rows[site], rtol=0, atol=1e-4)


def test_a_split_stack_gets_the_statistics_of_its_own_layers():
    model = make_model("bert")
    params, batch = make_params(model), inputs(make_batch(model))
    whole = calibrate.moments(model, params, [batch], ["heads"])["heads"]["covariance"]
    split = masks.split_layers(params, 1)
    wanted = {f"{stack}/attn/out/kernel": {"covariance"} for stack in ("frozen_layers", "layers")}
    found = calibrate.gather(wanted, model, split, None, [batch])["covariance"]
    np.testing.assert_allclose(found["frozen_layers/attn/out/kernel"], whole[:1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["layers/attn/out/kernel"], whole[1:], rtol=1e-5, atol=1e-6)
    shapes = calibrate.shapes(wanted, split)["covariance"]
    assert {p: s.shape for p, s in shapes.items()} == {p: x.shape for p, x in found.items()}


@pytest.mark.parametrize("wanted, batches, words", [
    ({"head/kernel": {"covariance"}}, 1, "head/kernel: the inputs of this matrix are not gathered"),
    ({"layers/attn/q/kernel": {"mean"}}, 0, "no token of training data"),
])  # fmt: skip
def test_what_cannot_be_gathered(wanted, batches, words):
    model = make_model("bert")
    with pytest.raises(UserError, match=words):
        calibrate.gather(wanted, model, make_params(model), None, [inputs(make_batch(model))] * batches)


def test_statistics_that_hold_nothing_are_refused():
    model = make_model("bert")
    params = make_params(model)
    params["layers"]["attn"]["v"] = jax.tree.map(jnp.zeros_like, params["layers"]["attn"]["v"])
    with pytest.raises(UserError, match="layers/attn/out/kernel: its covariance over the training data is zero or not finite"):
        calibrate.gather({"layers/attn/out/kernel": {"covariance"}}, model, params, None, [inputs(make_batch(model))])


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_run_by_name_is_rebuilt_without_its_data(method, home, tmp_path, monkeypatch):
    """It starts at the base's function, resumes bit for bit and loads, none of which gathers anything again."""
    cfg = config(home, method)
    parts = train.prepare(train.ready(cfg))
    base = train.prepare(train.ready(config(home, "lora(rank=2)")))
    batch = parts["data"]["validation"].gather(np.arange(5))
    logits = [np.asarray(p["model"].apply(p["params"], batch)) for p in (parts, base)]
    np.testing.assert_allclose(*logits, rtol=0, atol=1e-4)
    train.train(cfg, tmp_path / "run")

    def crash(run, step, metrics, log=runs.Run.log):
        log(run, step, metrics)
        if step == 30:
            raise RuntimeError("stopped here")

    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "log", crash)
        with pytest.raises(RuntimeError, match="stopped here"):
            train.train(cfg, tmp_path / "stopped")
    monkeypatch.setattr(calibrate, "gather", lambda *_: pytest.fail("the statistics were gathered again"))
    train.train(cfg, tmp_path / "stopped")
    tuned = [runs.load_run(tmp_path / name, "last") for name in ("run", "stopped")]
    assert_trees_close(tuned[0][1], tuned[1][1], rtol=0)
    change = importance.change_of_run(tmp_path / "run")
    assert all(x.any() for x in change.values())
    with pytest.raises(UserError, match="starts from a .*, and there is none for this matrix"):
        recipe.build(tuned[0][2])


@pytest.mark.slow
def test_what_trained_is_what_started(home, tmp_path):
    """The frozen matrices of a rebuilt run are those that it trained with, and its factors' start is kept in a file."""
    cfg = config(home, "corda(rank=4)", steps=20)
    train.train(cfg, tmp_path)
    start = runs.Run(tmp_path, train.ready(cfg), tensorboard=False).start
    parts = train.prepare(train.ready(cfg))
    assert_trees_close(kernels.started(parts["params"], cfg.method.kernels), start, rtol=0)
    _, params, _ = runs.load_run(tmp_path, "last")
    held = tree.flatten(params, kernels.is_kernel)
    for path, kernel in tree.flatten(parts["params"], kernels.is_kernel).items():
        if kernels.is_kernel(kernel):
            np.testing.assert_array_equal(held[path].base, kernel.base)
            assert not np.array_equal(held[path].a, kernel.a)


@pytest.mark.slow
def test_a_population_starts_each_member_from_its_own_data(home, tmp_path):
    cfgs = {f"seed{seed}": config(home, "corda(rank=4)", seed=seed, steps=20) for seed in (0, 1)}
    found = population.train(cfgs, tmp_path)
    for name, cfg in cfgs.items():
        alone = train.train(cfg, tmp_path / f"{name}-alone")
        assert found[name]["validation"]["loss"] == pytest.approx(alone["validation"]["loss"], rel=1e-3)


def test_a_config_without_examples(home):
    cfg = config(home, "corda(rank=4)")
    cfg.method.start_examples = 0
    with pytest.raises(UserError, match="'method.start_examples' is 0; it must be at least 1"):
        train.complete(cfg)


def test_the_head_has_no_statistics(home):
    cfg = config(home, "corda(rank=1)")
    cfg.method.kernels = (("head/kernel", "corda(rank=1)"),)
    with pytest.raises(UserError, match="head/kernel: the inputs of this matrix are not gathered; those of the layers'"):
        train.prepare(train.ready(cfg))
