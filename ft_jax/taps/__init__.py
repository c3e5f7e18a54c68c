"""Taps: named places in the forward pass where an activation is moved, replaced or extended; and capture.

A tap is a typed pytree with ``__call__(x, *read)``; it lives in the tree at ``layers/taps/<site>`` (stacked over
layers and scanned with them) or ``taps/<site>`` for ``embed``, ``side`` and ``logits``, and where layers share it. Those that
extend the sequence live at ``taps/prompt`` and ``taps/prefix``, a pool of modulators at ``taps/pool``; `ft_jax.models.extend`
says what they give.
"""

import zlib

import jax
import jax.numpy as jnp
from flax import struct

from ft_jax import registry, tree
from ft_jax.errors import UserError, nearest
from ft_jax.kernels.adapt import check_start, parse_rule

__all__ = ["Affine", "Tap", "activations", "attach", "check_side", "inherits", "sites", "started"]

ABOVE = ("taps/side", "taps/logits", "head", "pooler", "mlm", "norm")  # what a gradient reaches without passing a layer


class Tap:
    """A function of one activation ``[..., features]`` with weights; ``trainable`` names the fields that train.

    ``reads`` names what else it is handed: sites of the same layer that passed before; ``after`` (at attn_out, ffn_out),
    what would follow without the tap, and ``then``, the function that makes it; at ``side`` embed, any site of all layers as
    ``[layers, …]``, and ``allowed``, who sees whom; at ``logits`` the ``words``, logits of the label words of all classes. A
    ``shared`` tap has no axis of layers: ``unfold()`` is the stacked tap that the layers run.
    """

    trainable: tuple[str, ...] = ()
    static: tuple[str, ...] = ()  # fields that are no arrays
    reads: tuple[str, ...] = ()
    shared = False
    term: str = ""  # the loss term ``penalty(*sees, real, tasks)``, for a class with a field ``weight`` (`objectives.terms`)
    sees: tuple[str, ...] = ()  # which activations of its layer that looks at
    domain: int | None = None  # the task whose rows alone count for the objective, where the others are for the term

    def check_tasks(self, tasks):
        """UserError where a term that goes by the rows' tasks cannot do with as many (0: the data have no task ids)."""

    def __call__(self, x, *read):
        raise TypeError(f"{type(self).__name__} lacks __call__")

    def unfold(self):
        raise TypeError(f"{type(self).__name__} lacks unfold")


@struct.dataclass
class Affine(Tap):
    """x ⊙ scale + shift; scale and shift ``[..., features]``."""

    scale: jax.Array
    shift: jax.Array

    trainable = ("scale", "shift")

    def __call__(self, x):
        return x * self.scale.astype(x.dtype) + self.shift.astype(x.dtype)


@registry.register("tap", "affine", paper="arXiv:2210.08823")
def affine(site, shape, rng):
    """SSF's tap: x ⊙ γ + β at a site, γ = 1 and β = 0 at the start (the identity; the paper draws γ~N(1,.02))."""
    del site, rng
    return Affine(jnp.ones(shape, jnp.float32), jnp.zeros(shape, jnp.float32))


def sites(rules):
    """``{site: "name(hp)"}``: where ordered rules put taps; the first rule that matches a site decides.

    A tap that extends the sequence has its own site and goes nowhere else. UserError for a rule that matches no site.
    """
    from ft_jax import models

    def places(rule):
        if rule == "none":
            return (*models.SITES, *models.EXTENSIONS)
        own = registry.get("tap", parse_rule(rule)[0]).traits["sites"]
        return (own,) if own in models.EXTENSIONS else models.SITES

    chosen = {}
    for pattern, rule in rules:
        found = tree.match([(pattern, rule)], places(rule), what="tap rule")
        chosen = {site: value for site, value in found.items() if value is not None} | chosen
    return {site: rule for site, rule in chosen.items() if rule != "none"}


def attach(model, params, rules, rng, start=None):
    """Adds taps by ordered rules ``(regex over sites, "name(hp)")``; ``"none"`` leaves a site alone.

    In a split stack the layers that train get taps, the frozen ones none. start: what `started` or
    `parents.gather` gave, for taps that start from finished runs. Raises UserError for a rule that matches no site,
    an unknown tap or hyper-parameter, a site that already has a tap or that cannot give what the tap reads.
    """
    from ft_jax import models

    if not rules:
        return params
    out = {**params, "layers": dict(params["layers"])}
    shapes = _feature_shapes(model, params)
    known = {"config": model.config, "widths": {site: shapes[site][-1] for site in models.SITES},
             "table": params["embed"]["tokens"]["embedding"]}  # fmt: skip
    for site, rule in sites(rules).items():
        name, hp = parse_rule(rule)
        if any(site in home.get("taps", {}) for home in (out, out["layers"])):
            raise UserError(f"site {site!r} already has a tap")
        method, key = registry.get("tap", name), jax.random.fold_in(rng, zlib.crc32(site.encode()))
        needs = {n: known[n] for n in method.traits["needs"]}
        if method.traits["parents"]:
            needs["start"] = check_start(name, {}, tree.below(start or {}, f"layers/taps/{site}"))
        if given := min(needs.keys() & hp.keys(), default=None):
            own = method.hyperparameters.keys() - needs.keys()
            raise UserError(f"tap {name!r} has no parameter {given!r}{nearest(given, own)}")
        tap = registry.call("tap", name, site, shapes[site], key, **hp, **needs)
        _check_reads(name, site, tap)
        home = out["layers"] if site in models.LAYER_SITES and not tap.shared else out
        home["taps"] = {**home.get("taps", {}), site: tap}
    return out


def _from_runs(rules):
    """``{path of the tap: (name, hyper-parameters, `Parents`)}`` of the taps that start from finished runs."""
    found = {f"layers/taps/{site}": parse_rule(rule) for site, rule in sites(rules).items()}
    traits = {path: registry.get("tap", name).traits["parents"] for path, (name, _) in found.items()}
    return {path: (*found[path], parents) for path, parents in traits.items() if parents}


def inherits(rules):
    """``{path of the tap: (name, runs)}`` of the taps that start from finished runs."""
    return {path: (name, str(hp.get("runs", ""))) for path, (name, hp, _) in _from_runs(rules).items()}


def started(params, rules):
    """``{path: array}``: the fields with which those taps began; `attach` makes them again from it."""
    leaves = tree.flatten(params)
    return {f"{path}/{field}": leaves[f"{path}/{field}"] for path, (*_, parents) in _from_runs(rules).items() for field in parents.fields}


def _check_reads(name, site, tap):
    from ft_jax.models import LAYER_SITES

    if site in LAYER_SITES:
        there = LAYER_SITES[: LAYER_SITES.index(site)] + (("after", "then") if site in ("attn_out", "ffn_out") else ())
    else:
        there = {"side": ("embed", *LAYER_SITES, "allowed"), "logits": ("words",)}.get(site, ())
    for wanted in tap.reads:
        if wanted not in there:
            raise UserError(f"tap {name!r} reads {wanted!r}, which has not passed at site {site!r}; "
                            f"there: {', '.join(there) or 'nothing'}")  # fmt: skip
    if tap.shared and site not in LAYER_SITES:
        raise UserError(f"tap {name!r} is shared by layers, and site {site!r} belongs to none{nearest(site, LAYER_SITES)}")


def check_side(params, mask):
    """UserError where a side network stands beside weights that train below it: its step has no backward pass there."""
    side = params.get("taps", {}).get("side")
    if side is None or not side.reads:
        return
    for path, trains in tree.flatten(mask).items():
        if trains and not path.startswith(tuple(f"{p}/" for p in ABOVE)):
            raise UserError(f"{path} trains below the side network at taps/side, which reads the layers as constants; "
                            "freeze it, or use one of the two methods")


def _feature_shapes(model, params):
    """Shape of a tap's weights per site: ``(layers in the trained stack, features)`` or ``(features,)``."""
    from ft_jax import models

    batch = {"input_ids": jax.ShapeDtypeStruct((1, 2), jnp.int32)}
    _, seen = jax.eval_shape(lambda p, b: model.apply(p, b, capture=models.SITES), params, batch)
    layers = jax.tree.leaves(params["layers"])[0].shape[0]
    shapes = {s: (layers, a.shape[-1]) if s in models.LAYER_SITES else (a.shape[-1],) for s, a in seen.items()}
    return shapes | {"prompt": shapes["embed"], "prefix": shapes["k"], "pool": shapes}


def activations(model, params, batches, sites):
    """Captures activations: yields ``{site: [layers, B, T, features]}`` (no layers axis for embed, logits) a batch."""
    run = jax.jit(lambda p, b: model.apply(p, b, capture=tuple(sites))[1])
    for batch in batches:
        yield run(params, batch)
