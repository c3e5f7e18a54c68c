"""Data made by rule: the seed, the split and the row number decide a row, so any row can be made on its own."""

import inspect

import numpy as np

from ft_jax.data.splits import SPLITS, part
from ft_jax.errors import UserError, nearest
from ft_jax.kernels import parse_rule

# Bumped when a generator gives other rows for the same arguments.
VERSION = 1
LETTERS = "abcdefghijklmnopqrstuvwxyz"
HELD_OUT = {"validation": 0.1, "test": 0.1}


def modular_addition(rng, *, modulus=97):
    """``12 + 90 (mod 97) =`` -> `` 5``; label: the sum."""
    a, b = (int(x) for x in rng.integers(modulus, size=2))
    total = (a + b) % modulus
    return f"{a} + {b} (mod {modulus}) =", f" {total}", total


def copy(rng, *, length=8, alphabet=26):
    """``copy c a b =`` -> `` c a b``; no label."""
    word = _word(rng, length, alphabet)
    return f"copy {word} =", f" {word}", None


def reverse(rng, *, length=8, alphabet=26):
    """``reverse c a b =`` -> `` b a c``; no label."""
    word = _word(rng, length, alphabet)
    return f"reverse {word} =", f" {word[::-1]}", None


def majority(rng, *, length=9):
    """``a b a majority =`` -> `` a``; label 0 for a, 1 for b (``length`` is odd, so that there is no draw)."""
    if length % 2 == 0:
        raise UserError(f"procedural:majority needs an odd length, not {length}; nearest: {length + 1}")
    word = _word(rng, length, 2)
    label = int(word.count("b") > length // 2)
    return f"{word} majority =", f" {LETTERS[label]}", label


def counting(rng, *, length=9, alphabet=3):
    """``a b a count a =`` -> `` 2``; label: how often the letter stands there (0 to length)."""
    word = _word(rng, length, alphabet)
    letter = LETTERS[int(rng.integers(alphabet))]
    label = word.count(letter)
    return f"{word} count {letter} =", f" {label}", label


def parity(rng, *, length=8):
    """``0 1 1 parity =`` -> `` 0``; label: the number of ones modulo 2."""
    bits = rng.integers(2, size=length)
    label = int(bits.sum() % 2)
    return f"{' '.join(map(str, bits))} parity =", f" {label}", label


def _word(rng, length, alphabet):
    return " ".join(LETTERS[int(i)] for i in rng.integers(alphabet, size=length))


GENERATORS = {fn.__name__: fn for fn in (modular_addition, copy, reverse, majority, counting, parity)}
LIMITS = {"modulus": (2, 10**9), "length": (1, 10**4), "alphabet": (1, len(LETTERS)), "size": (1, 10**8),
          "seed": (0, 2**32 - 1)}


def parse(spec):
    """``"majority(length=9,seed=1)"`` -> ``("majority", {every argument with its value})``; UserError for wrong ones.

    Every generator also takes ``seed`` (0) and ``size`` (10,000 training rows; validation and test have a tenth).
    """
    name, given = parse_rule(spec)
    if name not in GENERATORS:
        raise UserError(f"no procedural source called {name!r}{nearest(name, GENERATORS)}")
    known = {p.name: p.default for p in inspect.signature(GENERATORS[name]).parameters.values() if p.name != "rng"}
    known |= {"seed": 0, "size": 10_000}
    for key, value in given.items():
        if key not in known:
            raise UserError(f"procedural:{name} has no argument {key!r}{nearest(key, known)}")
        low, high = LIMITS[key]
        if type(value) is not int or not low <= value <= high:
            raise UserError(f"procedural:{name}: {key} must be a whole number from {low} to {high}, not {value!r}")
    return name, known | given


class Rows:
    """Random access to the rows of one split: dicts of prompt, completion, text and (classification) label.

    The hash of a prompt decides its split (80/10/10), so that no prompt stands in two splits.
    """

    def __init__(self, spec, split):
        if split not in SPLITS:
            raise UserError(f"procedural:{spec} has no split {split!r}; it has {', '.join(SPLITS)}")
        self.name, self.arguments = parse(spec)
        self.split = split
        size = self.arguments["size"]
        self.size = size if split == "train" else max(1, size // 10)
        self.own = {k: v for k, v in self.arguments.items() if k not in ("seed", "size")}
        # A wrong length is an error now, not in the middle of a run.
        GENERATORS[self.name](np.random.default_rng(0), **self.own)

    @property
    def fingerprint(self):
        return f"procedural:{VERSION}:{self.name}:{sorted(self.arguments.items())}:{self.split}"

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if not 0 <= index < self.size:
            raise IndexError(index)
        rng = np.random.default_rng([self.arguments["seed"], SPLITS.index(self.split), index])
        for _ in range(2000):
            prompt, completion, label = GENERATORS[self.name](rng, **self.own)
            if part(prompt, HELD_OUT["validation"], HELD_OUT["test"]) == self.split:
                row = {"prompt": prompt, "completion": completion, "text": prompt + completion}
                return row if label is None else row | {"label": label}
        raise UserError(f"procedural:{self.name} with {self.own} has too few prompts for a {self.split} split")
