"""A head retrained on frozen embeddings: multinomial logistic regression to convergence."""

import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from ft_jax.errors import UserError

TOLERANCE = 1e-5  # largest entry of the gradient at which the fit has converged


def _checked(embeddings, labels, num_labels):
    x, y = np.asarray(embeddings, np.float64), np.asarray(labels)
    if x.ndim != 2 or y.shape != x.shape[:1]:
        raise UserError(f"a head needs embeddings [N, D] and labels [N], not {x.shape} and {y.shape}")
    if not np.isfinite(x).all():
        raise UserError("the embeddings that a head is fitted to hold NaN or infinity")
    if y.size and not 0 <= y.min() <= y.max() < num_labels:
        raise UserError(f"labels from {y.min()} to {y.max()} do not fit {num_labels} classes")
    return x, y


def linear_head(embeddings, labels, num_labels, *, l2=1e-3):
    """``{"kernel" [D, C], "bias" [C]}`` that minimise mean CE(e W + b, y) + l2/2 · ‖W‖²_F, by L-BFGS in float64.

    The problem is convex and strictly so in W: the answer depends on no start and no seed. The bias is not penalised
    and has mean 0. Embeddings ``[N, D]`` float32, labels ``[N]``; the head is float32.
    Raises UserError for a class without an example, an l2 that is not positive, and a fit that does not converge.
    """
    x, y = _checked(embeddings, labels, num_labels)
    if l2 <= 0:
        raise UserError(f"l2 is {l2}; it must be above 0, else separable classes drive the weights to infinity")
    for c in sorted(set(range(num_labels)) - set(y.tolist())):
        raise UserError(f"no example of class {c} among the {len(y)} that the head is fitted to")
    size, onehot = x.shape[1] * num_labels, np.eye(num_labels)[y]

    def loss(flat):
        w, b = flat[:size].reshape(x.shape[1], num_labels), flat[size:]
        logits = x @ w + b
        value = -(onehot * log_softmax(logits, axis=1)).sum(1).mean() + l2 / 2 * (w**2).sum()
        error = (softmax(logits, axis=1) - onehot) / len(y)
        return value, np.concatenate([(x.T @ error + l2 * w).ravel(), error.sum(0)])

    found = minimize(loss, np.zeros(size + num_labels), jac=True, method="L-BFGS-B",
                     options={"maxiter": 2000, "gtol": TOLERANCE / 10, "ftol": 0.0})  # fmt: skip
    # Not found.success: near the optimum the line search may give up on the last digits.
    if (rest := np.abs(loss(found.x)[1]).max()) > TOLERANCE:
        raise UserError(f"the head did not converge in {found.nit} steps (gradient {rest:.1e}); a larger l2 than {l2} makes it easier")
    w, b = found.x[:size].reshape(x.shape[1], num_labels), found.x[size:]
    return {"kernel": jnp.asarray(w, jnp.float32), "bias": jnp.asarray(b - b.mean(), jnp.float32)}


def folds_of(labels, folds):
    """The fold ``[N]`` of each example, in turns within its class: every fold holds the classes in equal shares."""
    labels, out = np.asarray(labels), np.empty(len(labels), np.int64)
    turn = 0  # classes go on where the one before stopped, so that the folds differ by one example at most
    for c in np.unique(labels):
        where = np.flatnonzero(labels == c)
        out[where] = (turn + np.arange(len(where))) % folds
        turn += len(where)
    return out


def cross_fitted(embeddings, labels, num_labels, *, folds=5, l2=1e-3):
    """The predicted class ``[N]`` of every example, each from a `linear_head` fitted to the other folds alone.

    Every example is tested, none by a head that has seen it: as many test answers as embeddings.
    Raises UserError when a class has fewer than 2 examples or ``folds`` does not lie between 2 and N.
    """
    x, y = _checked(embeddings, labels, num_labels)
    if not 2 <= folds <= len(y):
        raise UserError(f"{folds} folds do not fit {len(y)} examples; between 2 and {len(y)}")
    for c in range(num_labels):
        if (count := int((y == c).sum())) < 2:
            raise UserError(f"class {c} has {count} examples; a head tested by cross-fitting needs 2 of each class")
    fold, out = folds_of(y, folds), np.empty(len(y), np.int64)
    for k in range(folds):
        head = linear_head(x[fold != k], y[fold != k], num_labels, l2=l2)
        out[fold == k] = (x[fold == k] @ np.asarray(head["kernel"]) + np.asarray(head["bias"])).argmax(1)
    return out
