"""A base checkpoint as a PEFT adapter changes it, one tensor at a time: W0 + scale · B A, and the modules saved whole."""

import hashlib
import pathlib

import numpy as np

from ft_jax.errors import UserError, nearest
from ft_jax.io import peft
from ft_jax.io.safetensors import Checkpoint

_WRAPPERS = 2  # components that a task model may put before the names of the bare one, as in "bert." or "base.model."


def is_adapter(folder):
    """Whether a folder holds a PEFT adapter and no model."""
    folder = pathlib.Path(folder)
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


class Adapted:
    """The folders of a base model and of an adapter, where one of a tuned model is expected."""

    def __init__(self, base, folder):
        self.base, self.folder = pathlib.Path(base), pathlib.Path(folder)

    def __str__(self):
        return f"{self.base} with the adapter {self.folder}"

    def checkpoint(self):
        """The ``AdaptedCheckpoint``; UserError for an adapter of another kind or another base, no tensor read."""
        return AdaptedCheckpoint(self.base, self.folder)

    def config_digest(self):
        """SHA-256 of adapter_config.json: the scale is in it."""
        return hashlib.sha256((self.folder / "adapter_config.json").read_bytes()).hexdigest()


class AdaptedCheckpoint:
    """Reads like a ``Checkpoint`` of the merged model, under the base's names; a matrix is merged when it is read.

    ``modules``: ``{tensor of the base: the adapter's module}``.
    """

    def __init__(self, base, folder):
        self._base, self.adapter = Checkpoint(base), peft.open_adapter(folder, plain=True)
        self.path = self.adapter.checkpoint.path
        self.modules = {}
        for module in self.adapter.factors:
            name = _name_of(module + ".weight", self._base.names)
            if name is None:
                known = [n.removesuffix(".weight") for n in self._base.names]
                raise UserError(f"{self.path}: the base {base} has no module {module!r}{nearest(module, known)}")
            peft.check_factors(self.adapter, module, self._base.shape(name))
            self.modules[name] = module
        whole = {_name_of(name, self._base.names) or name: key for name, key in self.adapter.whole.items()}
        self._whole = {name: key for name, key in whole.items() if name not in self.modules}

    @property
    def names(self):
        return sorted({*self._base.names, *self._whole})

    def _holder(self, name):
        return (self.adapter.checkpoint, self._whole[name]) if name in self._whole else (self._base, name)

    def shape(self, name):
        checkpoint, held = self._holder(name)
        return checkpoint.shape(held)

    def dtype(self, name):
        checkpoint, held = self._holder(name)
        return checkpoint.dtype(held)

    def read(self, name):
        """One tensor, float32, with its change."""
        checkpoint, held = self._holder(name)
        array = checkpoint.read(held)
        if name in self.modules:
            a, b, scale = self.factors(name)
            array = array + np.float32(scale) * (b @ a)
        return array

    def keys(self, name):
        """Where a tensor's change is stored in the adapter: ``{"A": key, "B": key}``, or ``{"whole": key}``."""
        return {"whole": self._whole[name]} if name in self._whole else self.adapter.factors[self.modules[name]]

    def factors(self, name):
        """``(A [r, in], B [out, r], scale)`` of a tensor in ``modules``."""
        return peft.read_factors(self.adapter, self.modules[name], self._base.shape(name))


def _name_of(name, held):
    """The base's name for a tensor that the adapter names with or without a task model's prefix; None if there is none."""
    parts = name.split(".")
    shorter = (".".join(parts[i:]) for i in range(_WRAPPERS + 1) if len(parts) > i + 1)
    found = next((n for n in shorter if n in held), None)
    if found is None:
        longer = [n for n in held if n.endswith("." + name) and n.count(".") - name.count(".") <= _WRAPPERS]
        found = longer[0] if len(longer) == 1 else None
    return found
