"""GGUF model files, dequantised once to float32 and written as a Hugging Face folder."""

import os
import pathlib
import shutil
import struct
import tempfile

import gguf
import numpy as np
import tokenizers
import tqdm
from tokenizers import decoders, models, pre_tokenizers, processors

from ft_jax.errors import UserError, nearest, one_line
from ft_jax.io import assets, files, layout, safetensors
from ft_jax.models import config_from_hf

LAYOUT = 1  # counts up when what to_folder writes changes, so that older cache entries are not used
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_KEYS = {  # config.json key -> metadata key below the architecture's name
    "num_hidden_layers": "block_count", "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
}  # fmt: skip
_TENSORS = {
    "embed/tokens/embedding": "token_embd.weight", "norm/scale": "output_norm.weight", "head/kernel": "output.weight",
    "layers/attn_norm/scale": "blk.{i}.attn_norm.weight", "layers/mlp_norm/scale": "blk.{i}.ffn_norm.weight",
    "layers/attn/q_norm/scale": "blk.{i}.attn_q_norm.weight", "layers/attn/k_norm/scale": "blk.{i}.attn_k_norm.weight",
    **{
        f"layers/{ours}/{leaf}": f"blk.{{i}}.{theirs}.{kind}"
        for ours, theirs in {"attn/q": "attn_q", "attn/k": "attn_k", "attn/v": "attn_v", "attn/out": "attn_output",
                             "mlp/gate": "ffn_gate", "mlp/up": "ffn_up", "mlp/down": "ffn_down"}.items()
        for leaf, kind in (("kernel", "weight"), ("bias", "bias"))
    },
}  # fmt: skip

# How each vocabulary's merges were learnt to split text, by ``tokenizer.ggml.pre``; None is GPT-2's own split.
_LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
           r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")  # fmt: skip
SPLITS = {
    "default": None, "gpt-2": None, "smollm": "digits",
    "llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3, "smaug-bpe": _LLAMA3,
    "qwen2": _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"), "deepseek-r1-qwen": _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),
}  # fmt: skip
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9


def cached_folder(path):
    """Folder in the cache that holds the model of a GGUF file; written the first time, known by the file's hash."""
    path = pathlib.Path(path)
    _check_header(path)
    target = assets.cache_dir() / "gguf" / f"{path.stem}-{assets.sha256(path)[:16]}-{LAYOUT}"
    if not target.is_dir():
        files.make_folder(target.parent)
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=target.parent) as temporary:
            made = to_folder(path, pathlib.Path(temporary) / "model")
            try:
                os.replace(made, target)
            except OSError:  # another process put the same folder there meanwhile
                if not target.is_dir():
                    raise
    return target


def to_folder(path, folder):
    """Writes config.json, float32 safetensors and the tokenizer of a GGUF file into ``folder``; returns it.

    Supported: llama, qwen2 and qwen3 with a byte-level BPE vocabulary. UserError for a corrupt file, another
    architecture, vocabulary or rope scaling, or a tensor that is missing, unexpected or of the wrong shape.
    """
    path, folder = pathlib.Path(path), pathlib.Path(folder)
    reader = _read(path)
    meta = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    config = _config(path, meta, {t.name for t in reader.tensors})
    plan = _plan(path, config, reader)
    tokenizer, tokenizer_config = _tokenizer(path, meta)
    existed = folder.exists()
    files.make_folder(folder)
    try:
        tokenizer.save(str(folder / "tokenizer.json"))
        files.write_json(folder / "tokenizer_config.json", tokenizer_config)
        files.write_json(folder / "config.json", config)
        safetensors.save(folder, _tensors(path, plan))
    except BaseException:
        if not existed:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _check_header(path):
    """Walks the header: the gguf library does not check lengths against the file's size, and may never return."""
    if not path.is_file():
        raise UserError(f"{path}: no such file{nearest(path.name, files.entries(path.parent))}")
    size = path.stat().st_size
    with open(path, "rb") as file:

        def take(count):
            if count > size - file.tell():
                raise UserError(f"{path}: not a whole GGUF file (cut off or corrupt at byte {file.tell()} of {size})")
            return file.read(count)

        def number(form):
            return struct.unpack(form, take(struct.calcsize(form)))[0]

        def skip(kind):
            if kind == _STRING:
                take(number("<Q"))
            elif kind == _ARRAY:
                inner, count = number("<I"), number("<Q")
                if inner in _SCALARS:
                    take(_SCALARS[inner] * count)
                elif inner == _STRING:
                    for _ in range(count):
                        take(number("<Q"))
                else:
                    raise UserError(f"{path}: not a GGUF file of this time (array of kind {inner}), or corrupt")
            elif kind in _SCALARS:
                take(_SCALARS[kind])
            else:
                raise UserError(f"{path}: corrupt GGUF header (value of kind {kind} at byte {file.tell()})")

        if take(4) != b"GGUF":
            raise UserError(f"{path}: not a GGUF file")
        version = number("<I")
        if version not in (2, 3):
            raise UserError(f"{path}: GGUF version {version} is not supported; supported: 2, 3")
        tensors, values = number("<Q"), number("<Q")
        for _ in range(values):
            take(number("<Q"))
            skip(number("<I"))
        for _ in range(tensors):
            take(number("<Q"))
            take(8 * number("<I") + 12)


def _read(path):
    _check_header(path)
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{path}: not a whole GGUF file (cut off or corrupt: {one_line(error)})") from None


def _value(path, meta, key, default=None):
    if key not in meta:
        if default is None:
            raise UserError(f"{path}: the metadata {key!r} is missing{nearest(key, meta)}")
        return default
    try:
        return meta[key].contents()
    except (ValueError, IndexError, TypeError) as error:
        raise UserError(f"{path}: the metadata {key!r} cannot be read: {one_line(error)}") from None


def _integer(path, meta, key, default=None):
    value = _value(path, meta, key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{path}: the metadata {key!r} is {str(value)[:40]!r}, not a whole number")
    return value


def _config(path, meta, tensors):
    kind = _value(path, meta, "general.architecture")
    if kind not in ARCHITECTURES:
        raise UserError(f"{path}: GGUF architecture {kind!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    if f"{kind}.expert_count" in meta and _integer(path, meta, f"{kind}.expert_count"):
        raise UserError(f"{path}: mixtures of experts are not supported")
    if any(name.startswith("rope_freqs") or name.startswith("rope_factors") for name in tensors):
        raise UserError(
            f"{path}: stores its rope scaling as a tensor, from which config.json cannot be made; "
            "take the safetensors checkpoint of this model"
        )
    config = {"model_type": kind, "architectures": [ARCHITECTURES[kind]], "hidden_act": "silu"}
    config |= {ours: _integer(path, meta, f"{kind}.{theirs}") for ours, theirs in _KEYS.items()}
    for key, theirs in _KEYS.items():
        limit = len(tensors) if key == "num_hidden_layers" else 2**31
        if not 0 < config[key] < limit:
            raise UserError(f"{path}: the metadata '{kind}.{theirs}' is {config[key]}, which cannot be")
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    head_dim = _integer(path, meta, f"{kind}.attention.key_length",
                        _integer(path, meta, f"{kind}.rope.dimension_count", head_dim))  # fmt: skip
    if head_dim < 2 or head_dim % 2:
        raise UserError(f"{path}: its metadata make heads of {head_dim} dimensions, which rotary positions cannot turn")
    config |= {
        "head_dim": head_dim,
        "rope_theta": float(_value(path, meta, f"{kind}.rope.freq_base", 10000.0)),
        # stored as float32: the shortest decimal that gives the same float32 is what was meant
        "rms_norm_eps": float(str(np.float32(_value(path, meta, f"{kind}.attention.layer_norm_rms_epsilon")))),
        "vocab_size": len(_value(path, meta, "tokenizer.ggml.tokens")),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors and "blk.0.attn_output.bias" in tensors,
        "torch_dtype": "float32",
    }  # fmt: skip
    config |= _rope(path, meta, kind, config)
    for ours, theirs in {"bos": "bos", "eos": "eos", "pad": "padding"}.items():
        if f"tokenizer.ggml.{theirs}_token_id" in meta:
            config[f"{ours}_token_id"] = _integer(path, meta, f"tokenizer.ggml.{theirs}_token_id")
    return config


def _rope(path, meta, kind, config):
    scaling = _value(path, meta, f"{kind}.rope.scaling.type", "none")
    if scaling == "none":
        return {}
    if scaling not in ("linear", "yarn"):
        raise UserError(f"{path}: rope scaling {scaling!r} is not supported; supported: none, linear, yarn")
    table = {"rope_type": scaling, "factor": float(_value(path, meta, f"{kind}.rope.scaling.factor"))}
    if scaling == "yarn":
        table["original_max_position_embeddings"] = _integer(
            path, meta, f"{kind}.rope.scaling.original_context_length", config["max_position_embeddings"]
        )
    return {"rope_scaling": table}


def _plan(path, config, reader):
    """``[(layout.Tensor, GGUF tensor, heads or 0)]``: which tensor goes where; heads > 0 means un-permute."""
    ours = config_from_hf(config)
    held = {t.name: t for t in reader.tensors}
    heads = {"layers/attn/q": ours.num_heads, "layers/attn/k": ours.num_kv_heads}
    plan = []
    for row in layout.tensors(ours):
        source = _TENSORS[row.path].format(i=row.layer)
        if source not in held:
            there = [t.name for t in reader.tensors]
            raise UserError(f"{path}: the tensor {source!r} is missing{nearest(source, there)}")
        found = tuple(reversed(held[source].shape.tolist()))
        if found != row.shape:
            raise UserError(f"{path}: {source} has shape {list(found)}, its metadata make it {list(row.shape)}")
        permuted = heads.get(row.path.rpartition("/")[0], 0) if config["model_type"] == "llama" else 0
        plan.append((row, held.pop(source), permuted))
    if held:
        names = ", ".join(list(held)[:5])
        raise UserError(f"{path}: tensors that a {config['model_type']} model does not have: {names}")
    return plan


def _tensors(path, plan):
    bar = tqdm.tqdm(plan, desc=f"dequantising {path.name}", unit="tensor", leave=False, disable=None)
    for row, tensor, heads in bar:
        try:
            array = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False).reshape(row.shape)
        except (ValueError, NotImplementedError) as error:
            kind = tensor.tensor_type.name
            raise UserError(f"{path}: {tensor.name} ({kind}) cannot be read: {one_line(error)}") from None
        if not np.isfinite(array).all():
            raise UserError(f"{path}: {tensor.name} holds values that are not finite: the file is corrupt")
        yield row.name, half_split(array, heads) if heads else array


def half_split(array, heads):
    """Undoes GGUF's permutation of query and key rows: interleaved rope pairs back to the half-split form."""
    rows = array.reshape(heads, -1, 2, *array.shape[1:])
    return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(array.shape)


def _tokenizer(path, meta):
    model = _value(path, meta, "tokenizer.ggml.model")
    if model != "gpt2":
        raise UserError(f"{path}: vocabulary of kind {model!r} is not supported; supported: gpt2 (byte-level BPE)")
    pre = _value(path, meta, "tokenizer.ggml.pre", "default")
    if pre not in SPLITS:
        raise UserError(f"{path}: pre-tokenizer {pre!r} is not supported; supported: {', '.join(SPLITS)}")
    tokens, kinds = (_value(path, meta, f"tokenizer.ggml.{k}") for k in ("tokens", "token_type"))
    if len(set(tokens)) != len(tokens) or len(kinds) != len(tokens):
        raise UserError(
            f"{path}: the vocabulary of {len(tokens)} tokens is corrupt (repeated tokens, or {len(kinds)} kinds)"
        )
    merges = [tuple(m.split(" ")) for m in _value(path, meta, "tokenizer.ggml.merges")]
    try:
        bpe = models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, fuse_unk=False)
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{path}: the merges do not fit the vocabulary: {one_line(error)}") from None
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.pre_tokenizer = _pre_tokenizer(SPLITS[pre])
    tokenizer.decoder = decoders.ByteLevel()
    for kind, special in ((gguf.TokenType.CONTROL, True), (gguf.TokenType.USER_DEFINED, False)):
        added = [tokenizers.AddedToken(t, normalized=False, special=special)
                 for t, k in zip(tokens, kinds, strict=True) if k == kind]  # fmt: skip
        tokenizer.add_special_tokens(added) if special else tokenizer.add_tokens(added)
    return tokenizer, _tokenizer_config(path, meta, tokens, tokenizer)


def _pre_tokenizer(split):
    if split in (None, "digits"):
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level]) if split else level
    return pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(split), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip


def _tokenizer_config(path, meta, tokens, tokenizer):
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for ours, theirs in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        key = f"tokenizer.ggml.{theirs}_token_id"
        if key in meta:
            index = _integer(path, meta, key)
            if index >= len(tokens):
                raise UserError(f"{path}: {key} {index} is outside the vocabulary of {len(tokens)}")
            config[f"{ours}_token"] = tokens[index]
    if _value(path, meta, "tokenizer.ggml.add_bos_token", False) and "bos_token" in config:
        bos = config["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokens.index(bos))]
        )
    if "tokenizer.chat_template" in meta:
        config["chat_template"] = _value(path, meta, "tokenizer.chat_template")
    arch = _value(path, meta, "general.architecture")
    return config | {"model_max_length": _integer(path, meta, f"{arch}.context_length")}
