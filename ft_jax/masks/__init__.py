"""Masks: which weights train, as a whole, within a leaf, or for a while."""

from ft_jax.masks.base import (
    Gates,
    bitfit,
    cut,
    declared,
    fixed,
    gates,
    is_gate,
    join_layers,
    rules,
    split_layers,
    split_outside,
    spread,
    whole,
)
from ft_jax.masks.layers import select
from ft_jax.masks.weights import scores_of

__all__ = [
    "Gates", "bitfit", "cut", "declared", "fixed", "gates", "is_gate", "join_layers", "rules", "scores_of", "select",
    "split_layers", "split_outside", "spread", "whole",
]  # fmt: skip
