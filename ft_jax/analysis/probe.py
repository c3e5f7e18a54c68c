"""Linear probes: what a linear map can still read off the activations of a layer (arXiv:2311.12786, appendix D).

Shapes: features ``[..., examples, d]``, the leading axes being layers (or runs) with a probe of their own each.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ft_jax.errors import UserError

SITES = ("embed", "block_out")  # the residual stream before the first layer and after each
FLOOR = 1e-6  # of the largest variance: directions with less are noise, not features


@struct.dataclass
class Probe:
    """softmax((x − mean) W + b): mean ``[..., d]``, kernel ``[..., d, classes]``, bias ``[..., classes]``."""

    mean: jax.Array
    kernel: jax.Array
    bias: jax.Array

    def logits(self, features):
        return jnp.matmul(features - self.mean[..., None, :], self.kernel) + self.bias[..., None, :]


def residuals(apply, params, batches, place=-1):
    """The residual stream at one token of every example: ``[layers + 1, examples, d]`` float32, the embedding first.

    apply: ``(params, inputs, capture=sites) -> (output, {site: array})``, such as ``Model.apply``. place: index of the token.
    """
    run, found = _capture(apply, place), []
    for batch in batches:
        found.append(np.asarray(run(params, batch)))
    return np.concatenate(found, axis=1)


@functools.lru_cache(maxsize=8)
def _capture(apply, place):
    def run(params, batch):
        seen = apply(params, batch, capture=SITES)[1]
        return jnp.concatenate([seen["embed"][None], seen["block_out"]])[:, :, place].astype(jnp.float32)

    return jax.jit(run)


def fit(features, labels, classes, *, l2=1e-4, steps=200):
    """Multinomial logistic regression: min mean −log softmax(x W + b)_label + l2/2 ‖W‖², on whitened features.

    Whitening (directions under 1e-6 of the largest variance are damped) makes the problem well conditioned; Nesterov's
    method with the step 1/(1/2 + l2) then needs no tuning. Returns a `Probe` in the features' own coordinates.
    UserError for labels outside ``[0, classes)`` and for fewer than two examples.
    """
    features, labels = jnp.asarray(features, jnp.float32), np.asarray(labels)
    if features.ndim < 2 or features.shape[-2] != len(labels) or len(labels) < 2:
        raise UserError(f"features {features.shape} and {len(labels)} labels: a probe needs [..., examples, d], two examples or more")
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(f"labels from {labels.min()} to {labels.max()} do not fit {classes} classes")
    one = functools.partial(_fit, target=jax.nn.one_hot(labels, classes), l2=l2, steps=steps)
    for _ in features.shape[:-2]:
        one = jax.vmap(one)
    return one(features)


@functools.partial(jax.jit, static_argnames="steps")
def _fit(x, target, l2, steps):
    mean = x.mean(0)
    x = x - mean
    values, vectors = jnp.linalg.eigh(x.T @ x / len(x))
    white = vectors / jnp.sqrt(jnp.maximum(values, 0) + FLOOR * values[-1] + jnp.finfo(jnp.float32).tiny)
    z = x @ white
    step = 1 / (0.5 + l2)

    def loss(w):
        kernel, bias = w
        return -(target * jax.nn.log_softmax(z @ kernel + bias)).sum(-1).mean() + 0.5 * l2 * jnp.square(kernel).sum()

    def move(carry, i):
        now, ahead = carry
        new = jax.tree.map(lambda a, g: a - step * g, ahead, jax.grad(loss)(ahead))
        return (new, jax.tree.map(lambda n, o: n + i / (i + 3) * (n - o), new, now)), None

    start = (jnp.zeros((x.shape[1], target.shape[1])), jnp.zeros(target.shape[1]))
    (kernel, bias), _ = jax.lax.scan(move, (start, start), jnp.arange(steps, dtype=jnp.float32))[0]
    return Probe(mean, white @ kernel, bias)


def accuracy(probe, features, labels):
    """Share of examples whose largest logit is their label's: ``[...]`` over the leading axes of the features."""
    return np.asarray((probe.logits(jnp.asarray(features, jnp.float32)).argmax(-1) == jnp.asarray(labels)).mean(-1))


def probe(train, test, classes, **options):
    """Held-out accuracy ``[...]`` of probes fitted on ``train = (features, labels)`` and scored on ``test``."""
    return accuracy(fit(*train, classes, **options), *test)
