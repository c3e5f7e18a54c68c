"""Writes tiny GGUF model files with the gguf library, for tests that read them."""

import functools
import json

import gguf
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from ft_jax.io.gguf import _TENSORS
from ft_jax.io.layout import tensors
from ft_jax.models import config_from_hf


@functools.cache
def vocabulary():
    """(tokens, merges) of a small byte-level BPE."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))  # fmt: skip
    made.train_from_iterator(["the cat sat on the mat", "the dog ate the cat"] * 5, trainer)
    state = json.loads(made.to_str())["model"]
    return sorted(state["vocab"], key=state["vocab"].get), [" ".join(m) for m in state["merges"]]


def config(family="llama", tied=False):
    """The config.json that a written file stands for."""
    extra = {"head_dim": 16} if family == "qwen3" else {}
    return {"model_type": family, "vocab_size": len(vocabulary()[0]), "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
            "rms_norm_eps": 1e-6, "tie_word_embeddings": tied, **extra}  # fmt: skip


def random_state(family="llama", tied=False):
    rng = np.random.default_rng(0)
    return {
        t.name: rng.normal(0, 0.2, t.shape).astype(np.float32) for t in tensors(config_from_hf(config(family, tied)))
    }


def interleave(rows, heads):
    """llama.cpp's permutation of query and key rows for interleaved rope."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def metadata(family):
    """Every key and value of a written file; tests change it."""
    tokens, merges = vocabulary()
    sizes = {"block_count": 2, "context_length": 64, "embedding_length": 64, "feed_forward_length": 96,
             "attention.head_count": 4, "attention.head_count_kv": 2}  # fmt: skip
    return {f"{family}.{key}": value for key, value in sizes.items()} | {
        f"{family}.attention.layer_norm_rms_epsilon": 1e-6, f"{family}.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm" if family == "llama" else "qwen2",
        "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.merges": merges, "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1,
    }  # fmt: skip


def write(path, family="llama", kind="F32", *, tied=False, state=None, change_meta=None, change_tensors=None):
    """Writes the file; ``change_meta`` (None leaves a key out) and ``change_tensors`` edit its dicts before."""
    state = random_state(family, tied) if state is None else state
    meta = metadata(family)
    if change_meta:
        meta |= change_meta
    writer = gguf.GGUFWriter(path, meta.pop("general.architecture", family))
    for key, value in meta.items():
        if value is None:
            continue
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array,
               bool: writer.add_bool}  # fmt: skip
        add[type(value)](key, value)
    quantised, arrays = gguf.GGMLQuantizationType[kind], {}
    for row in tensors(config_from_hf(config(family, tied))):
        array = state[row.name]
        if family == "llama" and ("q_proj" in row.name or "k_proj" in row.name):
            array = interleave(array, 4 if "q_proj" in row.name else 2)
        arrays[_TENSORS[row.path].format(i=row.layer)] = np.ascontiguousarray(array)
    if change_tensors:
        change_tensors(arrays)
    for name, array in arrays.items():
        if array.ndim == 1 or kind == "F32":
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quantize(array, quantised), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return state
