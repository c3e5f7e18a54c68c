"""What the tables of PEFT's kinds of adapter are made of: a row, one matrix of a file, and how config fields are read and written."""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ft_jax.errors import UserError
from ft_jax.kernels import Kernel
from ft_jax.kernels.orthogonal import coefficients

FIXED = {"bias": "none", "fan_in_fan_out": False}  # config fields that are honoured at these values alone


class Part(NamedTuple):
    """One adapted matrix of a file: its module's name, stored shape ``(out, in)``, tensors by suffix, the file's config and
    shared tensors, and the base's own matrix, stored alike."""

    module: str
    shape: tuple[int, int]
    tensors: dict
    config: dict
    shared: dict
    base: Callable[[], np.ndarray] | None = None


class Kind(NamedTuple):
    """One kind of adapter."""

    peft_type: str
    kernels: tuple[type[Kernel], ...]
    tensors: tuple[str, ...]  # suffixes of a module's tensors; those with a ? may be absent
    read: Callable  # Part -> (kernel class, its fields for that matrix)
    write: Callable  # {module: kernel of one matrix} -> ({module: {suffix: array}}, shared tensors, config fields)
    unsupported: tuple[str, ...] = ()  # config fields that change the maths in ways that the kernels do not have
    shared: tuple[str, ...] = ()  # tensors that all modules share
    numbers: tuple[str, ...] = ()  # config fields that have to be numbers
    fixed: tuple[str, ...] = ("bias", "fan_in_fan_out")  # which of FIXED its config has
    on_bias: Callable | None = None  # Part, the bias of its module -> the bias, for a kind whose tensors change that too
    # Kinds without a kernel, which change plain leaves of the tree:
    holds: Callable | None = None  # checkpoint name of a changed tensor -> whether it is one of this kind's
    leaf: str = "weight"  # which tensor of a module is changed
    patch: Callable | None = None  # Part, that tensor of the base -> the tensor; None: it is stored whole
    unpatch: Callable | None = None  # {module: (before, after)} -> as ``write``, without shared tensors


def is_norm(name):
    """Whether a tensor of a checkpoint is a norm's."""
    return "norm" in name.lower().split(".")[-2]


def module_to_save(name):
    """The module of a tensor that is stored whole: PEFT takes a classifier as one, however many layers it has."""
    return "classifier" if name.startswith("classifier.") else name.rpartition(".")[0]


def pattern(config, field, module, default):
    """A config value that ``rank_pattern`` or ``alpha_pattern`` may change for a module."""
    for regex, value in (config.get(field) or {}).items():
        try:
            if re.fullmatch(rf"(.*\.)?({regex})", module):
                return value
        except re.error as error:
            raise UserError(f"{field} {regex!r} is not a regular expression: {error}") from None
    return default


def scale_of(config, module, rank):
    """alpha / rank, or alpha / √rank for rsLoRA, as the config has it for a module; UserError for a bad pattern."""
    alpha = pattern(config, "alpha_pattern", module, config.get("lora_alpha", config.get("alpha")))
    if type(alpha) not in (int, float) or not abs(scale := alpha / rank ** (0.5 if config.get("use_rslora") else 1.0)) < np.finfo(np.float32).max:
        raise UserError(f"{module}: alpha is {alpha!r}, of which and rank {rank} no scale can be made")
    return np.float32(scale)


def series_of(config):
    """The coefficients of a config's Cayley-Neumann series; UserError for one that holds no rotation."""
    terms = config.get("num_cayley_neumann_terms", 5)
    if not isinstance(terms, int) or terms < 2:
        raise UserError(f"num_cayley_neumann_terms is {terms!r}; a series has at least 2 terms")
    return coefficients(4 if terms == 3 else terms)  # PEFT's loop runs once more than 3 says


def terms_of(found, value):
    """How many terms the matrices' series have, 0 for the exact transform; UserError for 3, which PEFT cannot say."""
    terms = same(found, "the series", value)
    if terms == 3:
        raise UserError(f"{next(iter(found))}: a series of 3 terms, which PEFT does not have; 2 and 4 it has")
    return terms


def most_common(values):
    """The value that most modules have, and ``{module: value}`` of the others."""
    held = list(values.values())
    usual = max(held, key=held.count)
    return usual, {m: v for m, v in values.items() if v != usual}


def whole_number(x):
    """The whole number a float32 product stands for, where it does."""
    return round(x) if abs(x - round(x)) < 1e-5 * max(1.0, abs(x)) else x


def alphas(found, rank_of, field, power=1.0):
    """rank, alpha and their patterns."""
    ranks = {m: rank_of(k) for m, k in found.items()}
    alphas = {m: whole_number(float(k.scale) * ranks[m] ** power) for m, k in found.items()}
    (rank, other_ranks), (alpha, other_alphas) = most_common(ranks), most_common(alphas)
    return {"r": rank, field: alpha, "rank_pattern": other_ranks, "alpha_pattern": other_alphas}


def same(found, what, value):
    """What all matrices have to share in PEFT's config."""
    usual, others = most_common({m: value(k) for m, k in found.items()})
    if others:
        module, other = next(iter(others.items()))
        raise UserError(f"{module}: {what} is {other} and {usual} for other matrices; PEFT's config holds one for all")
    return usual
