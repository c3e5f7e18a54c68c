"""Putting kernels into a tree by rules, and taking them out again."""

import re
import zlib

import jax

from ft_jax import registry, tree
from ft_jax.errors import UserError, nearest, one_line
from ft_jax.kernels import from_data
from ft_jax.kernels.base import dense, is_kernel


def parse_rule(text):
    """``"lora(rank=8, alpha=16)"`` -> ``("lora", {"rank": 8, "alpha": 16})``; numbers, booleans and words only.

    ``"lora(rank=8) @ nf4(block=64)"``, LoRA around an NF4 base, keeps the text of what is beneath under the key ``"@"``.
    """
    outer, below, inner = text.partition("@")
    found = re.fullmatch(r"\s*([\w+-]+)\s*(?:\((.*)\))?\s*", outer)
    if not found:
        raise UserError(f"cannot read the method {text!r}; write it as name(key=value, …), or outer(…) @ inner(…)")
    name, body = found.groups()
    hp = {}
    for part in filter(None, (p.strip() for p in (body or "").split(","))):
        key, sep, value = (p.strip() for p in part.partition("="))
        if not sep or not value:
            raise UserError(f"cannot read {part!r} in {text!r}; write it as key=value")
        hp[key] = _value(value)
    if below:
        parse_rule(inner)  # says here what is wrong with it
        hp["@"] = inner.strip()
    return name, hp


def _value(text):
    if text in ("True", "False", "true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text.strip("'\"")


def adapt(params, rules, rng, data=None, start=None):
    """Replaces leaves by kernels: ``rules`` is an ordered list of ``(regex over paths, "name(hp)")``.

    Rules are tried in order on every matrix leaf (``…/kernel``); the first full match decides, ``"none"``
    leaves the leaf alone. A leaf that already is a kernel gets the new one around it (kernels nest), and
    ``"outer(hp) @ inner(hp)"`` puts both there in one rule; the outer one draws what it would draw alone.
    data: ``{need: {path: array}}`` for kernels that start from data; start: what `started` gave of such kernels, in its place,
    or `parents.gather` of those that start from finished runs.
    Raises UserError for a rule that matches nothing, an unknown kernel or hyper-parameter, an unfit leaf, or no data.
    """
    leaves, data, start = tree.flatten(params, is_leaf=is_kernel), data or {}, start or {}
    chosen = tree.match(rules, leaves, what="kernel rule", default="none")

    def replace(path, leaf):
        if chosen[path] == "none":
            return leaf
        if not path.endswith("/kernel") or len(leaf.shape) < 2:
            matrices = [p for p in leaves if p.endswith("/kernel")]
            raise UserError(f"{path} (shape {leaf.shape}) is not a matrix that takes a kernel{nearest(path, matrices)}")
        own = {need: arrays[path] for need, arrays in data.items() if path in arrays}
        key = jax.random.fold_in(rng, zlib.crc32(path.encode()))
        return _told(path, _wrap, leaf, chosen[path], key, own, tree.below(start, path))

    out = tree.map_with_path(replace, params, is_leaf=is_kernel)
    return out if start and not data else _finished(out, chosen, data)


def _told(path, fn, *args):
    try:
        return fn(*args)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(f"{path}: the kernel takes more memory than there is ({one_line(error)[:100]})") from None


def _wrap(leaf, rule, rng, data, start):
    name, hp = parse_rule(rule)
    inner = hp.pop("@", None)
    if inner is not None:
        if _traits(parse_rule(inner)[0])["finish"]:
            raise UserError(f"{parse_rule(inner)[0]} shares ranks among its matrices and cannot stand under {name}")
        leaf = _wrap(leaf, inner, jax.random.fold_in(rng, 1), data, tree.below(start, "base"))
    needs, parents = _traits(name)["needs"], _traits(name)["parents"]
    if parents:
        own = {field: start[field] for field in parents.fields if field in start}
        return registry.call("kernel", name, leaf, rng, **hp, start=check_start(name, hp, own))
    for need in needs:
        if need in hp:
            raise UserError(f"{name}: its {need} comes from the training data and cannot be written in a config")
    if needs and "a" in start:
        return from_data.resume(leaf, *(start[field] for field in from_data.FIELDS))
    for need in needs:
        if need not in data:
            raise UserError(f"{name} starts from a {need}, and there is none for this matrix: a training run gathers it on "
                            "its data, for the layers' matrices alone")
    return registry.call("kernel", name, leaf, rng, **hp, **{need: data[need] for need in needs})


def check_start(name, hp, found):
    """``found``, the arrays from which a method starts that takes them from finished runs; UserError where there are none."""
    if "start" in hp:
        raise UserError(f"{name}: its start comes from finished runs and cannot be written in a config; name them in runs")
    if not found:
        raise UserError(f"{name} starts from finished runs and names none; write {name}(runs=FOLDER), several as FOLDER:FOLDER")
    return found


def _traits(name):
    return registry.get("kernel", name).traits


def _finished(params, chosen, data):
    """The tree after the trait ``finish`` of its rules' methods."""
    leaves = tree.flatten(params, is_leaf=is_kernel)
    for rule in dict.fromkeys(r for r in chosen.values() if r != "none"):
        name, hp = parse_rule(rule)
        hp.pop("@", None)
        if finish := _traits(name)["finish"]:
            leaves |= finish({p: leaves[p] for p, r in chosen.items() if r == rule}, data, **hp)
    return tree.map_with_path(lambda p, _: leaves[p], params, is_leaf=is_kernel)


def _chain(rule):
    """The names in a rule, outermost first."""
    name, hp = parse_rule(rule)
    return [name, *(_chain(hp["@"]) if "@" in hp else ())]


def needs(params, rules):
    """``{path: names of the data}`` of the leaves that ``rules`` give a kernel which starts from data."""
    chosen = tree.match(rules, tree.flatten(params, is_leaf=is_kernel), what="kernel rule", default="none")
    wanted = {p: {n for name in _chain(rule) for n in _traits(name)["needs"]} for p, rule in chosen.items() if rule != "none"}
    return {path: names for path, names in wanted.items() if names}


def inherits(params, rules):
    """``{path: (name, runs)}`` of the kernels that start from finished runs; one under another is at ``…/base``."""
    chosen, out = tree.match(rules, tree.flatten(params, is_leaf=is_kernel), what="kernel rule", default="none"), {}
    for path, rule in chosen.items():
        while rule not in (None, "none"):
            name, hp = parse_rule(rule)
            if _traits(name)["parents"]:
                out[path] = name, str(hp.get("runs", ""))
            path, rule = f"{path}/base", hp.get("@")
    return out


def started(params, rules):
    """``{path: array}``: the fields with which kernels began that started from data or runs; `adapt` makes them again from it."""
    chosen = tree.match(rules, tree.flatten(params, is_leaf=is_kernel), what="kernel rule", default="none")
    out = {}
    for path, leaf in tree.flatten(params, is_leaf=is_kernel).items():
        for name in _chain(chosen[path]) if chosen[path] != "none" else ():
            traits = _traits(name)
            fields = traits["parents"].fields if traits["parents"] else from_data.FIELDS if traits["needs"] else ()
            out |= {f"{path}/{field}": getattr(leaf, field) for field in fields}
            path, leaf = f"{path}/base", getattr(leaf, "base", None)
    return out


def merge(params):
    """Every kernel as the plain float32 array it stands for; UserError that names a leaf which stands for none."""

    return tree.map_with_path(lambda path, leaf: _told(path, dense, leaf), params, is_leaf=is_kernel)
