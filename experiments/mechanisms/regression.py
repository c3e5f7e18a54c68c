"""In-context linear regression: prompts, the optimal estimators, and a small transformer between two read matrices.

A prompt is x_1, y_1, …, x_k, y_k with y = w·x + ε, x ~ N(0, I), ε ~ N(0, σ²); w comes from N(0, I) (continuous) or is one of
a fixed set (discrete). The model says y_i after seeing the i − 1 pairs before it and x_i (arXiv:2309.10105, section 2).
Letters of shapes: b prompt, k pair, d dimension, t task, l token.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from ft_jax.models import config_from_hf
from ft_jax.models import layers as L
from ft_jax.models.config import ModelConfig
from ft_jax.models.decoder import Layer


class Regressor(nn.Module):
    """The decoder's layers between ``read_in`` and ``read_out``; tokens [b, l, d + 2] -> [b, l] and captured sites."""

    config: ModelConfig
    capture: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, tokens):
        c, (b, n) = self.config, tokens.shape[:2]
        x = L.Dense(c.hidden_size, name="read_in")(tokens)
        allowed = jnp.broadcast_to(jnp.tril(jnp.ones((n, n), bool)), (b, 1, n, n))
        context = (allowed, None, *L.rope_tables(c, jnp.broadcast_to(jnp.arange(n), (b, n))))
        layer = Layer(c, self.capture, parent=None)
        stacks = L.stacked_params(self, layer, c.num_layers, x, context, ((None, None), None), None)
        x, seen = L.run_layers(layer, stacks, x, context, (None, None), None, "none")
        return L.Dense(1, name="read_out")(L.RMSNorm(c.norm_eps, name="norm")(x))[..., 0], seen


@dataclasses.dataclass(frozen=True)
class InContext:
    """``apply(params, x [b,k,d], y [b,k]) -> [b,k]``: the prediction of every y from what stands before it."""

    config: ModelConfig
    dimension: int

    def init(self, rng):
        return Regressor(self.config).init(rng, jnp.zeros((1, 2, self.dimension + 2)))["params"]

    def apply(self, params, x, y):
        return Regressor(self.config).apply({"params": params}, tokens_of(x, y))[0][:, ::2]

    def objective(self, params, batch, rng):
        """Mean squared error over all places; for `train.make_step`."""
        del rng
        loss = jnp.square(self.apply(params, batch["x"], batch["y"]) - batch["y"]).mean()
        return loss, {"loss": loss, "weight": jnp.asarray(batch["y"].size, jnp.float32)}


def make(dimension, layers, width, heads):
    raw = {"model_type": "llama", "vocab_size": 1, "hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 2 * width,
           "num_attention_heads": heads, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5}  # fmt: skip
    return InContext(config_from_hf(raw, head="none"), dimension)


def tokens_of(x, y):
    """[b, 2k, d + 2]: a question (x, 0, 0) and then the pair (x, y, 1), for each example."""
    zero, one = jnp.zeros_like(y)[..., None], jnp.ones_like(y)[..., None]
    pairs = jnp.stack([jnp.concatenate([x, zero, zero], -1), jnp.concatenate([x, y[..., None], one], -1)], axis=2)
    return pairs.reshape(x.shape[0], -1, pairs.shape[-1])


def tasks(count, dimension, seed):
    """The discrete distribution: ``[t, d]`` draws of N(0, I)."""
    return np.random.default_rng(seed).standard_normal((count, dimension)).astype(np.float32)


def prompts(rng, weights, pairs, noise):
    """``{x [b,k,d], y [b,k]}`` for the weights ``[b, d]`` of each prompt."""
    x = rng.standard_normal((len(weights), pairs, weights.shape[1])).astype(np.float32)
    y = np.einsum("bkd,bd->bk", x, weights) + noise * rng.standard_normal((len(weights), pairs))
    return {"x": x, "y": y.astype(np.float32)}


def draw_weights(rng, rows, known, share):
    """``[rows, d]``: one of the ``known`` tasks with probability ``share``, else N(0, I)."""
    fixed = known[rng.integers(len(known), size=rows)]
    return np.where(rng.random((rows, 1)) < share, fixed, rng.standard_normal(fixed.shape)).astype(np.float32)


def discrete(x, y, known, noise):
    """``(prediction [b,k], log evidence [b,k])`` of the Bayes estimator for a uniform prior on ``known [t, d]``.

    Place i is what is known before y_i: E[w·x_i | pairs before i], log p(pairs before i) up to the noise's constant.
    """
    guess = np.einsum("bkd,td->bkt", x.astype(float), known.astype(float))
    fit = -0.5 * np.square(y[..., None] - guess) / noise**2
    before = np.cumsum(fit, 1) - fit
    top = before.max(-1, keepdims=True)
    weight = np.exp(before - top)
    evidence = top[..., 0] + np.log(weight.mean(-1))
    return (weight * guess).sum(-1) / weight.sum(-1), evidence


def ridge(x, y, noise):
    """``(prediction, log evidence)`` as `discrete`, for w ~ N(0, I): (XᵀX + σ²I)⁻¹Xᵀy of the pairs before each place."""
    b, k, d = x.shape
    x, y = x.astype(float), y.astype(float)
    gram, moment = np.broadcast_to(noise**2 * np.eye(d), (b, d, d)).copy(), np.zeros((b, d))
    said, evidence, total = np.zeros((b, k)), np.zeros((b, k)), np.zeros(b)
    for i in range(k):
        inverse = np.linalg.inv(gram)
        said[:, i] = np.einsum("bd,bde,be->b", x[:, i], inverse, moment)
        spread = 1 + np.einsum("bd,bde,be->b", x[:, i], inverse, x[:, i])  # of y_i, in units of the noise's variance
        evidence[:, i] = total
        total = total - 0.5 * (np.square(y[:, i] - said[:, i]) / (noise**2 * spread) + np.log(spread))
        gram += x[:, i, :, None] * x[:, i, None, :]
        moment += x[:, i] * y[:, i, None]
    return said, evidence


def mixture(x, y, known, noise, share):
    """``(prediction [b,k], posterior of the discrete branch [b,k])`` for the prior share · discrete + (1 − share) · N(0, I)."""
    (fixed, e_fixed), (free, e_free) = discrete(x, y, known, noise), ridge(x, y, noise)
    with np.errstate(divide="ignore"):
        odds = np.log(share) - np.log1p(-share) + e_fixed - e_free
    posterior = 1 / (1 + np.exp(-np.clip(odds, -500, 500)))
    return posterior * fixed + (1 - posterior) * free, posterior


def conjugate(apply, params, batch, factor):
    """Conjugate prompting: the labels of the prompt times γ, the answer divided by it (arXiv:2309.10105, section 3)."""
    return apply(params, batch["x"], factor * batch["y"]) / factor


def error(said, truth):
    """Mean squared error by number of pairs seen: ``[k]``."""
    return np.square(np.asarray(said, float) - np.asarray(truth, float)).mean(0)
