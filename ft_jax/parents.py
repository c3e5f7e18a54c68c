"""What finished runs learnt, for methods that start from it: ``meteora(runs=FOLDER:FOLDER)`` (`registry.Parents`).

A run that starts so keeps what it took in its own ``start.safetensors``; the runs that it names may then go.
"""

import json
import pathlib

import jax
import numpy as np

from ft_jax import recipe, registry, tree
from ft_jax.errors import UserError, nearest
from ft_jax.io import files, runs
from ft_jax.kernels import is_kernel
from ft_jax.taps import Tap

BODY = ("embed/", "layers/", "norm/")  # a base without its heads, which runs of one base may have of several kinds


def gather(wanted, base, spec, params):
    """``{path/field: array}`` for ``wanted {path: (method, runs)}`` of `kernels.inherits` and `taps.inherits`.

    base: the `recipe.Base` that ``spec``, a config's ``model``, names; params: the tree or shapes before anything is attached.
    Raises UserError, by run and path, for a run that is missing, unfinished, of another base or of another method.
    """
    found = {}
    for path, (name, text) in wanted.items():
        folders = [part for part in text.split(":") if part]
        if not folders:
            raise UserError(f"{path}: {name} starts from finished runs and names none; write {name}(runs=FOLDER), several as FOLDER:FOLDER")
        for folder in folders:
            if folder not in found:
                found[folder] = _open(folder, base, spec)
    shapes, out = {p: x.shape for p, x in tree.flatten(params).items()}, {}
    for path, (name, text) in wanted.items():
        parents = registry.get("tap" if "/taps/" in path else "kernel", name).traits["parents"]
        leaves = [_leaf(folder, *found[folder], path, name, parents, shapes) for folder in text.split(":") if folder]
        try:
            made = parents.make(leaves)
        except UserError as error:
            raise UserError(f"{path}: {name}: {error}") from None
        out |= {f"{path}/{field}": np.asarray(array) for field, array in made.items()}
    return out


def _open(folder, base, spec):
    """(its leaves by path, its base's) of a finished run of this base."""
    path = pathlib.Path(folder)
    if not (path / "config.json").is_file():
        raise UserError(f"runs: {folder} holds no run (no config.json){nearest(path.name, _siblings(path))}")
    if not (path / "DONE").is_file():
        raise UserError(f"runs: {folder} is not finished; train it to its end first")
    own = files.read_json(path / "config.json")["model"]
    try:
        loaded = base if _loads(own) == _loads(spec) else recipe.load(own, jax.random.key(0))
        _, params, _ = runs.load_run(path, base=loaded)
    except UserError as error:
        raise UserError(f"runs: {folder}: {error}") from None
    if loaded is not base and _body(loaded) != _body(base):
        raise UserError(f"runs: {folder} was trained on {own['path']!r}, which is another base than {spec['path']!r}")
    return tree.flatten(params, is_leaf=lambda x: is_kernel(x) or isinstance(x, Tap)), tree.flatten(loaded.params)


def _siblings(path):
    return [p.name for p in path.parent.iterdir() if (p / "config.json").is_file()] if path.parent.is_dir() else []


def _loads(spec):
    """What decides how a base is loaded, as text."""
    return json.dumps({key: spec.get(key) or None for key in ("path", "head", "num_labels", "label_ids", "dtype", "remat")})


def _body(base):
    return tree.fingerprint({p: x for p, x in tree.flatten(base.params).items() if p.startswith(BODY)})


def _leaf(folder, leaves, base, path, name, parents, shapes):
    """The kernel or tap of a run at ``path``; what is under another kernel here (``…/base``) stood alone there."""
    path = path.split("/base")[0]
    leaf = leaves.get(path)
    if not isinstance(leaf, parents.type):
        held = "nothing" if leaf is None else f"a {type(leaf).__name__}" if is_kernel(leaf) or isinstance(leaf, Tap) else "a plain array"
        raise UserError(f"runs: {folder} has {held} at {path}; {name} takes what {parents.by} trained")
    if isinstance(leaf, Tap):
        _check_stack(folder, path, jax.tree.leaves(leaf)[0].shape[0], shapes["layers/attn/q/kernel"][0])
        return leaf
    _check_stack(folder, path, leaf.shape, shapes[path])
    plain = base.get(path.replace("frozen_layers/", "layers/"))
    if plain is not None and path.startswith(("layers/", "frozen_layers/")):
        plain = plain[: leaf.shape[0]] if path.startswith("frozen") else plain[-leaf.shape[0] :]
    if is_kernel(leaf.base) or plain is None or not np.array_equal(leaf.base, plain):
        raise UserError(f"runs: {folder}: {path} stands around something else than the base's own matrix, so that it cannot be "
                        "taken alone; train it by a method that keeps the matrix, such as lora")
    return leaf


def _check_stack(folder, path, there, here):
    if there != here:
        raise UserError(f"runs: {folder}: {path} is of {there} there and of {here} here; set method.freeze_layers alike")
