"""PEFT's methods whose change of a matrix is made from the matrix: theirs here, ours there, one step of SGD."""

import numpy as np
import peft as hf_peft
import pytest
import torch

from ft_jax.errors import UserError
from ft_jax.io import files, hf, peft, peft_aware, safetensors
from tests.parity import peft_adapters
from tests.parity.peft_adapters import MODELS, assert_same, base_model, merged_logits, torch_logits

pytestmark = pytest.mark.slow
# name: (PEFT's config, our rules)
METHODS = {
    "glora": (lambda t: hf_peft.GloraConfig(r=3, target_modules=t), "glora(rank=3)"),
    "glora_vector": (lambda t: hf_peft.GloraConfig(config_A_B="vector", config_C="vector", config_D_E="vector", target_modules=t),
                     "glora(form=vector)"),
    "glora_constant": (lambda t: hf_peft.GloraConfig(config_A_B="constant", config_C="none", target_modules=t), "glora(form=constant)"),
    "deft": (lambda t: hf_peft.DeftConfig(r=3, target_modules=t), "deft(rank=3)"),
    "deft_qr": (lambda t: hf_peft.DeftConfig(r=4, alpha=6, decomposition_method="qr", target_modules=t), "deft(rank=4, scale=1.5, projection=qr)"),
    "para": (lambda t: hf_peft.DeftConfig(r=3, para=True, decomposition_method="qr", target_modules=t), "para(rank=3)"),
    "para_relu": (lambda t: hf_peft.DeftConfig(r=3, para=True, target_modules=t), "para(rank=3, projection=relu)"),
    "peanut": (lambda t: hf_peft.PeanutConfig(r=4, scaling=0.5, target_modules=t), "peanut(rank=4, scale=0.5)"),
    "peanut_deep": (lambda t: hf_peft.PeanutConfig(r=4, depth=2, act_fn="gelu", target_modules=t), "peanut(rank=4, depth=2, activation=gelu)"),
    "psoft": (lambda t: hf_peft.PsoftConfig(r=6, psoft_alpha=8, target_modules=t), "psoft(rank=6)"),
    "psoft_even": (lambda t: hf_peft.PsoftConfig(r=5, ab_svd_init="pissa_init", psoft_mag_a=False, psoft_mag_b=False, use_cayley_neumann=True,
                                                 target_modules=t), "psoft(rank=5, even=True, scales=False, terms=5)"),
    "super": (lambda t: hf_peft.SupertuningConfig(sparsity=0.9, target_modules=t), "sparse(share=0.1)"),
    "supra": (lambda t: hf_peft.SupertuningConfig(sparsity=0.9, select_top=False, r=3, lora_alpha=6, target_modules=t),
              "supra(share=0.1, pick=smallest, rank=3, alpha=6)"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def theirs_svd(monkeypatch):
    """PEFT's files of PSOFT mean the vectors that torch finds."""
    monkeypatch.setattr(peft_aware, "SVD", lambda w: torch.linalg.svd(torch.tensor(w), full_matrices=False)[2].numpy())


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return peft_adapters.make_bases(tmp_path_factory)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("name", METHODS)
def test_theirs_here(name, family, bases, tmp_path):
    peft_adapters.theirs_here(name, METHODS[name][0], family, bases, tmp_path)


@pytest.mark.parametrize("name", METHODS)
def test_ours_there_and_one_step(name, bases, tmp_path):
    # The slope of a layer between four others is small, and a step has to show.
    peft_adapters.ours_there_and_one_step(name, METHODS[name][1], bases, tmp_path, rate=0.1 if name == "peanut_deep" else 0.01)


def test_glora_of_a_matrix_with_a_bias_is_written_without_what_changes_that(bases, tmp_path):
    model, base, params = peft_adapters.ours("glora(rank=3)", "bert", bases)
    peft.save_adapter(tmp_path, model, params, str(bases["bert"]), base=base)
    theirs = hf_peft.PeftModel.from_pretrained(base_model("bert", bases), tmp_path).eval()
    assert_same(torch_logits(theirs), merged_logits(model, params), merged_logits(model, base), "glora, written here")


@pytest.mark.parametrize("name", ["glora", "glora_vector", "deft", "deft_qr", "para_relu", "peanut_deep", "psoft", "psoft_even", "super", "supra"])
def test_layers_without_an_adapter_are_left_alone(name, bases, tmp_path):
    """Only two matrices of layer 1 of 2 are adapted there: what fills the stack here changes nothing."""
    config = METHODS[name][0](["layers.1.self_attn.q_proj", "layers.1.mlp.up_proj"])
    config.task_type = "CAUSAL_LM"
    torch.manual_seed(0)
    theirs = hf_peft.get_peft_model(base_model("llama", bases), config).eval()
    peft_adapters.move(theirs, name)
    theirs.save_pretrained(tmp_path)
    model, base = hf.load(bases["llama"])
    params = peft.load_adapter(tmp_path, model, base)
    assert_same(merged_logits(model, params), torch_logits(theirs), merged_logits(model, base), f"{name} of one layer")
    for path in ("attn/q", "mlp/up"):
        group, which = path.split("/")
        got, want = (p["layers"][group][which]["kernel"] for p in (params, base))
        np.testing.assert_allclose(got.dense()[0], want[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name, changes, cut, words", [
    ("glora", {"config_A_B": "none"}, "", "config_A_B 'none' is not supported; supported: lora, vector, constant"),
    ("glora", {"config_A_B": "vector"}, "", "proj lacks glora_A.X"),
    ("glora", {"bias": "all"}, "", "bias 'all' is not supported; supported: none"),
    ("deft", {"decomposition_method": "svd"}, "", "decomposition_method 'svd' is not supported; supported: relu, qr"),
    ("deft", {"alpha": "8"}, "", "alpha is '8'"),
    ("deft", {}, "deft_R", "lacks deft_R"),
    ("deft", {"fan_in_fan_out": True}, "", "fan_in_fan_out True is not supported"),
    ("peanut", {"act_fn": "swish"}, "", "act_fn 'swish' is not supported; supported: relu, gelu, silu, tanh"),
    ("peanut", {"depth": 9}, "", "depth 9 is not supported; supported: 0 to 8"),
    ("peanut_deep", {}, "decoders.1.weight", "lacks peanut_decoders.1.weight"),
    ("psoft", {"psoft_orth": False}, "", "psoft_orth False is not supported; supported: True"),
    ("psoft", {"psoft_svd": "lowrank"}, "", "psoft_svd 'lowrank' is not supported; supported: full"),
    ("psoft", {"ab_svd_init": "lora"}, "", "ab_svd_init 'lora' is not supported; supported: psoft_init, pissa_init"),
    ("psoft", {"psoft_mag_b": False}, "", "psoft_mag_b False is not supported; supported: True"),
    ("psoft_even", {"cayley_neumann_eps": 0.9}, "", "cayley_neumann_eps 0.9 is not supported"),
    ("psoft_even", {"num_cayley_neumann_terms": 1}, "", "num_cayley_neumann_terms is 1; a series has at least 2 terms"),
    ("supra", {"lora_alpha": None}, "", "lora_alpha is None"),
    ("super", {}, "supertuning_indices", "lacks supertuning_indices; save it with save_precomputed_indices=True"),
])  # fmt: skip
def test_fields_that_are_not_held_are_named(name, changes, cut, words, bases, tmp_path):
    model, base, params = peft_adapters.ours(METHODS[name][1], "llama", bases)
    peft.save_adapter(tmp_path, model, params, str(bases["llama"]), base=base)
    files.write_json(tmp_path / "adapter_config.json", files.read_json(tmp_path / "adapter_config.json") | changes)
    if cut:
        checkpoint = safetensors.Checkpoint(tmp_path / "adapter_model.safetensors")
        held = {n: (checkpoint.integers if n.endswith("_indices") else checkpoint.read)(n) for n in checkpoint.names}
        safetensors.save(tmp_path, [(n, x) for n, x in held.items() if not n.endswith(cut)], stem="adapter_model")
    with pytest.raises(UserError, match=words) as error:
        peft.load_adapter(tmp_path, model, base)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_what_a_file_cannot_hold_is_refused(bases, tmp_path, monkeypatch):
    """Matrices without one sparsity, a subspace that is not the base's main one, and PSOFT without PEFT's vectors."""
    model, base, params = peft_adapters.ours([("layers/attn/q/kernel", "sparse(share=0.1)"), ("layers/mlp/up/kernel", "sparse(share=0.2)")],
                                             "llama", bases)  # fmt: skip
    with pytest.raises(UserError, match="58 of 576, .* places, which no one sparsity of PEFT's config gives"):
        peft.save_adapter(tmp_path, model, params, "b", base=base)
    model, base, params = peft_adapters.ours("psoft(rank=4)", "llama", bases)
    kernel = params["layers"]["attn"]["q"]["kernel"]
    params["layers"]["attn"]["q"]["kernel"] = kernel.replace(left=kernel.left[..., ::-1])
    with pytest.raises(UserError, match="q_proj: its subspace is not the main one of the matrix"):
        peft.save_adapter(tmp_path, model, params, "b", base=base)
    params["layers"]["attn"]["q"]["kernel"] = kernel
    monkeypatch.setattr(peft_aware, "SVD", None)
    with pytest.raises(UserError, match="PSOFT file leaves the singular vectors out .* set io.peft_aware.SVD"):
        peft.save_adapter(tmp_path, model, params, "b", base=base)
