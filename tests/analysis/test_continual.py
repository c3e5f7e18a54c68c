"""Measures of a sequence of tasks against matrices whose answers are worked out by hand."""

import numpy as np
import pytest

from ft_jax.analysis import continual
from ft_jax.errors import UserError

NAN = np.nan
# Task 0 falls .9 → .8 → .6, task 1 rises to .8 and ends at .7 after a start of .5 ahead of its training.
R = [[0.9, 0.5, NAN], [0.8, 0.8, 0.4], [0.6, 0.7, 1.0]]


def test_measures_of_a_worked_example():
    np.testing.assert_allclose(continual.average_accuracy(R), [0.9, 0.8, (0.6 + 0.7 + 1.0) / 3])
    np.testing.assert_allclose(continual.backward_transfer(R), [-0.3, -0.1])
    np.testing.assert_allclose(continual.forgetting(R), [0.3, 0.1])
    np.testing.assert_allclose(continual.forward_transfer(R, [0.3, 0.6, 0.3]), [-0.1, 0.1])
    found = continual.summary(R, [0.3, 0.6, 0.3])
    assert found == pytest.approx({"average_accuracy": 2.3 / 3, "backward_transfer": -0.2, "forgetting": 0.2, "forward_transfer": 0.0})
    assert "forward_transfer" not in continual.summary(R)


def test_forgetting_is_measured_from_the_best_score_and_transfer_from_the_one_just_after_training():
    r = [[0.5, 0.2, NAN], [0.9, 0.6, 0.1], [0.7, 0.6, 0.8]]  # task 1 helps task 0, task 2 takes half of that away
    np.testing.assert_allclose(continual.backward_transfer(r), [0.2, 0.0])
    np.testing.assert_allclose(continual.forgetting(r), [0.2, 0.0])


def test_forgetting_may_be_negative():
    r = [[0.5, NAN], [0.7, 0.9]]
    np.testing.assert_allclose(continual.forgetting(r), [-0.2])


def test_one_task_has_nothing_to_forget():
    assert continual.summary([[0.7]]) == {"average_accuracy": 0.7, "backward_transfer": None, "forgetting": None}


@pytest.mark.parametrize(("matrix", "said"), [
    ([[0.5, 0.5]], "not the shape"),
    ([[0.5, NAN], [NAN, 0.5]], r"R\[1, 0\] was not measured"),
    ([], "not the shape"),
])  # fmt: skip
def test_a_matrix_that_is_none(matrix, said):
    with pytest.raises(UserError, match=said):
        continual.summary(matrix)


def test_forward_transfer_needs_the_score_before_training():
    with pytest.raises(UserError, match=r"R\[0, 1\] was not measured"):
        continual.forward_transfer([[0.5, NAN], [0.5, 0.5]], [0.1, 0.1])
    with pytest.raises(UserError, match="starting scores"):
        continual.forward_transfer(R, [0.1, 0.1])
