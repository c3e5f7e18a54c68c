"""From a recipe (base, head, method, seed) to a model, its parameters and what of them trains."""

import jax
import jax.numpy as jnp

from ft_jax import kernels, masks, registry, taps, tree
from ft_jax.errors import UserError
from ft_jax.io import hf


def of_config(cfg):
    """The part of a train config that a checkpoint needs to be rebuilt: a JSON-able dict."""
    return {"model": dict(cfg["model"]), "method": dict(cfg["method"]), "seed": cfg["seed"]}


def check_base(path, found, expected):
    """UserError when the base has changed since a run was trained on it."""
    if found != expected:
        raise UserError(f"the base {path!r} is not the one this run was trained on "
                        f"(fingerprint {found[:12]}, expected {expected[:12]})")


def build(recipe):
    """Loads the base and applies the method.

    Returns:
      (model, params, trainable mask, fingerprint of the base before anything was attached).
    Raises:
      UserError when the recipe carries a ``fingerprint`` and the base found is another one.
    """
    spec, method, seed = recipe["model"], recipe["method"], recipe["seed"]
    base_key, tap_key, kernel_key = jax.random.split(jax.random.key(seed), 3)
    head = {"head": spec.get("head") or None, "num_labels": spec.get("num_labels") or None}
    model, params = hf.load(spec["path"], **head, rng=base_key, dtype=spec.get("dtype", "float32"),
                            remat=spec.get("remat", "none"))  # fmt: skip
    # A head drawn at random differs in the last bit between devices; the base's identity is what was read.
    drawn = hf.missing_head(spec["path"], **head)
    for path, leaf in tree.flatten(params).items():
        if not bool(jnp.isfinite(leaf).all()):
            raise UserError(f"{spec['path']}: {path} holds NaN or infinity; fetch or save the model again")
    fingerprint = tree.fingerprint({p: x for p, x in tree.flatten(params).items() if p not in drawn})
    check_base(spec["path"], fingerprint, recipe.get("fingerprint", fingerprint))
    params = masks.split_layers(params, method.get("freeze_layers", 0))
    params = taps.attach(model, params, method.get("taps") or (), tap_key)
    params = kernels.adapt(params, method.get("kernels") or (), kernel_key)
    hp = {"trainable": method["trainable"]} if method.get("trainable") else {}
    mask = registry.call("mask", method.get("mask", "rules"), params, 0, **hp)
    if not any(jax.tree.leaves(mask)):
        raise UserError(f"nothing trains: the rules {method.get('trainable')} leave every leaf frozen")
    if drawn and not any(trains for p, trains in tree.flatten(mask).items() if p in drawn):
        raise UserError(f"{spec['path']!r} has no weights for {', '.join(drawn)}, and the rules {method.get('trainable')} keep "
                        "them frozen as they were drawn at random; let them train, or take a base that has them")
    return model, params, mask, fingerprint
