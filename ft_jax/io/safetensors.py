"""safetensors checkpoints, one tensor at a time: whole files, Hugging Face shards, adapters."""

import json
import os
import pathlib
import secrets

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ft_jax.errors import UserError, disk_full, nearest
from ft_jax.io import files

STEMS = ("model", "adapter_model")
READABLE = ("F32", "F16", "BF16")


class Checkpoint:
    """Lazy reader of a safetensors file, or of a folder that holds one (or an index with its shards).

    On opening, every header is checked against the size of its file and the index against its shards; UserError
    names the file that is cut off, corrupt or missing.
    """

    def __init__(self, path):
        self.path = pathlib.Path(path)
        self._main = main = _find(self.path)
        self._file = _read_index(main) if main.suffix == ".json" else dict.fromkeys(_open(main).keys(), main)
        self._open = {file: _open(file) for file in dict.fromkeys(self._file.values())}
        held = {file: set(handle.keys()) for file, handle in self._open.items()}
        for name, file in self._file.items():
            if name not in held[file]:
                raise UserError(
                    f"{main}: says that {name!r} is in {file.name}, which lacks it{nearest(name, held[file])}"
                )

    @property
    def files(self):
        """The files that it is read from: the index, where there is one, and those that hold tensors."""
        return list(dict.fromkeys([self._main, *self._open]))

    def file(self, name):
        """The file that holds a tensor."""
        self._slice(name)
        return self._file[name]

    @property
    def names(self):
        """Tensor names, sorted."""
        return sorted(self._file)

    def __contains__(self, name):
        return name in self._file

    def _slice(self, name):
        if name not in self._file:
            raise UserError(f"{self.path}: no tensor {name!r}{nearest(name, self._file)}")
        return self._open[self._file[name]].get_slice(name)

    def shape(self, name):
        """Shape of a tensor, from the header alone."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name):
        """Kind of a tensor as the file names it (F32, BF16, …), from the header alone."""
        return self._slice(name).get_dtype()

    def metadata(self):
        """The text entries of the first file's header."""
        return dict(next(iter(self._open.values())).metadata() or {}) if self._open else {}

    def read(self, name):
        """One tensor as a float32 array; float32, float16 and bfloat16 are read, any other kind is a UserError."""
        kind = self.dtype(name)
        if kind not in READABLE:
            raise UserError(f"{self._file[name]}: {name} is {kind}; read are {', '.join(READABLE)}")
        return np.asarray(self._open[self._file[name]].get_tensor(name), np.float32)

    def integers(self, name):
        """One tensor of 32- or 64-bit integers as int64; any other kind is a UserError."""
        kind = self.dtype(name)
        if kind not in ("I32", "I64"):
            raise UserError(f"{self._file[name]}: {name} is {kind}; it has to be I32 or I64")
        return np.asarray(self._open[self._file[name]].get_tensor(name), np.int64)

    def items(self):
        """``(name, float32 array)`` of every tensor, one in memory at a time."""
        return ((name, self.read(name)) for name in self.names)


def _find(path):
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder{nearest(path.name, files.entries(path.parent))}")
    for stem in STEMS:
        for name in (f"{stem}.safetensors", f"{stem}.safetensors.index.json"):
            if (path / name).is_file():
                return path / name
    held = files.entries(path)
    pickled = [n for n in held if n.endswith((".bin", ".pt", ".pth"))]
    if pickled:
        raise UserError(
            f"{path}: holds {pickled[0]} but no model.safetensors; pickled weights are never read, "
            "save them as safetensors"
        )
    raise UserError(f"{path}: holds no model.safetensors{nearest('model.safetensors', held)}")


def _read_index(index):
    where = files.read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise UserError(f"{index}: has no weight_map")
    for name, file in where.items():
        inside = isinstance(file, str) and file == pathlib.PurePath(file).name and "\\" not in file and ":" not in file
        if not inside or file in ("", ".", ".."):
            raise UserError(f"{index}: {name!r} is said to be in {file!r}, which is no file of this folder")
    held = files.entries(index.parent)
    for file in sorted(set(where.values())):
        if not (index.parent / file).is_file():
            raise UserError(f"{index.parent}: the shard {file} is missing{nearest(file, held)}")
    return {name: index.parent / file for name, file in where.items()}


def _open(file):
    try:
        return safe_open(file, framework="np")
    except (SafetensorError, OSError, ValueError) as error:
        size = file.stat().st_size if file.exists() else 0
        raise UserError(f"{file}: not a whole safetensors file ({size} bytes; {error}); fetch it again") from None


def save(folder, tensors, *, max_shard_bytes=5_000_000_000, metadata=None, stem="model"):
    """Writes ``(name, array)`` pairs as safetensors in Hugging Face's layout; holds one shard in memory at most.

    Everything is written under temporary names first; one rename makes the new checkpoint the valid one, and only
    then are the files of the old one removed, so a failure leaves the old one readable.
    Returns the names of the files written.
    """
    folder = files.make_folder(folder)
    temporary, where = [], {}
    try:
        total = _write_shards(folder, tensors, max_shard_bytes, metadata, temporary, where)
        return _put_in_place(folder, stem, temporary, where, total)
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)


def _write_shards(folder, tensors, max_shard_bytes, metadata, temporary, where):
    shard, size, total = {}, 0, 0

    def flush():
        temporary.append(files.temporary_name(folder / f"shard-{len(temporary)}"))
        temporary[-1].touch()
        mode = temporary[-1].stat().st_mode  # the library makes files that only their owner may read
        try:
            save_file(shard, temporary[-1], metadata={"format": "pt", **(metadata or {})})
            temporary[-1].chmod(mode)
        except SafetensorError as error:
            if disk_full(error):
                raise OSError(28, f"No space left on device: {error}", str(folder)) from None
            raise

    for name, tensor in tensors:
        if name in where:
            raise ValueError(f"the tensor {name!r} comes twice")
        tensor = np.asarray(tensor, order="C")
        if shard and size + tensor.nbytes > max_shard_bytes:
            flush()
            shard, size = {}, 0
        shard[name], where[name] = tensor, len(temporary)
        size, total = size + tensor.nbytes, total + tensor.nbytes
    if shard or not temporary:
        flush()
    return total


def _put_in_place(folder, stem, temporary, where, total):
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    old = _shards_of(index)
    if len(temporary) == 1:
        os.replace(temporary[0], single)  # readers prefer the single file: this is the moment it counts
        for path in (index, *old):
            path.unlink(missing_ok=True)
        return [single.name]
    count = len(temporary)
    names = [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    if any((folder / n).exists() for n in names):
        # The old index may name these files, so the new shards need other names until the index is replaced.
        mark = secrets.token_hex(4)
        names = [n.replace(f"{stem}-", f"{stem}-{mark}-", 1) for n in names]
    for i, name in enumerate(names):
        os.replace(temporary[i], folder / name)
        temporary[i] = folder / name  # goes too if anything fails before the index names it
    table = {"metadata": {"total_size": total}, "weight_map": {n: names[i] for n, i in where.items()}}
    files.write(index, json.dumps(table, indent=2).encode())
    temporary.clear()
    single.unlink(missing_ok=True)
    for path in old:
        if path.name not in names:
            path.unlink(missing_ok=True)
    return [*names, index.name]


def _shards_of(index):
    if not index.is_file():
        return []
    try:
        return sorted(set(_read_index(index).values()))
    except UserError:
        return []
