"""Every method by kind and name; a method is one function plus one decorator."""

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Callable

from ft_jax.errors import UserError, nearest

KINDS = {
    "kernel": "(w, rng, **hp) -> Kernel",
    "tap": "(site, shape, rng, **hp) -> Tap",
    "mask": "(params, step, **hp) -> tree of bool, of arrays or of row indices",
    "update": "(**hp) -> optax.GradientTransformation",
    "objective": "(apply, params, batch, rng) -> (loss, metrics)",
    "selector": "(scores or features, budget) -> indices or weights",
    "merge": "(base, [tuned], **hp) -> params",
    "edit": "(params, requests, **hp) -> params",
    "decode": "(logits of one or more models, state) -> logits",
    "analysis": "(base, tuned, **hp) -> {name: array}",
}

# What the contract test of a kind has to know of a method and cannot see: trait -> default, given to ``register``.
TRAITS = {
    "kernel": {
        "start": "exact",  # W bit for bit; "rounded": up to float32's rounding; "moved": another matrix
        "plain": False,  # takes a matrix apart and cannot stand around another kernel
        "needs": (),  # keyword arguments that are data, such as covariances; such a method makes a `LowRank`
        "finish": None,  # ({path: kernel}, data, **hp) -> the same, for what all matrices of a rule share
        "fit": {},  # hyper-parameters that fit a 24x16 matrix, where the defaults do not
        "flops": 0.75,  # the compiled step's share of that of full fine-tuning stays below this
    },
    "tap": {
        "sites": "",  # where the method goes by its name alone: a regex over sites; without one, method.taps has to say
        "start": "exact",  # the identity bit for bit; "near": but for small numbers drawn at random; "moved": another function
        "needs": (),  # keyword arguments that `taps.attach` fills in: "config" of the model, "widths" of the sites, "table" of tokens
        "fit": {},  # hyper-parameters that fit the tiny models of the tests, where the defaults do not
    },
    "mask": {"gate": False},  # picks within the leaves that train (ft_jax/masks), and is no tree of bool
    "objective": {
        "data": "",  # as what its examples are encoded (`data.pipeline.OBJECTIVES`), where not under its own name
        "needs": (),  # data settings that it asks for, and that no other objective takes
    },
    "update": {"whole": False},  # sees the tree as a whole: no mask that draws layers anew goes with it
}

_PLAIN = (bool, int, float, str)


@dataclasses.dataclass(frozen=True)
class Method:
    kind: str
    name: str
    fn: Callable
    paper: str
    traits: dict = dataclasses.field(default_factory=dict, compare=False)

    @property
    def summary(self):
        return inspect.getdoc(self.fn).splitlines()[0]

    @property
    def hyperparameters(self):
        """Keyword-only parameters and their defaults: what a config may set."""
        return {
            p.name: p.default
            for p in inspect.signature(self.fn).parameters.values()
            if p.kind is inspect.Parameter.KEYWORD_ONLY
        }


_METHODS: dict[tuple[str, str], Method] = {}


def register(kind, name, *, paper, **traits):
    """Enters a function under ``kind`` and ``name``; traits: see ``TRAITS``.

    Duplicates, unknown kinds or traits and missing docstrings raise ValueError.
    """

    def enter(fn):
        if kind not in KINDS:
            raise ValueError(f"unknown kind {kind!r} for {name!r}{nearest(kind, KINDS)}")
        if (kind, name) in _METHODS:
            raise ValueError(
                f"{kind} {name!r} is registered twice: {_METHODS[kind, name].fn.__module__} and {fn.__module__}"
            )
        known = TRAITS.get(kind, {})
        for trait in traits:
            if trait not in known:
                raise ValueError(f"{kind} {name!r}: no trait {trait!r}{nearest(trait, known)}")
        if not inspect.getdoc(fn):
            raise ValueError(f"{kind} {name!r} has no docstring")
        _METHODS[kind, name] = Method(kind, name, fn, paper, known | traits)
        return fn

    return enter


def load_all():
    """Imports every module of the package, so that every method is registered."""
    import ft_jax

    for module in pkgutil.walk_packages(ft_jax.__path__, "ft_jax."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def methods(kind=None):
    """All methods (of one kind), sorted by kind and name."""
    load_all()
    return [m for (k, _), m in sorted(_METHODS.items()) if kind in (None, k)]


def get(kind, name):
    """The method registered under ``kind`` and ``name``; UserError names the nearest one otherwise."""
    if (kind, name) not in _METHODS:
        load_all()
    if (kind, name) not in _METHODS:
        raise UserError(f"no {kind} called {name!r}{nearest(name, [n for k, n in _METHODS if k == kind])}")
    return _METHODS[kind, name]


def call(kind, name, *args, **hp):
    """Calls a method after checking its hyper-parameters: names, and the type of numbers, booleans and words."""
    method = get(kind, name)
    for key, value in hp.items():
        if key not in method.hyperparameters:
            raise UserError(f"{kind} {name!r} has no parameter {key!r}{nearest(key, method.hyperparameters)}")
        default = method.hyperparameters[key]
        fits = type(value) is type(default) or (type(default), type(value)) == (float, int)
        if isinstance(value, _PLAIN) and isinstance(default, _PLAIN) and not fits:
            takes = f"{type(default).__name__}, such as {default!r}"
            raise UserError(f"{kind} {name!r}: {key} is {value!r}; it takes a value of type {takes}")
    return method.fn(*args, **hp)
