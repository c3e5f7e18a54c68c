"""Rows to token ids, once: memory-mapped .npy files under the hash of everything that decides them."""

import errno
import hashlib
import json
import os
import pathlib
import shutil
import tempfile

import numpy as np
from tqdm import tqdm

from ft_jax.errors import UserError

CHUNK = 512
# Part of every key: raise it when the same settings give other arrays.
VERSION = 1


def cached(folder, key, make):
    """``({name: memory-mapped array}, info)`` of ``make() -> ({name: array}, info)``, kept under the hash of ``key``.

    ``key`` is a dict of JSON values; ``info`` a dict of numbers. Written beside and renamed, so that a folder is
    there whole or not at all; a folder that cannot be read is made again.
    """
    text = json.dumps({"version": VERSION, **key}, sort_keys=True)
    target = pathlib.Path(folder) / hashlib.sha256(text.encode()).hexdigest()[:32]
    found = _open(target)
    if found is None:
        _write(target, text, *make())
        found = _open(target)
        if found is None:
            raise OSError(errno.EIO, "the arrays just written cannot be read back", str(target))
    return found


def _open(target):
    try:
        meta = json.loads((target / "meta.json").read_text())
        arrays = {}
        for name, shape in meta["shapes"].items():
            # An empty file cannot be mapped.
            arrays[name] = np.load(target / f"{name}.npy", mmap_mode="r" if 0 not in shape else None)
            if list(arrays[name].shape) != shape:
                return None
        return arrays, meta["info"]
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return None


def _write(target, key, arrays, info):
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = pathlib.Path(tempfile.mkdtemp(prefix=".tmp-", dir=target.parent))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"the cache folder {target.parent} cannot be written ({error.strerror})") from None
    try:
        shapes = {name: list(array.shape) for name, array in arrays.items()}
        for name, array in arrays.items():
            _save(folder / f"{name}.npy", np.ascontiguousarray(array))
        meta = {"shapes": shapes, "info": info, "key": json.loads(key)}
        (folder / "meta.json").write_text(json.dumps(meta, indent=1))
        if target.exists() and _open(target) is None:
            shutil.rmtree(target)
        try:
            os.replace(folder, target)
        except OSError:
            # Another process has put the same arrays there meanwhile.
            if _open(target) is None:
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _save(path, array):
    # Not np.save: its short write on a full disk raises an OSError without errno.
    with open(path, "wb") as file:
        np.lib.format.write_array_header_2_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)


def tokenise(source, indices, encode):
    """``({"ids", "offsets", "starts", "labels"}, info)`` of the rows ``source[i]``, i in ``indices``.

    ``encode([rows], [where]) -> [(token ids, first target position, label)]``. Row k has the ids
    ``ids[offsets[k]:offsets[k + 1]]`` (int32). info: examples, tokens, longest, max_id and the row it stands in.
    """
    ids, lengths, starts, labels = [], [], [], []
    max_id, max_row = -1, -1
    with tqdm(total=len(indices), desc=f"tokenise {source.name}", unit="row", leave=False) as bar:
        for at in range(0, len(indices), CHUNK):
            chosen = [int(i) for i in indices[at : at + CHUNK]]
            encoded = encode([source[i] for i in chosen], [source.where(i) for i in chosen])
            for i, (row, start, label) in zip(chosen, encoded, strict=True):
                if not row:
                    raise UserError(f"{source.where(i)}: the text gives no tokens")
                if max(row) > max_id:
                    max_id, max_row = max(row), i
                ids.append(np.asarray(row, np.int32))
                lengths.append(len(row))
                starts.append(start)
                labels.append(label)
            bar.update(len(chosen))
    arrays = {
        "ids": np.concatenate(ids),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        "starts": np.asarray(starts, np.int32),
        "labels": np.asarray(labels, np.int32),
    }
    info = {"examples": len(lengths), "tokens": int(sum(lengths)), "longest": int(max(lengths)), "max_id": int(max_id),
            "max_row": int(max_row)}
    return arrays, info


def check_vocabulary(source, info, vocab_size):
    """UserError when a token id lies outside the model's embedding table."""
    if info["max_id"] >= vocab_size:
        raise UserError(f"{source.where(info['max_row'])}: token id {info['max_id']} is outside the model's vocabulary "
                        f"of {vocab_size}; the tokenizer belongs to another model")
