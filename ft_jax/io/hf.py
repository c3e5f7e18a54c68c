"""Hugging Face model folders in and out: ``config.json`` decides the architecture, one name table maps both ways."""

import pathlib
import re
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from ft_jax import tree
from ft_jax.errors import UserError, nearest, one_line
from ft_jax.io import assets, files, gguf, layout, safetensors, tokenizer
from ft_jax.kernels import dense, is_kernel
from ft_jax.models import Model, config_from_hf, config_to_hf, names
from ft_jax.models.config import HEADS

ASSETS = {"minilm": assets.model_folder, "smollm2": lambda name: gguf.cached_folder(assets.gguf_file(name))}
PATTERNS = ["*.json", "*.safetensors", "tokenizer.model", "vocab.txt", "merges.txt", "*.jinja"]
# Heads that a base model has no weights for: these start at random, anything else missing is an error.
HEAD_LEAVES = {"classification": ("head/", "pooler/"), "prototype": ("head/",), "mlm": ("mlm/",)}
# Buffers and copies of tied weights that old files carry, and the pooler that only some heads use.
BUFFERS = re.compile(r".*(pooler\.dense\.\w+|position_ids|rotary_emb\.\w+|masked_bias|attn\.bias"
                     r"|(predictions|lm_head)\.decoder\.\w+)$")  # fmt: skip
OLD_ENDINGS = {".gamma": ".weight", ".beta": ".bias"}  # the names of BERT's first checkpoints


def resolve(spec):
    """The local model folder that a spec names.

    spec: a folder, a ``.gguf`` file, ``hf:org/name`` (``hf:org/name@revision``), or a bundled asset (minilm, smollm2).
    UserError names the nearest thing there is, or says that the hub cannot be reached.
    """
    spec = str(spec)
    if spec.startswith("hf:"):
        return _from_hub(spec)
    if spec in ASSETS:
        return ASSETS[spec](spec)
    path = pathlib.Path(spec).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{path}: holds no config.json{nearest('config.json', files.entries(path))}")
        return path
    if path.is_file():
        if path.suffix == ".gguf":
            return gguf.cached_folder(path)
        raise UserError(f"{path}: is a file; a model is a folder with config.json, or a .gguf file")
    beside = [str(path.parent / n) for n in files.entries(path.parent)
              if n.endswith(".gguf") or (path.parent / n / "config.json").is_file()]  # fmt: skip
    raise UserError(
        f"no model {spec!r} (a folder, a .gguf file, hf:org/name, or one of {', '.join(ASSETS)})"
        f"{nearest(spec, [*ASSETS, *beside])}"
    )


def _from_hub(spec):
    name, _, revision = spec.removeprefix("hf:").partition("@")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UserError(f"{spec!r} is not of the form hf:org/name")
    import huggingface_hub
    from huggingface_hub import errors as hub

    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(
                name, revision=revision or None, allow_patterns=PATTERNS, ignore_patterns=["*/*"]
            )
        )
    except (hub.RepositoryNotFoundError, hub.RevisionNotFoundError, hub.HFValidationError) as error:
        raise UserError(f"{spec}: not found on the hub: {one_line(error)[:200]}") from None
    except (hub.HTTPError, hub.LocalEntryNotFoundError, hub.XetDownloadError, ConnectionError, TimeoutError) as error:
        raise UserError(
            f"{spec}: the hub cannot be reached ({type(error).__name__}) and no copy is in its cache; "
            f"check the network, or use a local folder or one of {', '.join(ASSETS)}"
        ) from None


def read_config(folder, head=None, num_labels=None, label_ids=None):
    """The ``ModelConfig`` of a model folder; UserError says which file and what is supported."""
    folder = pathlib.Path(folder)
    try:
        config = config_from_hf(files.read_json(folder / "config.json"), head, num_labels, label_ids)
        if config.head == "label_words" and config.kind == "encoder" and config.mask_id is None:
            config = config.with_head(config.head, mask_id=tokenizer.load(folder).mask_id)
        config.check()
        return config
    except UserError as error:
        text = str(error)
        raise (error if str(folder) in text else UserError(f"{folder}/{text}")) from None
    except (TypeError, ValueError, ArithmeticError, AttributeError, LookupError) as error:
        raise UserError(f"{folder}/config.json: a value is not of its kind: {one_line(error)}") from None


def load(spec, head=None, num_labels=None, rng=None, dtype="float32", remat="none", label_ids=None):
    """``(Model, params)`` of a checkpoint: layers stacked, kernels ``[in, out]``, float32.

    head: as in ``ModelConfig.head``; what the checkpoint's architecture names by default. label_ids: for label_words,
    the token of each class (`data.prompts.label_ids` finds them). Weights of a head that the checkpoint lacks start at
    random (``rng``), which is said on stderr. UserError, before any tensor is read, for any other missing tensor, for a
    shape that is not what config.json makes it, and for a corrupt file.
    """
    folder = resolve(spec)
    config = read_config(folder, head, num_labels, label_ids)
    model = Model(config, dtype=dtype, remat=remat)
    checkpoint = safetensors.Checkpoint(folder)
    found, absent = _locate(config, checkpoint)
    _report_unused(spec, config, checkpoint, found)
    params = _read(spec, config, checkpoint, found)
    if absent:
        print(f"{spec}: no {', '.join(absent)} in the checkpoint: started at random", file=sys.stderr)
        params |= _fresh(model, absent, jax.random.key(0) if rng is None else rng)
    return model, tree.nest(params)


def missing_head(spec, head=None, num_labels=None, label_ids=None):
    """Paths of the head leaves that a checkpoint lacks: what `load` draws at random."""
    folder = resolve(spec)
    return _locate(read_config(folder, head, num_labels, label_ids), safetensors.Checkpoint(folder))[1]


def _locate(config, checkpoint):
    """``({Tensor row: name in the file}, [paths of absent head leaves])``."""
    modern = {}
    for name in checkpoint.names:
        stem, dot, ending = name.rpartition(".")
        modern[stem + OLD_ENDINGS.get(dot + ending, dot + ending)] = name
    found, absent, missing = {}, [], []
    for row in layout.tensors(config):
        name = next((modern[n] for n in (row.name, row.name.removeprefix(layout.prefix(config))) if n in modern), None)
        if name is not None:
            _check_shape(config, checkpoint, name, row)
            found[row] = name
        elif row.path.startswith(HEAD_LEAVES.get(config.head, ())):
            absent.append(row.path)
        else:
            missing.append(row.name)
    if missing and (config.kind, config.head) == ("encoder", "label_words") and all(n.startswith(("cls.", "lm_head.")) for n in missing):
        raise UserError(f"{checkpoint.path}: has no masked-LM head for label words to be read from; take an encoder that has "
                        "one, or a decoder, or the head 'prototype'")
    if missing:
        more = f" (and {len(missing) - 1} more: {', '.join(missing[1:6])})" if len(missing) > 1 else ""
        raise UserError(f"{checkpoint.path}: no tensor {missing[0]!r}{nearest(missing[0], checkpoint.names)}{more}")
    return found, absent


def _check_shape(config, checkpoint, name, row):
    shape = checkpoint.shape(name)
    if checkpoint.dtype(name) not in safetensors.READABLE:
        raise UserError(
            f"{checkpoint.path}: {name} is {checkpoint.dtype(name)}; read are {', '.join(safetensors.READABLE)}"
        )
    if shape == row.shape:
        return
    hint = ""
    if row.path in ("embed/tokens/embedding", "mlm/bias") or (config.weights_head == "lm" and row.path == "head/kernel"):
        hint = f" (vocab_size {config.vocab_size})"
    elif row.path.startswith("head/"):
        hint = f" (num_labels {config.num_labels})"
    raise UserError(
        f"{checkpoint.path}: {name} has shape {list(shape)} but config.json{hint} makes it {list(row.shape)}"
    )


def _report_unused(spec, config, checkpoint, found):
    # Weights of the family's other heads are no surprise.
    known = {n for head in HEADS[config.kind] for n in names(config.with_head(head)).values() if "{i}" not in n}
    known |= {n.removeprefix(layout.prefix(config)) for n in known}
    unused = sorted(set(checkpoint.names) - set(found.values()) - known)
    unused = [n for n in unused if not BUFFERS.fullmatch(n)]
    if unused:
        more = ", …" if len(unused) > 4 else ""
        print(
            f"{spec}: {len(unused)} tensors of the checkpoint have no place in a {config.family} with head "
            f"{config.head!r}: {', '.join(unused[:4])}{more}",
            file=sys.stderr,
        )


def _read(spec, config, checkpoint, found):
    stacks, params = {}, {}
    for row, name in tqdm.tqdm(found.items(), desc=f"reading {spec}", unit="tensor", leave=False, disable=None):
        array = checkpoint.read(name)
        array = array.T if row.transposed else array
        if row.layer is None:
            params[row.path] = jnp.array(array)
            continue
        if row.path not in stacks:
            stacks[row.path] = np.empty((config.num_layers, *array.shape), np.float32)
        stacks[row.path][row.layer] = array
        if row.layer == config.num_layers - 1:  # rows come layer by layer, so the stack is full now
            params[row.path] = jnp.array(stacks.pop(row.path))
    return params


def _fresh(model, paths, rng):
    """Random leaves at ``paths`` alone; under jit the rest of the model is never made."""

    @jax.jit
    def init(key):
        flat = tree.flatten(model.init(key))
        return {path: flat[path] for path in paths}

    return init(rng)


def save(folder, model, params, source=None, max_shard_bytes=5_000_000_000):
    """Writes config.json, safetensors under Hugging Face's names, and the tokenizer files of the folder ``source``.

    Kernels are merged into dense float32 matrices, one leaf at a time; a split layer stack is joined again.
    ``load`` gives the same arrays back bit for bit; ``transformers`` loads the folder. What lay in ``folder`` before
    stays readable if anything fails. UserError for leaves that a plain checkpoint cannot hold (taps).
    """
    config = model.config
    flat = tree.flatten(params, is_leaf=is_kernel)
    rows = layout.tensors(config)
    stacks = stack_parts(flat)
    known = {row.path for row in rows}
    for path in stacks:
        if path not in known:
            raise UserError(f"{path}: a plain checkpoint has no place for it{nearest(path, known)}")
    for path in sorted(known - set(stacks)):
        raise UserError(f"the parameters hold no {path}{nearest(path, stacks)}")
    folder = files.make_folder(folder)
    if source is not None:
        copy_tokenizer(source, folder)
    raw = config_to_hf(config) | {"torch_dtype": "float32"}
    raw |= {"dtype": "float32"} if "dtype" in raw else {}
    with files.replacing(folder / "config.json") as temporary:  # takes its place after the weights have theirs
        files.write_json(temporary, raw)
        return safetensors.save(folder, _dense_tensors(config, rows, stacks), max_shard_bytes=max_shard_bytes)


def stack_parts(flat):
    """``{path: [(first layer, leaf), …]}``, the leaves of ``frozen_layers/`` and ``layers/`` under one path."""
    frozen = {p.removeprefix("frozen_layers/"): leaf for p, leaf in flat.items() if p.startswith("frozen_layers/")}
    depth = next((leaf.shape[0] for leaf in frozen.values()), 0)
    parts = {f"layers/{p}": [(0, leaf)] for p, leaf in frozen.items()}
    for path, leaf in flat.items():
        if not path.startswith("frozen_layers/"):
            parts.setdefault(path, []).append((depth if path.startswith("layers/") else 0, leaf))
    return parts


def _dense_tensors(config, rows, stacks):
    held_path, held = None, None
    for row in tqdm.tqdm(rows, desc="writing", unit="tensor", leave=False, disable=None):
        if row.path != held_path:
            held_path, held = row.path, np.concatenate([np.asarray(dense(w), np.float32) for _, w in stacks[row.path]])
        array = held if row.layer is None else held[row.layer]
        array = array.T if row.transposed else array
        if array.shape != row.shape:
            raise UserError(f"{row.path} has shape {array.shape}, its config makes it {row.shape}")
        yield layout.saved_name(config, row.name), array


def copy_tokenizer(source, folder):
    """Copies the tokenizer files of one model folder to another, each whole or not at all."""
    source, folder = pathlib.Path(source), pathlib.Path(folder)
    for name in tokenizer.FILES:
        if (source / name).is_file() and (folder / name).resolve() != (source / name).resolve():
            with files.replacing(folder / name) as temporary:
                shutil.copyfile(source / name, temporary)
