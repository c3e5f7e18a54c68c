"""Paths, ordered rules, split and join, fingerprints."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ft_jax import kernels, tree
from ft_jax.errors import UserError
from tests.helpers import assert_trees_close

TREE = {
    "layers": {"attn": {"q": {"kernel": jnp.arange(24.0).reshape(2, 3, 4), "bias": jnp.zeros((2, 4))}}},
    "head": {"kernel": jnp.ones((4, 2))},
}
PATHS = ["head/kernel", "layers/attn/q/bias", "layers/attn/q/kernel"]


def test_flatten_and_nest_are_inverse():
    flat = tree.flatten(TREE)
    assert list(flat) == PATHS
    assert_trees_close(tree.nest(flat), TREE)
    assert tree.count(TREE) == 24 + 8 + 8


def test_paths_reach_into_kernels_unless_they_are_leaves():
    adapted = kernels.adapt(TREE, [("head/kernel", "lora(rank=1)")], jax.random.key(0))
    inside = {f"head/kernel/{f.name}" for f in dataclasses.fields(kernels.LowRank)}
    assert {p for p in tree.flatten(adapted) if p.startswith("head")} == inside
    assert list(tree.flatten(adapted, is_leaf=kernels.is_kernel)) == PATHS


@pytest.mark.parametrize(
    "rules, expected",
    [
        ([(".*", 1)], [1, 1, 1]),
        ([("layers/.*", 1)], [None, 1, 1]),
        ([(".*/kernel", 1), (".*", 2)], [1, 2, 1]),
        ([("head/.*", 0), (".*/kernel", 1)], [0, None, 1]),  # the first match decides
        ([("layers|layers/attn/q/bias", 1)], [None, 1, None]),  # a part of a path is no match
    ],
)
def test_first_full_match_decides(rules, expected):
    assert list(tree.match(rules, PATHS).values()) == expected


@pytest.mark.parametrize(
    "pattern, words",
    [
        ("layers/attn/q/kernal", ["rule 'layers/attn/q/kernal' matches no leaf", "nearest: 'layers/attn/q/kernel'"]),
        ("q", ["'q' matches no leaf", "known: head/kernel"]),
        ("layers/(attn", ["'layers/(attn' is not a regular expression"]),
    ],
)
def test_a_rule_that_fits_nothing_is_named(pattern, words):
    with pytest.raises(UserError) as error:
        tree.match([(".*", 1), (pattern, 1)], PATHS)
    assert all(w in str(error.value) for w in words) and "\n" not in str(error.value)


@pytest.mark.parametrize("marked", [(), ("head/kernel",), PATHS])
def test_split_and_join_are_inverse(marked):
    mask = tree.map_with_path(lambda p, _: p in marked, TREE)
    chosen, rest = tree.split(TREE, mask)
    assert list(tree.flatten(chosen)) == list(marked)
    assert sorted([*tree.flatten(chosen), *tree.flatten(rest)]) == PATHS
    assert_trees_close(tree.join(chosen, rest), TREE)
    assert_trees_close(tree.join(rest, chosen), TREE)


def test_split_and_join_inside_a_kernel():
    adapted = kernels.adapt(TREE, [(".*/kernel", "lora(rank=1)")], jax.random.key(0))
    mask = tree.map_with_path(lambda p, _: p.endswith("/a"), adapted)
    chosen, rest = tree.split(adapted, mask)
    assert list(tree.flatten(chosen)) == ["head/kernel/a", "layers/attn/q/kernel/a"]
    joined = tree.join(chosen, rest)
    assert jax.tree.structure(joined) == jax.tree.structure(adapted)
    assert_trees_close(joined, adapted)


def test_fingerprint_is_of_values_shapes_and_paths_alone():
    base = {"a": np.arange(6, dtype=np.float32), "b": np.ones((2, 2), np.float32)}
    same = [{"b": base["b"], "a": jnp.asarray(base["a"])}, {k: v.astype(np.float64) for k, v in base.items()}]
    other = [
        {**base, "a": base["a"] + np.eye(6, dtype=np.float32)[2]},
        {**base, "a": base["a"].reshape(2, 3)},
        {"c": base["a"], "b": base["b"]},
        {"a": base["a"]},
    ]
    marks = [tree.fingerprint(t) for t in (base, *same, *other)]
    assert len(set(marks[:3])) == 1
    assert len(set(marks)) == 5
    assert len(marks[0]) == 64
