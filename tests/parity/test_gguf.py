"""Small GGUF files written with the gguf library, read by transformers and by us."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from ft_jax.io import gguf, hf, tokenizer
from tests import gguf_files

transformers.utils.logging.disable_progress_bar()


def source_model(family, tied):
    """A random transformers model of the sizes that ``gguf_files`` writes."""
    torch.manual_seed(0)
    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    raw = {k: v for k, v in gguf_files.config(family, tied).items() if k != "architectures"}
    model = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(initializer_range=0.2, **raw)).eval()  # fmt: skip
    return model, {k: v.numpy() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("family, kind, tied", [
    ("llama", "F32", False), ("llama", "Q8_0", True), ("llama", "Q4_1", True), ("llama", "F16", False),
    ("qwen2", "F32", False), ("qwen3", "F32", True),
])  # fmt: skip
def test_logits(family, kind, tied, tmp_path):
    """float32 files give the source model back exactly; quantised ones agree with transformers' reading of them."""
    path = tmp_path / "tiny.gguf"
    source, state = source_model(family, tied)
    gguf_files.write(path, family, kind, tied=tied, state=state)
    folder = gguf.to_folder(path, tmp_path / "folder")
    model, params = hf.load(folder)
    ids = np.random.default_rng(0).integers(2, model.config.vocab_size, (2, 11))
    got = np.asarray(model.apply(params, {"input_ids": jnp.asarray(ids)}))
    theirs = source
    if kind != "F32":
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    with torch.no_grad():
        want = theirs(torch.tensor(ids)).logits.numpy()
    print(family, kind, f"{np.abs(got - want).max():.1e}")
    assert np.abs(got - want).max() < 2e-4 and want.std() > 0.1
    again = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        np.testing.assert_allclose(again(torch.tensor(ids)).logits.numpy(), got, atol=2e-4)


def test_tokenizer(tmp_path):
    path = tmp_path / "tiny.gguf"
    gguf_files.write(path)
    ours = tokenizer.load(gguf.to_folder(path, tmp_path / "folder"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    for text in ("the cat", "the mat  sat\n", "<s>dog</s> the", "Unseen Ünïcode 猫"):
        ids = ours.encode_batch([text])[0]
        assert ids == theirs(text)["input_ids"] and ours.decode(ids) == text
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (0, 1, 1)
