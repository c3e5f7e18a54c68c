"""``scripts/export.py``: what a run trained, as a merged model and as an adapter."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ft_jax import models, tree
from ft_jax.errors import UserError
from ft_jax.io import hf, peft, runs
from ft_jax.kernels import adapt

ROOT = pathlib.Path(__file__).resolve().parents[2]
RAW = {"model_type": "llama", "vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
       "num_attention_heads": 2, "max_position_embeddings": 16}  # fmt: skip
IDS = {"input_ids": jnp.asarray([[1, 2, 3, 4]])}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("export_script", ROOT / "scripts" / "export.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A base on disk and a run on it: (base folder, model, trained params)."""
    model = models.Model(models.config_from_hf(RAW))
    base = model.init(jax.random.key(0))
    hf.save(tmp_path / "base", model, base)
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    params = adapt(base, [("layers/attn/q/kernel", "rslora(rank=4, alpha=6)")], jax.random.key(1))
    params = tree.map_with_path(lambda p, x: x + 0.5 if p.endswith("/b") else x, params)
    recipe = {"model": {"path": str(tmp_path / "base")}, "seed": 0,
              "method": {"kernels": [["layers/attn/q/kernel", "rslora(rank=4, alpha=6)"]]}}  # fmt: skip
    monkeypatch.setattr(runs, "load_run", lambda workdir, which: (model, params, recipe))
    return tmp_path / "base", model, params


def test_merged(script, run, tmp_path):
    _, model, params = run
    script.export(tmp_path / "run", "merged", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    again, merged = hf.load(tmp_path / "out")
    np.testing.assert_allclose(again.apply(merged, IDS), model.apply(params, IDS), atol=1e-6)


def test_adapter(script, run, tmp_path):
    base, model, params = run
    script.export(tmp_path / "run", "peft", tmp_path / "out")
    config = peft.files.read_json(tmp_path / "out" / "adapter_config.json")
    assert config["use_rslora"] and config["lora_alpha"] == 6 and config["base_model_name_or_path"] == str(base)
    again, plain = hf.load(base)
    loaded = peft.load_adapter(tmp_path / "out", again, plain)
    assert np.abs(np.asarray(again.apply(plain, IDS) - model.apply(params, IDS))).max() > 1e-4
    np.testing.assert_allclose(again.apply(loaded, IDS), model.apply(params, IDS), atol=1e-6)


def test_refuses(script, tmp_path):
    with pytest.raises(UserError, match="is the run's own folder"):
        script.export(tmp_path, "merged", tmp_path)
    with pytest.raises(UserError, match="holds no run"):
        script.export(tmp_path / "none", "merged", tmp_path / "out")
