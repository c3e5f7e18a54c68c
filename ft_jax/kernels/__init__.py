"""Kernels: weights that know how to multiply. ``adapt`` puts them into a tree by ordered regex rules."""

from ft_jax.kernels.adapt import adapt, check_start, inherits, merge, needs, parse_rule, started
from ft_jax.kernels.base import Kernel, dense, dot, is_kernel
from ft_jax.kernels.lowrank import LowRank

__all__ = ["Kernel", "LowRank", "adapt", "check_start", "dense", "dot", "inherits", "is_kernel", "merge", "needs",
           "parse_rule", "started"]  # fmt: skip
