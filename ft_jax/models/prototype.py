"""A frozen head without training: class means of the base model's own embeddings."""

import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from ft_jax.errors import UserError


def prototype_head(embeddings, labels, num_labels):
    """``{"kernel" [D, C], "bias" [C]}`` of logits_c = s (e · μ_c − |μ_c|² / 2): nearest class mean, calibrated.

    μ_c is the mean embedding of class c; s maximises the likelihood of the labels, so that the base model's own
    confidence is what its embeddings warrant. Embeddings ``[N, D]`` float32, labels ``[N]``.
    Raises UserError for a class without an example.
    """
    embeddings, labels = np.asarray(embeddings, np.float64), np.asarray(labels)
    for c in range(num_labels):
        if not (labels == c).any():
            raise UserError(f"no example of class {c} among the {len(labels)} that the prototype head is made from")
    means = np.stack([embeddings[labels == c].mean(0) for c in range(num_labels)])
    logits = embeddings @ means.T - (means**2).sum(1) / 2

    def nll(log_scale):
        return -log_softmax(logits * np.exp(log_scale), axis=1)[np.arange(len(labels)), labels].mean()

    scale = np.exp(minimize_scalar(nll, bounds=(-3.0, 8.0), method="bounded").x)
    return {"kernel": jnp.asarray(scale * means.T, jnp.float32), "bias": jnp.asarray(-scale * (means**2).sum(1) / 2, jnp.float32)}
