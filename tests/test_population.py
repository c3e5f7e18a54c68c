"""A population is its members: the same weights as each run alone, resumed bit for bit, one failure that costs no other."""

import json

import numpy as np
import pytest

from ft_jax import population, train, tree
from ft_jax.errors import UserError
from ft_jax.io import runs
from tests import folders

LINEAR = r"layers/(attn|mlp)/\w+/kernel"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FT_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    folders.make_model_folder(home / "bert", num_hidden_layers=2)
    folders.write_rows(home / "reviews.jsonl", folders.reviews(np.random.default_rng(0), 120))
    return home


def config(home, **groups):
    """A classification run; every keyword is a group or key of the config, groups are merged."""
    cfg = {
        "steps": 8, "batch_size": 8, "model": {"path": str(home / "bert"), "head": "classification"},
        "data": {"source": str(home / "reviews.jsonl"), "num_labels": 2, "max_length": 16},
        "optimizer": {"learning_rate": 3e-3}, "eval": {"every": 4, "metric": "accuracy"}, "save": {"every": 4, "keep": 1},
        "log": {"every": 1, "tensorboard": False}, "mesh": {"data": 1},
    }  # fmt: skip
    for key, value in groups.items():
        cfg[key] = {**cfg.get(key, {}), **value} if isinstance(value, dict) else value
    return cfg


def low_rank(text, **groups):
    return {"method": {"name": text, "kernels": ((LINEAR, text),)}, **groups}


def weights(folder):
    """{path: array} of everything a run holds at its end."""
    return {p: np.asarray(x) for p, x in tree.flatten(runs.load_run(folder, "last")[1]).items()}


def test_first(home, tmp_path):
    configs = {
        "r1": config(home, **low_rank("lora(rank=1, alpha=2)")),
        "r4": config(home, **low_rank("lora(rank=4, alpha=8)"), seed=3, optimizer={"learning_rate": 1e-2}),
    }
    found = population.train(configs, tmp_path / "all")
    for name, cfg in configs.items():
        alone = train.train(cfg, tmp_path / name)
        assert found[name].keys() == alone.keys()
        a, b = weights(tmp_path / name), weights(tmp_path / "all" / name)
        for path in a:
            np.testing.assert_allclose(b[path], a[path], rtol=0, atol=1e-5, err_msg=path)
        print(json.dumps(found[name]), json.dumps(alone))
