"""The retrained head: the optimum by other means, and tests that no example answers for itself."""

import numpy as np
import pytest
from scipy.special import softmax

from ft_jax.errors import UserError
from ft_jax.models.linear_head import cross_fitted, folds_of, linear_head


def blobs(rng, count=90, classes=3, size=6, apart=1.5):
    labels = rng.integers(0, classes, count)
    return (apart * np.eye(classes, size)[labels] + rng.standard_normal((count, size))).astype(np.float32), labels


def test_the_head_is_where_the_gradient_vanishes():
    x, y = blobs(np.random.default_rng(0))
    head = linear_head(x, y, 3, l2=0.01)
    w, b = np.asarray(head["kernel"], np.float64), np.asarray(head["bias"], np.float64)
    error = softmax(x @ w + b, axis=1) - np.eye(3)[y]
    assert head["kernel"].dtype == head["bias"].dtype == np.float32
    np.testing.assert_allclose(x.T @ error / len(y) + 0.01 * w, 0, atol=2e-5)
    np.testing.assert_allclose(error.mean(0), 0, atol=2e-5)
    assert abs(b.sum()) < 1e-6


def test_two_classes_agree_with_newton_steps_on_the_logistic_loss():
    """Softmax over two classes with penalty l2 on both columns is the logistic loss with l2/2 on their difference."""
    x, y = blobs(np.random.default_rng(1), classes=2)
    x = x.astype(np.float64)
    design, penalty = np.c_[x, np.ones(len(x))], np.diag([0.05 / 2] * x.shape[1] + [0.0])
    beta = np.zeros(design.shape[1])
    for _ in range(30):
        p = 1 / (1 + np.exp(-design @ beta))
        hessian = (design * (p * (1 - p))[:, None]).T @ design / len(x) + penalty
        beta -= np.linalg.solve(hessian, design.T @ (p - y) / len(x) + penalty @ beta)
    head = linear_head(x, y, 2, l2=0.05)
    kernel, bias = np.asarray(head["kernel"]), np.asarray(head["bias"])
    np.testing.assert_allclose(np.append(kernel[:, 1] - kernel[:, 0], bias[1] - bias[0]), beta, atol=2e-4)


def test_separable_classes_converge_and_the_order_of_examples_does_not_matter():
    x, y = blobs(np.random.default_rng(2), apart=40)
    head, order = linear_head(x, y, 3), np.random.default_rng(3).permutation(len(y))
    again = linear_head(x[order], y[order], 3)
    np.testing.assert_allclose(head["kernel"], again["kernel"], atol=2e-3)
    assert ((x @ np.asarray(head["kernel"]) + np.asarray(head["bias"])).argmax(1) == y).all()


def test_folds_share_every_class_equally():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [25, 12, 8]))
    folds = folds_of(labels, 5)
    for c in range(3):
        sizes = np.bincount(folds[labels == c], minlength=5)
        assert sizes.max() - sizes.min() <= 1
    sizes = np.bincount(folds, minlength=5)
    assert sizes.max() - sizes.min() <= 1


def test_cross_fitting_cannot_learn_labels_by_heart():
    """With more dimensions than examples a head fits any labels; predicted across folds, random ones stay at chance."""
    rng = np.random.default_rng(4)
    x, y = rng.standard_normal((160, 200)), rng.integers(0, 2, 160)
    head = linear_head(x, y, 2)
    assert ((x @ np.asarray(head["kernel"]) + np.asarray(head["bias"])).argmax(1) == y).all()
    assert abs((cross_fitted(x, y, 2) == y).mean() - 0.5) < 0.15
    x, y = blobs(rng, count=300, apart=4)
    assert (cross_fitted(x, y, 3) == y).mean() > 0.9


@pytest.mark.parametrize(("change", "said"), [
    (dict(labels=[0, 0, 1, 1, 3, 3]), "do not fit 3 classes"),
    (dict(labels=[0, 0, 1, 1, 1, 1]), "no example of class 2"),
    (dict(l2=0.0), "l2 is 0.0"),
    (dict(embeddings=np.full((6, 2), np.nan)), "NaN"),
    (dict(embeddings=np.ones((5, 2))), r"\(5, 2\)"),
])  # fmt: skip
def test_bad_input(change, said):
    given = {"embeddings": np.eye(6, 2), "labels": [0, 0, 1, 1, 2, 2], "num_labels": 3, "l2": 1e-3} | change
    with pytest.raises(UserError, match=said):
        linear_head(given.pop("embeddings"), given.pop("labels"), given.pop("num_labels"), **given)


def test_bad_folds():
    with pytest.raises(UserError, match="7 folds do not fit 6"):
        cross_fitted(np.eye(6), [0, 0, 1, 1, 2, 2], 3, folds=7)
    with pytest.raises(UserError, match="class 1 has 1 examples"):
        cross_fitted(np.eye(3), [0, 0, 1], 2, folds=2)
