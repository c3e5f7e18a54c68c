"""LoRA adapters against PEFT, both directions: same logits, same merged model."""

import jax
import jax.numpy as jnp
import numpy as np
import peft as hf_peft
import pytest
import torch
import transformers

from ft_jax import masks, tree
from ft_jax.io import hf, peft
from ft_jax.kernels import adapt, is_kernel, merge

transformers.utils.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()
TOLERANCE = 1e-4
SMALL = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
         "max_position_embeddings": 32, "initializer_range": 0.2, "num_labels": 3}  # fmt: skip
LLAMA = SMALL | {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "llama-classification": ("LlamaForSequenceClassification", "LlamaConfig", LLAMA),
    "bert": ("BertModel", "BertConfig", SMALL),
    "bert-mlm": ("BertForMaskedLM", "BertConfig", SMALL),
    "bert-classification": ("BertForSequenceClassification", "BertConfig", SMALL),
    "roberta-classification": ("RobertaForSequenceClassification", "RobertaConfig", SMALL | {"type_vocab_size": 1}),
}
LINEAR = r"layers/(attn|mlp)/\w+/kernel"
RULES = {
    "lora": [(LINEAR, "lora(rank=4, alpha=8)")],
    "rslora": [(LINEAR, "rslora(rank=4, alpha=12)")],
    "ranks": [("layers/attn/q/kernel", "lora(rank=2, alpha=7)"), (LINEAR, "lora(rank=5, alpha=8)")],
    "some": [("layers/attn/(q|v)/kernel", "lora(rank=3, alpha=6)")],
}
OPTIONS = {
    "plain": {"r": 4, "lora_alpha": 8},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {r"layers?\.1\..*": 2},
        "alpha_pattern": {r"layers?\.2\..*": 3},
    },
    "one-layer": {"r": 3, "lora_alpha": 8, "layers_to_transform": [1]},
}
# Every variant on one decoder and one encoder, the plain one on every model.
FULL = ("llama", "bert-classification")
ALL_RULES = [(name, rules) for name in MODELS for rules in RULES if name in FULL or rules == "lora"]
ALL_OPTIONS = [(name, kind) for name in MODELS for kind in OPTIONS if name in FULL or kind == "plain"]
IDS = np.random.default_rng(0).integers(3, 61, (2, 9))


def base_folder(name, tmp_path):
    cls, config, values = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, cls)(getattr(transformers, config)(**values)).eval()
    model.save_pretrained(tmp_path / "base")
    return getattr(transformers, cls), tmp_path / "base"


def trained(params, rules):
    """Params with the kernels of the rules, their B factors random as if trained."""
    params = adapt(params, rules, jax.random.key(1))

    def move(path, leaf):
        return 0.3 * jax.random.normal(jax.random.key(len(path)), leaf.shape) if path.endswith("/b") else leaf

    return tree.map_with_path(move, params)


def torch_output(model):
    with torch.no_grad():
        out = model(input_ids=torch.tensor(IDS))
    return (out.logits if "logits" in out else out.last_hidden_state).numpy()


def our_output(model, params):
    return np.asarray(model.apply(params, {"input_ids": jnp.asarray(IDS, jnp.int32)}))


@pytest.mark.parametrize("name, rules", ALL_RULES)
def test_ours_in_peft(name, rules, tmp_path):
    """PEFT loads our adapter: same logits, and its merged model is ours."""
    cls, folder = base_folder(name, tmp_path)
    model, base = hf.load(folder)
    params = trained(base, RULES[rules])
    if model.config.head == "classification":
        params["head"] = jax.tree.map(lambda x: x + 0.5, params["head"])
    peft.save_adapter(tmp_path / "adapter", model, params, str(folder), base=base, use_rslora=rules == "rslora")
    theirs = hf_peft.PeftModel.from_pretrained(cls.from_pretrained(folder), tmp_path / "adapter").eval()
    got, want = our_output(model, params), torch_output(theirs)
    error = float(np.abs(got - want).max())
    moved = float(np.abs(got - our_output(model, base)).max())
    print(name, rules, f"{error:.1e} (the adapter moves the output by {moved:.1e})")
    assert error < TOLERANCE and moved > 100 * TOLERANCE
    hf.save(tmp_path / "merged", model, params)
    merged, ours = theirs.merge_and_unload().state_dict(), cls.from_pretrained(tmp_path / "merged").state_dict()
    for key, tensor in merged.items():
        if "pooler" not in key or name != "bert":  # a bare encoder is saved without its pooler
            torch.testing.assert_close(tensor, ours[key], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name, kind", ALL_OPTIONS)
def test_theirs_in_ours(name, kind, tmp_path):
    """We load PEFT's adapter: same logits, and the same again after writing it ourselves."""
    cls, folder = base_folder(name, tmp_path)
    torch.manual_seed(1)
    task = "SEQ_CLS" if "classification" in name else None
    targets = ["q_proj", "down_proj"] if "llama" in name else ["query", "output.dense"]
    config = hf_peft.LoraConfig(target_modules=targets, init_lora_weights=False, task_type=task,
                                **OPTIONS[kind])  # fmt: skip
    theirs = hf_peft.get_peft_model(cls.from_pretrained(folder), config).eval()
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "modules_to_save" in key:
                parameter.add_(0.5)
    theirs.save_pretrained(tmp_path / "adapter")
    model, base = hf.load(folder)
    params = peft.load_adapter(tmp_path / "adapter", model, base)
    want = torch_output(theirs)
    error = float(np.abs(our_output(model, params) - want).max())
    print(name, f"{error:.1e}")
    assert error < TOLERANCE and np.abs(our_output(model, base) - want).max() > 100 * TOLERANCE
    peft.save_adapter(tmp_path / "again", model, params, str(folder), base=base)
    again = peft.load_adapter(tmp_path / "again", model, base)
    np.testing.assert_allclose(our_output(model, again), our_output(model, params), atol=1e-5)


def test_split_stack(tmp_path):
    """An adapter on the upper layers alone, the stack split: out and in again, into a split and a whole tree."""
    cls, folder = base_folder("llama", tmp_path)
    model, base = hf.load(folder)
    params = trained(masks.split_layers(base, 2), RULES["lora"])
    assert any(p.startswith("frozen_layers/") for p in tree.flatten(params))
    peft.save_adapter(tmp_path / "adapter", model, params, str(folder), base=base)
    theirs = hf_peft.PeftModel.from_pretrained(cls.from_pretrained(folder), tmp_path / "adapter").eval()
    want = our_output(model, params)
    assert np.abs(want - torch_output(theirs)).max() < TOLERANCE
    for start in (base, masks.split_layers(base, 2), masks.split_layers(base, 1)):
        loaded = peft.load_adapter(tmp_path / "adapter", model, start)
        np.testing.assert_allclose(our_output(model, loaded), want, atol=1e-5)
    hf.save(tmp_path / "merged", model, params)
    _, merged = hf.load(tmp_path / "merged")
    np.testing.assert_allclose(our_output(model, merged), want, atol=2e-5)


def test_prototype_head_travels(tmp_path):
    """A head that transformers does not know is kept for us and does not hinder PEFT."""
    cls, folder = base_folder("bert", tmp_path)
    model, base = hf.load(folder, head="prototype", num_labels=2)
    params = trained(base, RULES["lora"])
    params["head"] = jax.tree.map(lambda x: x + 1.0, params["head"])
    peft.save_adapter(tmp_path / "adapter", model, params, str(folder), base=base)
    loaded = peft.load_adapter(tmp_path / "adapter", model, base)
    np.testing.assert_array_equal(our_output(model, loaded), our_output(model, params))
    theirs = hf_peft.PeftModel.from_pretrained(cls.from_pretrained(folder), tmp_path / "adapter").eval()
    hidden = model.with_head("none")
    assert np.abs(our_output(hidden, params) - torch_output(theirs)).max() < TOLERANCE


def test_other_trained_leaves_travel(tmp_path):
    """A norm that was trained beside the adapter becomes a module to save."""
    cls, folder = base_folder("llama", tmp_path)
    model, base = hf.load(folder)
    params = trained(base, RULES["some"])
    params["norm"] = {"scale": params["norm"]["scale"] * 1.5}
    peft.save_adapter(tmp_path / "adapter", model, params, str(folder), base=base)
    theirs = hf_peft.PeftModel.from_pretrained(cls.from_pretrained(folder), tmp_path / "adapter").eval()
    assert np.abs(our_output(model, params) - torch_output(theirs)).max() < TOLERANCE
    loaded = peft.load_adapter(tmp_path / "adapter", model, base)
    assert not is_kernel(loaded["norm"]["scale"])
    for got, want in zip(jax.tree.leaves(merge(loaded)), jax.tree.leaves(merge(params)), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)
