"""GGUF files: exact float32 values, the cache, and every kind of damage named."""

import numpy as np
import pytest

from ft_jax.errors import UserError
from ft_jax.io import assets, files, gguf, hf, safetensors, tokenizer
from tests import gguf_files


@pytest.mark.parametrize("family, tied", [("llama", False), ("llama", True), ("qwen2", False), ("qwen3", True)])
def test_float32_values_are_exact(tmp_path, family, tied):
    state = gguf_files.write(tmp_path / "a.gguf", family, tied=tied)
    folder = gguf.to_folder(tmp_path / "a.gguf", tmp_path / "folder")
    read = dict(safetensors.Checkpoint(folder).items())
    assert read.keys() == state.keys()
    for name in state:
        np.testing.assert_array_equal(read[name], state[name], err_msg=name)
    config = files.read_json(folder / "config.json")
    for key, value in gguf_files.config(family, tied).items():
        assert config[key] == value, key


def test_quantised_values(tmp_path):
    """Q8_0 rows are scale · int8 in blocks of 32, un-permuted after dequantising."""
    state = gguf_files.write(tmp_path / "a.gguf", kind="Q8_0")
    read = dict(safetensors.Checkpoint(gguf.to_folder(tmp_path / "a.gguf", tmp_path / "folder")).items())
    for name, want in state.items():
        if want.ndim == 2:
            blocks = want.reshape(-1, 32)
            scale = (np.abs(blocks).max(1, keepdims=True) / 127).astype(np.float32)
            # the stored scale is float16, so half a step and the rounding of the scale
            assert np.all(np.abs(read[name].reshape(-1, 32) - blocks) <= 0.51 * scale + 127 * scale * 2**-10), name
            assert not np.array_equal(read[name], want)


def test_half_split_undoes_the_permutation():
    rows = np.arange(24 * 3, dtype=np.float32).reshape(24, 3)
    for heads in (1, 2, 3, 6):
        np.testing.assert_array_equal(gguf.half_split(gguf_files.interleave(rows, heads), heads), rows)
    np.testing.assert_array_equal(gguf.half_split(np.arange(6.0), 1), [0, 2, 4, 1, 3, 5])


def test_cache(tmp_path, monkeypatch):
    """Dequantised once, known by content; an interrupted conversion leaves nothing behind."""
    monkeypatch.setenv("FT_JAX_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "a.gguf"
    gguf_files.write(path)
    with monkeypatch.context() as broken:
        broken.setattr(safetensors, "save", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(OSError, match="No space left"):
            gguf.cached_folder(path)
    assert files.entries(assets.cache_dir() / "gguf") == []
    folder = gguf.cached_folder(path)
    path.rename(tmp_path / "a-copy.gguf")
    with monkeypatch.context() as counting:
        counting.setattr(gguf, "to_folder", lambda *_: pytest.fail("converted twice"))
        (tmp_path / "a-copy.gguf").rename(path)
        assert gguf.cached_folder(path) == hf.resolve(path) == folder
    gguf_files.write(path, tied=True)
    assert gguf.cached_folder(path) != folder and len(files.entries(folder.parent)) == 2


def test_begin_token(tmp_path):
    """``add_bos_token`` becomes a post-processor; special tokens are never split."""
    template = "{{ messages[0].content }}"
    gguf_files.write(tmp_path / "a.gguf", change_meta={"tokenizer.ggml.add_bos_token": True,
                                                       "tokenizer.chat_template": template})  # fmt: skip
    made = tokenizer.load(gguf.to_folder(tmp_path / "a.gguf", tmp_path / "folder"))
    ids = made.encode_batch(["the cat</s>"])[0]
    assert ids[0] == 0 and ids[-1] == 1 and made.decode(ids, skip_special_tokens=True) == "the cat"
    assert made.encode_batch(["the cat"], add_special_tokens=False)[0][0] != 0
    assert made.chat_template == template and made.special_ids == [0, 1]


def test_linear_rope(tmp_path):
    gguf_files.write(
        tmp_path / "a.gguf", change_meta={"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    )
    config = hf.read_config(gguf.to_folder(tmp_path / "a.gguf", tmp_path / "folder"))
    assert config.rope_scaling == (("rope_type", "linear"), ("factor", 2.0))


def drop(name):
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize("meta, tensors, message", [
    ({"general.architecture": "gpt2"}, None, "architecture 'gpt2' is not supported; supported: llama, qwen2, qwen3"),
    ({"llama.expert_count": 8}, None, "mixtures of experts"),
    ({"llama.block_count": None}, None, "metadata 'llama.block_count' is missing"),
    ({"llama.block_count": 0}, None, "metadata 'llama.block_count' is 0, which cannot be"),
    ({"llama.block_count": "two"}, None, "'llama.block_count' is 'two', not a whole number"),
    ({"llama.block_count": 2**31}, None, "metadata 'llama.block_count' is 2147483648, which cannot be"),
    ({"llama.attention.head_count": 64}, None, "heads of 1 dimensions"),
    ({"llama.block_count": 3}, None, "tensor 'blk.2.attn_norm.weight' is missing; nearest: 'blk.\\d.attn_norm.weight'"),
    ({"llama.block_count": 1}, None, "tensors that a llama model does not have: blk.1"),
    ({"llama.feed_forward_length": 95}, None,
     r"blk.0.ffn_gate.weight has shape \[96, 64\], its metadata make it \[95, 64\]"),
    ({"llama.rope.scaling.type": "longrope"}, None, "rope scaling 'longrope' is not supported"),
    ({"tokenizer.ggml.model": "llama"}, None, "vocabulary of kind 'llama' is not supported; supported: gpt2"),
    ({"tokenizer.ggml.pre": "tekken"}, None, "pre-tokenizer 'tekken' is not supported; supported: default"),
    ({"tokenizer.ggml.eos_token_id": 9999}, None, "eos_token_id 9999 is outside the vocabulary"),
    ({"tokenizer.ggml.merges": ["qq zz"]}, None, "merges do not fit the vocabulary"),
    ({"tokenizer.ggml.token_type": [1, 1]}, None, "the vocabulary of .* tokens is corrupt"),
    (None, drop("blk.1.ffn_up.weight"), "tensor 'blk.1.ffn_up.weight' is missing"),
    (None, lambda t: t.update({"rope_freqs.weight": np.ones(8, np.float32)}), "rope scaling as a tensor"),
    (None, lambda t: t["blk.0.attn_q.weight"].__setitem__((3, 4), np.nan),
     "attn_q.weight holds values that are not finite"),
])  # fmt: skip
def test_unfit_files(tmp_path, meta, tensors, message):
    gguf_files.write(tmp_path / "a.gguf", change_meta=meta, change_tensors=tensors)
    with pytest.raises(UserError, match=message) as caught:
        gguf.to_folder(tmp_path / "a.gguf", tmp_path / "folder")
    assert str(caught.value).startswith(str(tmp_path / "a.gguf")) and "\n" not in str(caught.value)
    assert not (tmp_path / "folder").exists()


def test_no_gguf_at_all(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"PK\x03\x04" * 20)
    with pytest.raises(UserError, match="not a GGUF file"):
        hf.resolve(tmp_path / "a.gguf")
    with pytest.raises(UserError, match="no model .*nearest: .*a.gguf"):
        hf.resolve(tmp_path / "b.gguf")


def test_damage_never_passes_silently_or_hangs(tmp_path):
    """Cut anywhere it is refused; with bytes of the header changed it is refused or gives a model, nothing else."""
    path = tmp_path / "a.gguf"
    gguf_files.write(path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for size in [0, 3, 4, 20, *rng.integers(24, len(whole) - 32, 25).tolist()]:
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="not a (whole )?GGUF file"):
            gguf.to_folder(path, tmp_path / "folder")
    refused = 0
    for _ in range(60):
        damaged = bytearray(whole)
        # most of the header is the token table; half of the changes go before and after it
        start = int(rng.integers(4, 700)) if rng.random() < 0.5 else int(rng.integers(4, 16000))
        damaged[start : start + 8] = rng.bytes(8)
        path.write_bytes(damaged)
        try:
            hf.read_config(gguf.to_folder(path, tmp_path / "folder"))
        except UserError as error:
            refused += 1
            assert "a.gguf" in str(error)
    assert refused > 20
