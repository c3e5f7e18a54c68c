"""Putting kernels into a tree by rules, and taking them out again."""

import re
import zlib

import jax

from ft_jax import registry, tree
from ft_jax.errors import UserError, nearest
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


def adapt(params, rules, rng):
    """Replaces leaves by kernels: ``rules`` is an ordered list of ``(regex over paths, "name(hp)")``.

    Rules are tried in order on every matrix leaf (``…/kernel``); the first full match decides, ``"none"``
    leaves the leaf alone. A leaf that already is a kernel gets the new one around it (kernels nest), and
    ``"outer(hp) @ inner(hp)"`` puts both there in one rule; the outer one draws what it would draw alone.
    Raises UserError for a rule that matches nothing, an unknown kernel or hyper-parameter, or an unfit leaf.
    """
    leaves = tree.flatten(params, is_leaf=is_kernel)
    chosen = tree.match(rules, leaves, what="kernel rule", default="none")

    def replace(path, leaf):
        if chosen[path] == "none":
            return leaf
        if not path.endswith("/kernel") or len(leaf.shape) < 2:
            matrices = [p for p in leaves if p.endswith("/kernel")]
            raise UserError(f"{path} (shape {leaf.shape}) is not a matrix that takes a kernel{nearest(path, matrices)}")
        try:
            return _wrap(leaf, chosen[path], jax.random.fold_in(rng, zlib.crc32(path.encode())))
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    return tree.map_with_path(replace, params, is_leaf=is_kernel)


def _wrap(leaf, rule, rng):
    name, hp = parse_rule(rule)
    inner = hp.pop("@", None)
    if inner is not None:
        leaf = _wrap(leaf, inner, jax.random.fold_in(rng, 1))
    return registry.call("kernel", name, leaf, rng, **hp)


def merge(params):
    """Every kernel as the plain float32 array it stands for; UserError that names a leaf which stands for none."""

    def plain(path, leaf):
        try:
            return dense(leaf)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    return tree.map_with_path(plain, params, is_leaf=is_kernel)
