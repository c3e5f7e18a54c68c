"""A checkpoint copied with some of its tensors replaced: every other byte, and every other file, stays as it was."""

import contextlib
import json
import os
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np

from ft_jax.errors import UserError
from ft_jax.io import files

KINDS = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}


@contextlib.contextmanager
def copied(checkpoint, folder, others=()):
    """Copies a `safetensors.Checkpoint`'s files and ``others`` into ``folder``; yields ``write(name, array)``.

    ``write`` puts a float32 array in the place of a tensor, in the kind that the tensor has, and returns what was stored
    as float32; UserError where that kind cannot hold it. One tensor is in memory at a time. The files take their names,
    the tensors' last, when the block ends well; safetensors files that lay there and are not among them then go.
    """
    folder = files.make_folder(folder)
    sources = list(dict.fromkeys([*map(pathlib.Path, others), *reversed(checkpoint.files)]))
    places = {source: files.temporary_name(folder / source.name) for source in sources}
    layouts = {}

    def write(name, array):
        source = checkpoint.file(name)
        if source not in layouts:
            layouts[source] = _layout(source)
        offset, kind, shape = layouts[source][name]
        if tuple(shape) != array.shape:
            raise ValueError(f"{name} is {shape} in {source} and {array.shape} here")
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(array, np.float32).astype(KINDS[kind])
        if not np.isfinite(np.asarray(stored, np.float32)).all():
            raise UserError(f"{source}: {name} is stored as {kind}, which cannot hold its new values")
        with open(places[source], "r+b") as file:
            file.seek(offset)
            file.write(stored.tobytes())
        return np.asarray(stored, np.float32)

    try:
        for source, place in places.items():
            shutil.copyfile(source, place)
        yield write
        for source, place in places.items():
            os.replace(place, folder / source.name)
        kept = {source.name for source in sources}
        for name in files.entries(folder):
            if name.endswith((".safetensors", ".safetensors.index.json")) and name not in kept:
                (folder / name).unlink()
    finally:
        for place in places.values():
            place.unlink(missing_ok=True)


def _layout(path):
    """``{tensor: (first byte, kind, shape)}`` of a safetensors file."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    return {name: (8 + size + row["data_offsets"][0], row["dtype"], row["shape"])
            for name, row in header.items() if name != "__metadata__"}  # fmt: skip

