"""Model folders: exact round trips, and every kind of damage named before any tensor is read."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ft_jax import masks, models, tree
from ft_jax.errors import UserError
from ft_jax.io import files, hf, safetensors
from ft_jax.kernels import adapt, merge
from tests.helpers import make_params

BERT = {"model_type": "bert", "architectures": ["BertModel"], "vocab_size": 20, "hidden_size": 8,
        "intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2,
        "max_position_embeddings": 16}  # fmt: skip
LLAMA = BERT | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_key_value_heads": 1}


def make(folder, raw, head=None, **more):
    """A random model saved in ``folder``."""
    model = models.Model(models.config_from_hf(raw, head))
    params = make_params(model)
    hf.save(folder, model, params, **more)
    return model, params


def equal(a, b):
    a, b = tree.flatten(a), tree.flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == jnp.float32
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


@pytest.mark.parametrize("raw, head", [
    (BERT, "none"), (BERT, "pooled"), (BERT, "prototype"), (BERT, "classification"), (BERT, "mlm"),
    (BERT | {"model_type": "roberta"}, "classification"), (BERT | {"model_type": "roberta"}, "mlm"),
    (LLAMA, "lm"), (LLAMA | {"tie_word_embeddings": True}, "lm"), (LLAMA, "classification"), (LLAMA, "pooled"),
    (LLAMA | {"model_type": "qwen2"}, "lm"), (LLAMA | {"model_type": "qwen3", "head_dim": 4}, "lm"),
    (LLAMA | {"attention_bias": True, "mlp_bias": True}, "prototype"), (LLAMA | {"model_type": "mistral"}, "lm"),
])  # fmt: skip
@pytest.mark.parametrize("limit", [10**9, 2000])
def test_round_trip(tmp_path, raw, head, limit):
    model, params = make(tmp_path, raw, head, max_shard_bytes=limit)
    again, loaded = hf.load(tmp_path)
    assert again.config == model.config
    equal(loaded, params)


def test_merged_and_joined(tmp_path):
    """Kernels are merged and a split stack is joined: the saved model computes the same."""
    model, params = make(tmp_path / "base", LLAMA)
    params = adapt(
        masks.split_layers(params, 1), [("layers/attn/q/kernel", "lora(rank=2, alpha=4)")], jax.random.key(1)
    )
    q = params["layers"]["attn"]["q"]
    q["kernel"] = q["kernel"].replace(b=jnp.ones_like(q["kernel"].b))
    hf.save(tmp_path / "out", model, params)
    _, loaded = hf.load(tmp_path / "out")
    equal(loaded, masks.join_layers(merge(params)))


def test_source_files_are_copied(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (source / name).write_text(name)
    (source / "model.safetensors").write_text("not this")
    model, params = make(tmp_path / "out", BERT, source=source)
    assert files.entries(tmp_path / "out") == ["config.json", "model.safetensors", "tokenizer.json",
                                               "tokenizer_config.json", "vocab.txt"]  # fmt: skip
    hf.save(tmp_path / "out", model, params, source=tmp_path / "out")
    assert (tmp_path / "out" / "vocab.txt").read_text() == "vocab.txt"


def test_float32_is_said(tmp_path):
    """What is written is float32, whatever the base was stored in; else transformers would round it again."""
    make(tmp_path, BERT | {"torch_dtype": "bfloat16", "dtype": "bfloat16"})
    raw = files.read_json(tmp_path / "config.json")
    assert raw["torch_dtype"] == raw["dtype"] == "float32"


def test_failed_save_keeps_the_old(tmp_path, monkeypatch):
    model, params = make(tmp_path, BERT)
    bigger = models.Model(models.config_from_hf(BERT | {"hidden_size": 16}))
    before = files.entries(tmp_path)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        hf.save(tmp_path, bigger, make_params(bigger))
    assert files.entries(tmp_path) == before
    again, loaded = hf.load(tmp_path)
    assert again.config == model.config
    equal(loaded, params)


def test_save_refuses_what_has_no_place(tmp_path):
    model, params = make(tmp_path / "a", BERT)
    with pytest.raises(UserError, match="taps/x: a plain checkpoint has no place"):
        hf.save(tmp_path / "b", model, {**params, "taps": {"x": jnp.ones(3)}})
    with pytest.raises(UserError, match="hold no embed/norm/bias"):
        hf.save(tmp_path / "b", model, {**params, "embed": {k: v for k, v in params["embed"].items() if k != "norm"}})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a file stands where a folder"):
        hf.save(tmp_path / "file", model, params)
    assert not (tmp_path / "b").exists()


def test_absent_head_is_said(tmp_path, capsys):
    """A new head starts at random by the rng, and says so; the body is the checkpoint's."""
    _, params = make(tmp_path, BERT)
    model, loaded = hf.load(tmp_path, head="classification", num_labels=4, rng=jax.random.key(3))
    assert "pooler/bias, head/kernel, head/bias in the checkpoint: started at random" in capsys.readouterr().err
    fresh = model.init(jax.random.key(3))
    for path in ("head/kernel", "head/bias", "pooler/kernel", "pooler/bias"):
        module, leaf = path.split("/")
        np.testing.assert_allclose(loaded[module][leaf], fresh[module][leaf], rtol=1e-5, atol=1e-8)
    assert np.std(loaded["head"]["kernel"]) > 0
    equal({k: loaded[k] for k in ("embed", "layers")}, {k: params[k] for k in ("embed", "layers")})
    assert loaded["head"]["kernel"].shape == (8, 4)
    hf.load(tmp_path)
    assert capsys.readouterr().err == ""


def rewrite(folder, change):
    """Applies ``change`` to the checkpoint's ``{name: array}``."""
    tensors = dict(safetensors.Checkpoint(folder).items())
    change(tensors)
    safetensors.save(folder, tensors.items())


def test_old_names(tmp_path, capsys):
    """BERT's first checkpoints call LayerNorm weights gamma and beta, and carry buffers: read without a word."""
    _, params = make(tmp_path, BERT)

    def age(tensors):
        for name in list(tensors):
            if "LayerNorm" in name:
                new = name.replace(".weight", ".gamma").replace(".bias", ".beta")
                tensors["bert." + new] = tensors.pop(name)
            else:
                tensors["bert." + name] = tensors.pop(name)
        tensors["bert.embeddings.position_ids"] = np.arange(16)
        tensors["bert.pooler.dense.weight"] = np.ones((8, 8), np.float32)

    rewrite(tmp_path, lambda t: age(t))
    _, loaded = hf.load(tmp_path)
    equal(loaded, params)
    assert capsys.readouterr().err == ""


def test_unexpected_tensors_are_said(tmp_path, capsys):
    make(tmp_path, BERT)
    rewrite(tmp_path, lambda t: t.update({"encoder.layer.9.odd.weight": np.ones(2, np.float32)}))
    hf.load(tmp_path)
    assert "1 tensors of the checkpoint have no place in a bert with head 'none': encoder.layer.9.odd.weight" in (
        capsys.readouterr().err)  # fmt: skip


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop("encoder.layer.1.output.dense.weight"),
     r"no tensor 'bert.encoder.layer.1.output.dense.weight'; nearest: 'encoder.layer.\d.output.dense.weight'"),
    (lambda t: [t.pop(n) for n in list(t) if "query" in n], "no tensor 'bert.*query.*and 5 more"),
    (lambda t: t.update({"embeddings.word_embeddings.weight": np.ones((19, 8), np.float32)}),
     r"word_embeddings.weight has shape \[19, 8\] but config.json \(vocab_size 20\) makes it \[20, 8\]"),
    (lambda t: t.update({"encoder.layer.0.intermediate.dense.weight": np.ones((8, 12), np.float32)}),
     r"intermediate.dense.weight has shape \[8, 12\] but config.json makes it \[12, 8\]"),
    (lambda t: t.update({"embeddings.LayerNorm.bias": np.ones(8)}), "embeddings.LayerNorm.bias is F64; read are"),
])  # fmt: skip
def test_damaged_weights(tmp_path, monkeypatch, change, message):
    make(tmp_path, BERT)
    rewrite_any = dict(safetensors.Checkpoint(tmp_path).items())
    change(rewrite_any)
    safetensors.save(tmp_path, rewrite_any.items())
    monkeypatch.setattr(safetensors.Checkpoint, "read", lambda *_: pytest.fail("read before the check"))
    with pytest.raises(UserError, match=message) as caught:
        hf.load(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("raw, message", [
    ({"model_type": "mpnet"}, "config.json: model_type 'mpnet' is not supported; supported: bert, roberta, llama"),
    ({}, "config.json: model_type None is not supported"),
    ({k: v for k, v in BERT.items() if k != "vocab_size"}, "config.json: key 'vocab_size' is missing"),
    (BERT | {"hidden_size": "8"}, "config.json: a value is not of its kind"),
    (BERT | {"num_attention_heads": 0}, "config.json: a value is not of its kind"),
    (BERT | {"hidden_act": "swishy"}, "hidden_act 'swishy' is not supported"),
    (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not supported; supported:"),
    (LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "rope scaling 'llama3' lacks 'low_freq_factor'"),
    (LLAMA | {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}}, "with mscale 0.7 is not supported"),
    (BERT | {"num_hidden_layers": 4}, "no tensor 'bert.encoder.layer.3.attention.self.query.weight'"),
])  # fmt: skip
def test_bad_config(tmp_path, raw, message):
    make(tmp_path, BERT)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=message) as caught:
        hf.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff\xfe", "[" * 100_000])
def test_config_is_no_json(tmp_path, text):
    make(tmp_path, BERT)
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="config.json: (cannot be read as JSON|holds a list)"):
        hf.load(tmp_path)


def test_wrong_head(tmp_path):
    make(tmp_path, BERT, "classification")
    with pytest.raises(UserError, match="a bert model has no head 'lm'"):
        hf.load(tmp_path, head="lm")
    with pytest.raises(UserError, match=r"classifier.weight has shape \[2, 8\] but config.json \(num_labels 5\)"):
        hf.load(tmp_path, num_labels=5)


def test_wrong_path(tmp_path, monkeypatch):
    make(tmp_path / "mymodel", BERT)
    monkeypatch.chdir(tmp_path)
    for spec, near in (("mymodle", "mymodel"), (str(tmp_path / "mymodl"), "mymodel"), ("minlm", "minilm")):
        with pytest.raises(UserError, match=f"no model {spec!r} .*nearest: .*{near}"):
            hf.resolve(spec)
    with pytest.raises(UserError, match="no model 'mpnet' .*one of minilm, smollm2"):
        hf.resolve("mpnet")
    (tmp_path / "mymodel" / "config.json").rename(tmp_path / "mymodel" / "config.jsn")
    with pytest.raises(UserError, match="holds no config.json; nearest: 'config.jsn'"):
        hf.resolve("mymodel")
    with pytest.raises(UserError, match="is a file; a model is a folder"):
        hf.resolve(tmp_path / "mymodel" / "model.safetensors")


def test_hub(monkeypatch, tmp_path):
    """``hf:`` asks for JSON, safetensors and tokenizer files alone; what cannot be had is one plain line."""
    import huggingface_hub
    from huggingface_hub import errors

    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hf.resolve("hf:org/name@v1") == tmp_path
    assert (asked["name"], asked["revision"]) == ("org/name", "v1")
    assert not any(p.endswith((".bin", ".py", ".pt")) or p == "*" for p in asked["allow_patterns"])
    missing = errors.RepositoryNotFoundError.__new__(errors.RepositoryNotFoundError)
    cases = {errors.LocalEntryNotFoundError("offline"): "cannot be reached",
             errors.HTTPError("down"): "cannot be reached", ConnectionResetError("reset"): "cannot be reached",
             missing: "not found on the hub"}  # fmt: skip
    for error, message in cases.items():

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(UserError, match=f"hf:org/name: .*{message}"):
            hf.resolve("hf:org/name")
    with pytest.raises(UserError, match="not of the form hf:org/name"):
        hf.resolve("hf:../../etc")
