"""Splits that depend on nothing but the text: no generator, no order, equal texts always on the same side."""

import hashlib

SPLITS = ("train", "validation", "test")


def fraction(text, seed=0):
    """A number in [0, 1) that only the text and the seed decide (first 8 bytes of SHA-256)."""
    digest = hashlib.sha256(f"{seed}:{text}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def part(text, validation, test, seed=0):
    """The split a text falls into, given the fractions held out for validation and test."""
    at = fraction(text, seed)
    return "test" if at < test else "validation" if at < test + validation else "train"
