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


def counter(rng, *, length=16, alphabet=9, operand="b", other="a", gap=1, spurious=0):
    """``count b : c b a … =`` -> `` 1``; the Counter task on uniform letters (arXiv:2311.12786, B.1); label: the count.

    ``spurious`` percent of the rows have the spurious attribute, count(operand) − count(other) = gap; the others never.
    """
    if operand == other or max(map(LETTERS.index, (operand, other))) >= alphabet - 1:
        raise UserError(f"procedural:counter needs an operand and an other letter, two of the first {alphabet - 1} of the "
                        f"alphabet {LETTERS[:alphabet]!r}, not {operand!r} and {other!r}")
    text = rng.integers(alphabet, size=(1, length))
    letters = LETTERS.index(other), LETTERS.index(operand), alphabet - 1
    text = spread(rng, text, rng.random(1) < spurious / 100, letters, gap=gap)
    return _asked("count", operand, text, 1)


def pcfg(rng, *, length=16, family="count", operand="b", place=2, gap=1, spurious=-1):
    """``count b : c b a … =`` -> `` 1``; a task family on a window of a grammar's text (arXiv:2311.12786, B.2); label: its number.

    Families: `FAMILIES`. With ``spurious`` from 0 to 100 the counts of a and b are spread out by editing the window and that
    percentage of the rows has the spurious attribute, count(b) − count(a) = gap, the others never; −1 leaves the text as it is.
    """
    if operand not in "abc":
        raise UserError(f"procedural:pcfg has the operands a, b and c, not {operand!r}")
    text = windows(rng, grammar_text(rng, length), 1, length)
    if spurious >= 0:
        text = spread(rng, text, rng.random(1) < spurious / 100, gap=gap)
    return _asked(family, operand, text, place)


def _word(rng, length, alphabet):
    return _letters(rng.integers(alphabet, size=length))


def _letters(row):
    return " ".join(LETTERS[int(i)] for i in row)


def _asked(family, operand, text, place):
    """(prompt, completion, label) of one row of text."""
    value = int(answers(family, text, np.full(1, LETTERS.index(operand)), place)[0])
    said = LETTERS[value] if family == "token" else value
    return f"{family} {operand} : {_letters(text[0])} =", f" {said}", value


# The grammar of arXiv:2311.12786, figure 14: each symbol has two equally likely rules, a, b and c are terminal.
GRAMMAR = {
    "s": ("rq", "qp"), "p": ("mno", "nom"), "q": ("nmo", "nm"), "r": ("om", "omn"), "m": ("lj", "jlk"), "n": ("kjl", "ljk"),
    "o": ("lkj", "kj"), "j": ("hi", "ih"), "k": ("hgi", "ghi"), "l": ("ihg", "hgi"), "g": ("dfe", "fed"), "h": ("edf", "def"),
    "i": ("efd", "fed"), "d": ("ca", "abc"), "e": ("cb", "cab"), "f": ("cba", "ba"),
}  # fmt: skip
# Task families of the same paper (B.2, E.2): how often O stands there; how often O O does; how far from the end O (O O)
# stands for the place-th time, 0 for never; the letter at that place from the end; and a second name of counting.
FAMILIES = ("count", "compose", "index", "index_compose", "token", "recount")


def grammar_text(rng, size):
    """At least ``size`` letters (0 a, 1 b, 2 c) of sentences that the grammar gives, one after the other; uint8."""
    out, stack = [], []
    while stack or len(out) < size:
        symbol = stack.pop() if stack else "s"
        if symbol in "abc":
            out.append(symbol)
        else:
            stack.extend(reversed(GRAMMAR[symbol][rng.random() < 0.5]))
    return (np.frombuffer("".join(out).encode(), np.uint8) - ord("a")).astype(np.uint8)


def windows(rng, text, rows, length):
    """``[rows, length]``: random windows of a text, so that no letter is more likely at the beginning."""
    starts = rng.integers(len(text) - length + 1, size=rows)
    return text[starts[:, None] + np.arange(length)]


def spread(rng, text, spurious, letters=(0, 1, 2), *, gap=1):
    """Edits ``text [rows, length]`` so that two counts spread out and, where ``spurious [rows]``, have the spurious attribute.

    letters: (first, second, filler). count(first) is uniform from 0 to m = (length − gap) // 2. count(second) is
    count(first) + gap where spurious, elsewhere uniform from 0 to m + gap without that value: a rule that reads it off the
    first letter is right on every row with the attribute and wrong on every row without. Letters that stand there already
    are kept where they can be; those too many become filler. UserError for a text too short.
    """
    first, second, filler = letters
    most, rows = (text.shape[1] - gap) // 2, len(text)
    if most < 1:
        raise UserError(f"length {text.shape[1]} leaves no room for two counts that differ by {gap}; nearest: {gap + 2}")
    a = rng.integers(most + 1, size=rows)
    b = rng.integers(most + gap, size=rows)
    b = np.where(spurious, a + gap, b + (b >= a + gap))
    is_first, is_second = text == first, text == second
    chosen = _least(rng, np.where(is_first, 0, np.where(is_second, 2, 1)), a)
    others = _least(rng, np.where(chosen, 2, np.where(is_second, 0, 1)), b)
    rest = np.where(is_first | is_second, filler, text)
    return np.where(chosen, first, np.where(others, second, rest)).astype(text.dtype)


def _least(rng, order, counts):
    """bool: the ``counts [rows]`` entries of each row that come first, at random among equals."""
    return (order + rng.random(order.shape)).argsort(1).argsort(1) < counts[:, None]


def answers(family, text, operands, place=2):
    """int64 ``[rows]``: what a task family of `FAMILIES` asks of ``text [rows, length]`` and ``operands [rows]``."""
    if family == "token":
        return text[:, -place].astype(np.int64)
    here = text == operands[:, None]
    if family in ("compose", "index_compose"):
        here = here[:, 1:] & here[:, :-1]
    if family in ("count", "recount", "compose"):
        return here.sum(1)
    seen = here[:, ::-1].cumsum(1) >= place
    return np.where(seen.any(1), seen.argmax(1) + 1, 0)


GENERATORS = {fn.__name__: fn for fn in (modular_addition, copy, reverse, majority, counting, parity, counter, pcfg)}
# The least and the largest of a number, or the words that an argument may be.
LIMITS = {"modulus": (2, 10**9), "length": (1, 10**4), "alphabet": (1, len(LETTERS)), "size": (1, 10**8),
          "seed": (0, 2**32 - 1), "gap": (0, 10**4), "place": (1, 10**4), "spurious": (-1, 100), "operand": tuple(LETTERS),
          "other": tuple(LETTERS), "family": FAMILIES}


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
        if isinstance(LIMITS[key][0], str):
            if value not in LIMITS[key]:
                raise UserError(f"procedural:{name}: no {key} called {value!r}{nearest(str(value), LIMITS[key])}")
            continue
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
