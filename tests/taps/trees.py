"""Tiny models with any registered tap that has sites of its own, at its start or away from it."""

import functools
import re

import jax
import numpy as np

from ft_jax import masks, registry, taps, tree
from ft_jax.models import LAYER_SITES, SITES
from tests.helpers import inputs, make_batch, make_model, make_params, nudged

FAMILIES = ("bert", "llama")


def method(name):
    return registry.get("tap", name)


def hyperparameters(name):
    """The method's defaults, changed to fit tiny models; what `attach` fills in left out."""
    found = method(name)
    return {k: v for k, v in (found.hyperparameters | found.traits["fit"]).items() if k not in (*found.traits["needs"], "start")}


def rule(name, **hp):
    """``(sites, "name(hp)")`` with values that fit."""
    values = method(name).traits["fit"] | hp
    return method(name).traits["sites"], f"{name}({', '.join(f'{k}={v}' for k, v in values.items())})"


def sites_of(name):
    return [s for s in SITES if re.fullmatch(method(name).traits["sites"], s)]


@functools.cache
def setting(family, head=None, rows=4):
    """(model, params, inputs) without a tap."""
    model = make_model(family, head)
    return model, make_params(model), inputs(make_batch(model, rows=rows, length=7))


PARENTS = {"mixda": ("mixda_domain", 2)}  # of a method that starts from finished runs: what trained in them, and how many


def attached(model, params, name, **hp):
    """``params`` with the method at its sites; what it takes from finished runs is away from its start."""
    (text, count), start = PARENTS.get(name, ("", 0)), {}
    runs = [moved(attached(model, params, text), seed=i + 5) for i in range(count)]
    for site in sites_of(name) if count else ():
        made = method(name).traits["parents"].make([tap_at(run, site) for run in runs])
        start |= {f"layers/taps/{site}/{field}": x for field, x in made.items()}
    return taps.attach(model, params, [rule(name, **hp)], jax.random.key(0), start)


@functools.cache
def tapped(name, family="bert", head=None, frozen=0, **hp):
    """The params of `setting` with the method at its sites, above ``frozen`` layers."""
    model, params, _ = setting(family, head)
    return attached(model, masks.split_layers(params, frozen), name, **hp)


def moved(params, size=0.2, seed=1):
    """The same tree with what taps train away from its start."""
    rng, mask = np.random.default_rng(seed), masks.declared(params, 0)
    return jax.tree.map(lambda m, x: nudged(x, size, rng) if m else x, mask, params)


def tap_at(params, site):
    homes = [params, params["layers"]] if site in LAYER_SITES else [params]
    return next(h["taps"][site] for h in homes if site in h.get("taps", {}))


def halves(params):
    """(what taps train, the rest)."""
    return tree.split(params, masks.declared(params, 0))
