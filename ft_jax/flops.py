"""FLOPs of a function, counted on its jaxpr: every matrix product, the body of a loop as often as it runs."""

import math

import jax
from jax.interpreters import partial_eval


def count(fn, *args):
    """FLOPs of the matrix products and convolutions of ``fn(*args)``; args may be shapes. A branch counts as its dearest one.

    What no output needs does not count: XLA drops it too (a custom gradient's products for a frozen weight).
    """
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    return _count(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])


def _count(jaxpr):
    return sum(_of(eqn) for eqn in jaxpr.eqns)


def _of(eqn):
    name = eqn.primitive.name
    if name == "dot_general":
        (contract, _), _ = eqn.params["dimension_numbers"]
        return 2 * eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[d] for d in contract)
    if name == "conv_general_dilated":
        kernel, features = eqn.invars[1].aval, eqn.params["dimension_numbers"].rhs_spec[0]
        return 2 * eqn.outvars[0].aval.size * kernel.size // kernel.shape[features]
    inner = [_count(getattr(sub, "jaxpr", sub)) for value in eqn.params.values() for sub in _jaxprs(value)]
    if name == "cond":
        return max(inner)
    return sum(inner) * (eqn.params["length"] if name == "scan" else 1)


def _jaxprs(value):
    values = value if isinstance(value, (tuple, list)) else (value,)
    return [v for v in values if hasattr(v, "eqns") or hasattr(getattr(v, "jaxpr", None), "eqns")]
