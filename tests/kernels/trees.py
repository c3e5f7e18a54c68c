"""Trees with kernels for tests: any registered kernel on small random matrices, away from its start."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ft_jax import kernels, masks, registry
from tests.helpers import nudged

D_IN, D_OUT, LAYERS = 24, 16, 3


def matrix(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def inputs_of(w):
    """400 correlated activations for each matrix of ``w``, away from zero."""
    *stack, d_in, _ = w.shape
    return matrix(*stack, 400, d_in, seed=7) @ matrix(d_in, d_in, seed=8) + matrix(d_in, seed=9)


def covariance(w):
    """Second moments of those."""
    x = inputs_of(w)
    return jnp.swapaxes(x, -1, -2) @ x / 400


# What methods that start from finished runs are handed: those that trained in them, how many and how far.
PARENTS = {**dict.fromkeys(("mhr_z", "mhr_mu"), ("mhr(tasks=2, skills=3, splits=2, rank=4)", 1, 24)), "meteora": ("lora(rank=4)", 3, 7)}


def start_of(name, w):
    """``start`` of such a method around ``w``: kernels away from their start, in proportion to w."""
    text, count, size = PARENTS[name]
    runs = [moved(put({"w": {"kernel": w}}, text, seed=i), seed=i + 20, size=size / w.shape[-2])["w"]["kernel"] for i in range(count)]
    return trait(name, "parents").make(runs)


# What methods with the trait ``needs`` are handed.
DATA = {"covariance": covariance, "mean": lambda w: inputs_of(w).mean(-2), "gradient": lambda w: matrix(*w.shape, seed=10)}


def trait(name, which):
    return registry.get("kernel", name).traits[which]


def hyperparameters(name):
    """The method's defaults, changed to fit small matrices; data left out."""
    method = registry.get("kernel", name)
    return {k: v for k, v in (method.hyperparameters | method.traits["fit"]).items() if k not in (*method.traits["needs"], "start")}


def put(params, text, seed=0, fit=True):
    """``params`` with the kernel ``"name"`` or ``"name(hp)"`` on all matrices; a name alone gets values that fit, if ``fit``."""
    name, hp = kernels.parse_rule(text)
    if fit and not hp:
        text = "{}({})".format(name, ", ".join(f"{k}={v}" for k, v in trait(name, "fit").items()))
    made, needs = trait(name, "parents"), trait(name, "needs")
    if not needs and not made:
        return kernels.adapt(params, [(".*kernel", text)], jax.random.key(seed))
    _, hp = kernels.parse_rule(text)
    return jax.tree.map(
        lambda w: registry.call("kernel", name, w, jax.random.key(seed), **hp, **{n: DATA[n](w) for n in needs},
                                **({"start": start_of(name, w)} if made else {})),
        params, is_leaf=kernels.is_kernel,
    )  # fmt: skip


@functools.cache
def adapted(*names, shape=(D_IN, D_OUT), seed=0):
    """``{"w": {"kernel": …}}`` with one kernel after the other put around a random matrix."""
    params = {"w": {"kernel": matrix(*shape)}}
    for i, name in enumerate(names):
        params = put(params, name, seed + i)
    return params


def moved(params, seed=1, size=0.3):
    """The same tree with every trainable field away from its start."""
    mask = masks.declared(params, 0)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda m, x: nudged(x, size, rng) if m else x, mask, params)
