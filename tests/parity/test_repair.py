"""Intruder repair of adapters against PEFT's `reduce_intruder_dimension`, which scales every intruder."""

import jax.numpy as jnp
import numpy as np
import peft as hf_peft
import pytest
import torch
import transformers
from peft.tuners.lora.intruders import reduce_intruder_dimension

from ft_jax import tree
from ft_jax.io import hf, peft
from ft_jax.kernels import merge
from ft_jax.weights import repair

transformers.utils.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()
SIZE = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.2, "pad_token_id": 0}  # fmt: skip
TARGETS = ["q_proj", "v_proj", "down_proj", "up_proj"]
TOP = 4  # random 24-wide matrices have no gaps: among more directions, weak ones are told apart by rounding alone


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """(PEFT model, its base folder, its adapter folder); some of its adapters bring in several intruders."""
    home = tmp_path_factory.mktemp("peft")
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZE)).eval()
    base.save_pretrained(home / "base")
    config = hf_peft.LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, init_lora_weights=False)
    model = hf_peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for i, layer in enumerate(layers(model).values()):
            layer.lora_B["default"].weight.mul_(0.03)
            for column in range(i % 3):  # none, one or two directions that lead
                layer.lora_B["default"].weight[:, column].mul_(400 / (1 + column))
    model.save_pretrained(home / "adapter")
    return model, home / "base", home / "adapter"


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, hf_peft.tuners.lora.LoraLayer)}


def test_all_intruders_scaled_and_projected_as_peft_does(tuned):
    model, folder, adapter = tuned
    ours, base = hf.load(folder)
    params = peft.load_adapter(adapter, ours, base)
    found = repair.find(base, params, k=TOP)
    counts = {path: one["intruder"].sum(-1).tolist() for path, one in found.items()}
    assert {n for count in counts.values() for n in count} >= {0, 1, 2}
    said = []
    for factor, name in ((0.3, "third"), (0.75, "most")):
        reduce_intruder_dimension(model, new_adapter_name=name, top_k=TOP, mitigation_lambda=factor, logging_sink=said.append)
        mended, lost = repair.mend(params, found, factor, which="all")
        assert max(x.max() for x in lost.values()) > 1e-3  # the projection does something here
        got, before = (tree.flatten(merge(p)) for p in (mended, params))
        moved = 0
        for path, i, layer in placed(layers(model)):
            theirs = (layer.get_base_layer().weight + layer.get_delta_weight(name)).detach().numpy().T
            np.testing.assert_allclose(got[path][i], theirs, atol=3e-5, err_msg=f"{path} {i}")
            moved += float(np.abs(got[path][i] - before[path][i]).max()) > 0.05
        assert moved == sum(n > 0 for count in counts.values() for n in count)
    assert sum("Intruders: 2" in line for line in said) == 2 * sum(n == 2 for count in counts.values() for n in count)


def placed(found):
    """``(our path, layer, PEFT's layer)``"""
    kinds = {"q_proj": "attn/q", "v_proj": "attn/v", "down_proj": "mlp/down", "up_proj": "mlp/up"}
    for name, layer in found.items():
        parts = name.split(".")
        yield f"layers/{kinds[parts[-1]]}/kernel", int(parts[parts.index("layers") + 1]), layer


@pytest.mark.parametrize("control", repair.CONTROLS)
def test_a_mended_adapter_in_peft_gives_our_logits(tuned, tmp_path, control):
    _, folder, adapter = tuned
    ours, base = hf.load(folder)
    params = peft.load_adapter(adapter, ours, base)
    mended = repair.apply(params, repair.find(base, params), 0.5, control)
    peft.save_adapter(tmp_path / "mended", ours, mended, str(folder), base=base)
    theirs = hf_peft.PeftModel.from_pretrained(
        transformers.LlamaForCausalLM.from_pretrained(folder), tmp_path / "mended").eval()  # fmt: skip
    assert theirs.peft_config["default"].r == 3 and theirs.peft_config["default"].lora_alpha == 6
    ids = np.random.default_rng(0).integers(3, 61, (2, 9))
    with torch.no_grad():
        want = theirs(input_ids=torch.tensor(ids)).logits.numpy()
    got, before = (np.asarray(ours.apply(p, {"input_ids": jnp.asarray(ids, jnp.int32)})) for p in (mended, params))
    assert np.abs(got - want).max() < 1e-4 < 1e-2 < np.abs(got - before).max()
