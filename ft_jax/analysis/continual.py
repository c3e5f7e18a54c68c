"""What a sequence of tasks leaves behind, from the matrix R[i, j]: score on task j after training on tasks 0 … i.

Scores are higher-is-better. An entry that was not measured is NaN; what a measure needs and does not find is an error.
"""

import numpy as np

from ft_jax.errors import UserError


def _matrix(matrix):
    r = np.asarray(matrix, np.float64)
    if r.ndim != 2 or r.shape[0] != r.shape[1] or not r.size:
        raise UserError(f"a forgetting matrix has a row and a column for each task, not the shape {r.shape}")
    for i, j in np.argwhere(np.isnan(r)):
        if j <= i:
            raise UserError(f"R[{i}, {j}] was not measured: every task that has been trained on is needed after every task")
    return r


def average_accuracy(matrix):
    """A_k = 1/k Σ_{j ≤ k} R[k, j] after each task k ``[T]``; the last one is GEM's ACC (arXiv:1706.08840)."""
    r = _matrix(matrix)
    return np.array([r[k, : k + 1].mean() for k in range(len(r))])


def backward_transfer(matrix):
    """BWT_j = R[T, j] − R[j, j] of every task but the last ``[T − 1]``, below 0 where it was forgotten (arXiv:1706.08840)."""
    r = _matrix(matrix)
    return r[-1, :-1] - np.diagonal(r)[:-1]


def forgetting(matrix):
    """f_j = max_{l < T} R[l, j] − R[T, j] of every task but the last ``[T − 1]`` (arXiv:1801.10112).

    The largest of several noisy scores is too large, so that f is above 0 by chance too; `backward_transfer` is not.
    """
    r = _matrix(matrix)
    return np.nanmax(r[:-1, :-1], axis=0) - r[-1, :-1] if len(r) > 1 else np.empty(0)


def forward_transfer(matrix, start):
    """FWT_j = R[j − 1, j] − b_j of every task but the first ``[T − 1]``, b = ``start [T]`` before any task (arXiv:1706.08840).

    GEM's b is a model drawn at random; that of a pre-trained one is its score before the sequence.
    UserError where R[j − 1, j] was not measured.
    """
    r, start = _matrix(matrix), np.asarray(start, np.float64)
    if start.shape != r.shape[:1]:
        raise UserError(f"{len(r)} tasks need as many starting scores, not the shape {start.shape}")
    ahead = np.diagonal(r, offset=1)
    if np.isnan(ahead).any():
        j = int(np.flatnonzero(np.isnan(ahead))[0])
        raise UserError(f"R[{j}, {j + 1}] was not measured: forward transfer needs each task's score just before its training")
    return ahead - start[1:]


def summary(matrix, start=None):
    """``{average_accuracy, backward_transfer, forgetting, forward_transfer}``: means over tasks, after the whole sequence.

    Forward transfer only with ``start``; with one task alone the transfers are None, for there is nothing to forget.
    """
    out = {"average_accuracy": float(average_accuracy(matrix)[-1])}
    rows = {"backward_transfer": backward_transfer(matrix), "forgetting": forgetting(matrix)}
    if start is not None:
        rows["forward_transfer"] = forward_transfer(matrix, start)
    return out | {name: float(values.mean()) if values.size else None for name, values in rows.items()}
