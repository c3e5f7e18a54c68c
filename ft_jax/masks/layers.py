"""Gates over a layer's matrices: layers or halves of them drawn anew every period, and modules chosen by scores."""

import jax
import jax.numpy as jnp
import numpy as np

from ft_jax import tree
from ft_jax.errors import UserError, nearest
from ft_jax.masks.weights import TASK, key_of, scores_of
from ft_jax.registry import register

# The order in which a layer's modules meet the data.
ORDER = ("attn/q", "attn/k", "attn/v", "attn/q_norm", "attn/k_norm", "attn/out", "attn_norm",
         "mlp/gate", "mlp/up", "mlp/down", "mlp_norm")  # fmt: skip


def module_of(path):
    """``layers/attn/q`` for the leaves of a matrix, kernel and bias; ``layers/attn_norm`` for those of a norm."""
    parts = path.split("/")
    return "/".join(parts[: 3 if parts[1] in ("attn", "mlp", "taps") else 2])


def _layers(trainable, name):
    """(number of layers, paths below layers/); UserError where no layer trains."""
    found = {p: x for p, x in tree.flatten(trainable).items() if p.startswith("layers/")}
    if not found:
        raise UserError(f"mask {name!r} picks among layers, and no layer trains here")
    return next(iter(found.values())).shape[0], list(found)


def _by_module(trainable, on):
    """The gate tree of ``{module: bool [layers]}``; everything outside the layers stays on."""
    return tree.map_with_path(lambda p, _: on[module_of(p)] if p.startswith("layers/") else True, trainable)


def _positive(name, **values):
    for key, value in values.items():
        if value < 1:
            raise UserError(f"mask {name!r}: {key} is {value}; it must be at least 1")


@register("mask", "lisa", paper="arXiv:2403.17919", gate=True)
def lisa(trainable, step, *, n=2, period=20, moments="wait", seed=0):
    """LISA: every ``period`` steps n layers drawn uniformly train; embeddings, head and what is no layer always do.

    moments: ``wait`` as in the published code (those of a layer that is off stay as they are, its step count too),
    or ``restart`` with every draw, for which optimiser state of n layers alone is held.
    """
    _positive("lisa", n=n, period=period)
    layers, _ = _layers(trainable, "lisa")
    if n > layers:
        raise UserError(f"mask 'lisa': n is {n}, and {layers} layers train")
    if moments not in ("wait", "restart"):
        raise UserError(f"mask 'lisa': moments is {moments!r}; it is 'wait' or 'restart'")
    rows = jnp.sort(jax.random.permutation(jax.random.fold_in(key_of(seed, "lisa"), step // period), layers)[:n])
    on = rows if moments == "restart" else jnp.zeros(layers, bool).at[rows].set(True)
    return tree.map_with_path(lambda p, _: on if p.startswith("layers/") else True, trainable)


@register("mask", "hft", paper="arXiv:2404.18466", gate=True)
def hft(trainable, step, *, period=200, seed=0):
    """Half fine-tuning: in each layer half of the attention's, of the MLP's and of the norms' modules, drawn each period.

    Of an odd number of modules half of the layers train one more than the others; a bias goes with its matrix.
    Embeddings, head and what is no layer train throughout; moments restart with every draw. No code was published: the
    grouping is read from the paper's text.
    """
    _positive("hft", period=period)
    layers, paths = _layers(trainable, "hft")
    groups = {}
    for module in dict.fromkeys(map(module_of, paths)):
        groups.setdefault("norm" if module.endswith("norm") else module.split("/")[1], []).append(module)
    on = {}
    for group, modules in groups.items():
        draw, extra = jax.random.split(jax.random.fold_in(key_of(seed, "hft/" + group), step // period))
        rank = jnp.argsort(jax.random.uniform(draw, (layers, len(modules))), axis=1).argsort(axis=1)
        count = (len(modules) + jax.random.permutation(extra, layers) % 2) // 2
        on |= {module: rank[:, i] < count for i, module in enumerate(modules)}
    return _by_module(trainable, on)


@register("mask", "only_layers", paper="arXiv:2301.12132", gate=True)
def only_layers(trainable, step, *, layers="all"):
    """AutoPEFT's choice of layers: those of ``layers`` train, counted from the lowest that trains: '0-2-5', all or none.

    Task heads and what is no layer train besides. Write numbers in quotes: a single one would be read as a number.
    """
    del step
    count, _ = _layers(trainable, "only_layers")
    named = {"all": range(count), "none": ()}
    chosen = named[layers] if layers in named else [int(x) if x.isdigit() else -1 for x in layers.split("-")]
    if any(not 0 <= x < count for x in chosen):
        raise UserError(f"mask 'only_layers': layers {layers!r} are not numbers from 0 to {count - 1} joined by '-', all or none")
    on = np.isin(np.arange(count), list(chosen))
    return tree.map_with_path(lambda p, _: on if p.startswith("layers/") else np.asarray(True), trainable)


def _module_scores(trainable, held, reduce):
    """``{(layer, module): reduce(scores of the module in the layer)}`` from arrays by path."""
    layers, paths = _layers(trainable, "scores")
    members = {}
    for path in paths:
        members.setdefault(module_of(path), []).append(held[path].reshape(layers, -1))
    joined = {module: np.concatenate(parts, axis=1) for module, parts in members.items()}
    return {(i, module): float(reduce(x[i].astype(np.float64))) for module, x in joined.items() for i in range(layers)}


def _picked(trainable, chosen):
    layers, paths = _layers(trainable, "scores")
    modules = set(map(module_of, paths))
    return _by_module(trainable, {m: np.asarray([(i, m) in chosen for i in range(layers)]) for m in modules})


@register("mask", "cofitune", paper="arXiv:2404.10306", gate=True)
def cofitune(trainable, step, *, modules="mlp", low=0.25, high=0.5):
    """CoFiTune's coarse level: ``modules`` (attn, mlp, or as mlp/up+mlp/down) of the layers from low · L up to high · L.

    All else is off but the task head. The paper finds module and range by a tree search over runs: `ft_jax.tree_search`.
    """
    del step
    layers, paths = _layers(trainable, "cofitune")
    known, chosen = {m.removeprefix("layers/") for m in map(module_of, paths)}, modules.split("+")
    for module in chosen:
        if not any(m == module or m.startswith(module + "/") for m in known):
            options = sorted(known | {m.split("/")[0] for m in known})
            raise UserError(f"mask 'cofitune': no module {module!r}{nearest(module, options)}")
    within = (np.arange(layers) >= low * layers) & (np.arange(layers) < high * layers)
    if not within.any():
        raise UserError(f"mask 'cofitune': no layer of {layers} lies from {low} up to {high} of them")

    def on(path):
        inner = path.removeprefix("layers/")
        if path.split("/")[0] in TASK:
            return True
        return within if path != inner and inner.startswith(tuple(f"{m}/" for m in chosen)) else np.asarray(False)

    return tree.map_with_path(lambda p, _: on(p), trainable)


@register("mask", "k_fpf", paper="arXiv:2304.04158", gate=True)
def k_fpf(trainable, step, *, modules=4, scores=""):
    """FPF's choice: the ``modules`` matrices (a layer's one each) that change most in a run, by mean |θ_run - θ_0|.

    No code was published: that the change is averaged over a module's entries is read from the paper's text.
    """
    del step
    _positive("k_fpf", modules=modules)
    found = _module_scores(trainable, scores_of(scores, "change", trainable), lambda x: np.abs(x).mean())
    if modules > len(found):
        raise UserError(f"mask 'k_fpf': modules is {modules}, and {len(found)} train")
    return _picked(trainable, set(sorted(found, key=found.get, reverse=True)[:modules]))


@register("mask", "greentrainer", paper="arXiv:2309.13192", gate=True)
def greentrainer(trainable, step, *, budget=0.5, scores="", levels=1000):
    """GreenTrainer: the modules of most importance Σ g² whose backward pass costs at most ``budget`` of the whole one.

    A module's importance is -Σ g · Δθ of one SGD step, Δθ = -η g; its gradient costs t_dw = 2 · in · out a token, and
    passing the error below it t_dy, the same; `select` solves for both. The task head trains besides. The budget is counted,
    not saved: a scan over layers computes all gradients of a stack and shuts some; ``method.freeze_layers`` has none below.
    """
    del step
    if not 0 < budget <= 1:
        raise UserError(f"mask 'greentrainer': budget is {budget}; it is a share of the backward pass above 0, up to 1")
    importance = _module_scores(trainable, scores_of(scores, "gradient", trainable), lambda g: np.square(g).sum())
    leaves = {p: x for p, x in tree.flatten(trainable).items() if p.startswith("layers/")}
    place = {f"layers/{name}": i for i, name in enumerate(ORDER)}
    if strange := [p for p in leaves if module_of(p) not in place or "/kernel/" in p]:
        raise UserError(f"mask 'greentrainer': the backward pass of {strange[0]} has no known cost; plain weights have")
    order = sorted(importance, key=lambda k: (k[0], place[k[1]]))
    cost = dict.fromkeys(place, 0)
    for path, x in leaves.items():
        cost[module_of(path)] += (2 if path.endswith("/kernel") else 1) * x[0].size
    t_dw = np.asarray([cost[m] for _, m in order], float)
    t_dy = np.asarray([cost[m] if "norm" not in m else 0 for _, m in order], float)
    chosen = select(t_dy, t_dw, np.asarray([importance[k] for k in order]), budget, levels)
    if not chosen.any():
        raise UserError(f"mask 'greentrainer': no module fits a budget of {budget} of the backward pass")
    return _picked(trainable, {k for k, take in zip(order, chosen, strict=True) if take})


def select(t_dy, t_dw, importance, budget, levels=1000):
    """GreenTrainer's tensors: bool [n] that maximises Σ importance under a budget of the backward pass.

    Tensors in forward order. A choice whose first tensor is k costs Σ_{i>k} t_dy[i] + Σ_chosen t_dw[i], at most
    ``budget`` of Σ t_dy + Σ t_dw; costs are rounded up to the ``levels``-th part of that, so none is overspent.
    Dynamic programming from the output down: best[c] is the most importance of tensors above k for c units of t_dw.
    """
    if budget >= 1:  # all of them; rounded up, their costs would not fit
        return np.ones(len(t_dw), bool)
    unit = (t_dy.sum() + t_dw.sum()) / levels
    limit = int(budget * levels + 1e-9)
    weights, n = np.ceil(t_dw / unit - 1e-9).astype(int), len(t_dw)
    best, taken = np.zeros(limit + 1), np.zeros((n, limit + 1), bool)
    found, first, room = 0.0, None, 0
    for k in reversed(range(n)):
        left = limit - int(np.ceil(t_dy[k + 1 :].sum() / unit - 1e-9)) - weights[k]
        if left >= 0 and importance[k] + best[left] > found:
            found, first, room = importance[k] + best[left], k, left
        if weights[k] <= limit:
            moved = np.concatenate([np.full(weights[k], -np.inf), best[: limit + 1 - weights[k]] + importance[k]])
            taken[k] = moved > best
            best = np.maximum(best, moved)
    chosen = np.zeros(n, bool)
    if first is None:
        return chosen
    chosen[first] = True
    for k in range(first + 1, n):
        if taken[k, room]:
            chosen[k], room = True, room - weights[k]
    return chosen
