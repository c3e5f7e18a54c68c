"""From a recipe (base, head, method, seed) to a model, its parameters and what of them trains."""

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ft_jax import calibrate, kernels, masks, taps, tree
from ft_jax.errors import UserError, nearest
from ft_jax.io import hf
from ft_jax.models import DTYPES, Model


class Base(NamedTuple):
    """A base model as it was read: params, the paths of head leaves that were drawn, the fingerprint of the rest."""

    model: Model
    params: dict
    drawn: tuple[str, ...]
    fingerprint: str


def of_config(cfg):
    """The part of a train config that a checkpoint needs to be rebuilt: a JSON-able dict."""
    return {"model": dict(cfg["model"]), "method": dict(cfg["method"]), "seed": cfg["seed"]}


def check_base(path, found, expected):
    """UserError when the base has changed since a run was trained on it."""
    if found != expected:
        raise UserError(f"the base {path!r} is not the one this run was trained on "
                        f"(fingerprint {found[:12]}, expected {expected[:12]})")


@jax.jit
def _finite(leaves):
    return {path: jnp.isfinite(leaf).all() for path, leaf in leaves.items()}


def load(spec, rng):
    """The `Base` that the ``model`` group of a config names; ``rng`` draws the head leaves that its checkpoint lacks."""
    head = {key: spec.get(key) or None for key in ("head", "num_labels", "label_ids")}
    model, params = hf.load(spec["path"], **head, rng=rng, dtype=spec.get("dtype", "float32"),
                            remat=spec.get("remat", "none"))  # fmt: skip
    # A head drawn at random differs in the last bit between devices; the base's identity is what was read.
    drawn = tuple(hf.missing_head(spec["path"], **head))
    for path, finite in jax.device_get(_finite(tree.flatten(params))).items():
        if not finite:
            raise UserError(f"{spec['path']}: {path} holds NaN or infinity; fetch or save the model again")
    fingerprint = tree.fingerprint({p: x for p, x in tree.flatten(params).items() if p not in drawn})
    return Base(model, params, drawn, fingerprint)


@functools.lru_cache(maxsize=4)
def _draw(model, paths):
    return jax.jit(lambda rng: {p: x for p, x in tree.flatten(model.init(rng)).items() if p in paths})


def build(recipe, base=None, dry=False, *, gather=None, start=None):
    """Loads the base, or takes one that was loaded with any rng, and applies the method.

    gather: ``(needs, model, params) -> data`` of `calibrate.gather`, for kernels that start from data; start: what
    `started` gave when the run began, which makes them again without any data, and without the runs that a method starts from.
    Returns:
      (model, params, trainable mask, fingerprint of the base before anything was attached);
      with ``dry`` the params are shapes alone, and nothing is computed.
    Raises:
      UserError when the recipe carries a ``fingerprint`` and the base found is another one.
    """
    spec, method = recipe["model"], recipe["method"]
    base_key, *keys = jax.random.split(jax.random.key(recipe["seed"]), 3)
    if base is None:
        base = load(spec, base_key)
    elif base.drawn and not dry:
        fresh = _draw(base.model, base.drawn)(base_key)
        base = base._replace(params=tree.nest(tree.flatten(base.params) | fresh))
    check_base(spec["path"], base.fingerprint, recipe.get("fingerprint", base.fingerprint))

    rules = method.get("kernels") or ()

    def ready(params):
        params = _redraw(base.model, params, method.get("reinit_layers", 0), jax.random.fold_in(base_key, 1))
        return masks.split_layers(params, method.get("freeze_layers", 0))

    def attach(params, data):
        params = taps.attach(base.model, params, method.get("taps") or (), keys[0], start)
        return kernels.adapt(params, rules, keys[1], data, start)

    params = jax.eval_shape(ready, base.params) if dry else ready(base.params)
    needs, data = kernels.needs(params, rules), {}
    if needs and gather and not start:
        data = calibrate.shapes(needs, params) if dry else gather(needs, base.model, params)
    wanted = kernels.inherits(params, rules) | taps.inherits(method.get("taps") or ())
    if wanted and not start:
        from ft_jax import parents  # which reads runs, and they their recipes

        start = parents.gather(wanted, base, spec, params)
    params = jax.eval_shape(attach, params, data) if dry else attach(params, data)
    mask = _mask(base, params, spec, method)
    taps.check_side(params, mask)
    return base.model, params, mask, base.fingerprint


def stored(params, mask, dtype):
    """The tree as a step holds it: frozen matrices and embeddings in ``dtype``; small leaves, and what trains, as they are."""
    if dtype not in DTYPES:
        raise UserError(f"model.frozen_dtype {dtype!r} is not supported{nearest(dtype, DTYPES)}")
    if dtype == "float32":
        return params
    trains = tree.flatten(mask)

    def cast(path, x):
        frozen = not trains[path] and x.dtype == jnp.float32 and re.fullmatch(r".*/(kernel|base|embedding)", path)
        return x if not frozen else jax.ShapeDtypeStruct(x.shape, DTYPES[dtype]) if isinstance(x, jax.ShapeDtypeStruct) else x.astype(DTYPES[dtype])

    return tree.map_with_path(cast, params)


def started(params, method):
    """``{path: array}``: what kernels and taps began with that started from data or finished runs, for ``build``'s start."""
    return kernels.started(params, method.get("kernels") or ()) | taps.started(params, method.get("taps") or ())


def _redraw(model, params, layers, rng):
    """Draws the top ``layers`` anew, and a pooler with them, as before pre-training (arXiv:2006.05987)."""
    total = jax.tree.leaves(params["layers"])[0].shape[0]
    if layers > total:
        raise UserError(f"method.reinit_layers is {layers}, and the model has {total} layers")
    if not layers:
        return params
    fresh = model.init(rng)
    top = jax.tree.map(lambda x, new: jnp.concatenate([x[: total - layers], new[total - layers :]]),
                       params["layers"], fresh["layers"])  # fmt: skip
    return {**params, "layers": top} | {k: fresh[k] for k in ("pooler",) if k in params}


def _mask(base, params, spec, method):
    text, rules, drawn = method.get("mask", "rules"), method.get("trainable") or (), base.drawn
    added = jax.tree.leaves(masks.declared(params, 0))
    if text == "rules" and not rules and any(added) and base.model.config.weights_head == "lm":
        text = "declared"  # a language model's head is no task's: it stays as it was pretrained, as in PEFT
    mask = masks.whole(params, text, rules)
    if any(added) and not any(m and a for m, a in zip(jax.tree.leaves(mask), added, strict=True)):
        raise UserError(f"nothing of the method's kernels and taps trains: mask {text!r} with the rules {list(rules)} "
                        "freezes all that they add; two methods want the same leaves")
    if not any(jax.tree.leaves(mask)):
        what = f"the rules {list(rules)} leave" if text == "rules" else f"mask {text!r} leaves"
        raise UserError(f"nothing trains: {what} every leaf of {spec['path']!r} frozen")
    if drawn and not any(trains for p, trains in tree.flatten(mask).items() if p in drawn):
        raise UserError(f"{spec['path']!r} has no weights for {', '.join(drawn)}, and the rules {method.get('trainable')} keep "
                        "them frozen as they were drawn at random; let them train, or take a base that has them")
    return mask
