"""The counter and the grammar's task families: the text is the grammar's, the counts and the spurious attribute as asked."""

import numpy as np
import pytest

from ft_jax.data import procedural, sources
from ft_jax.errors import UserError


def parses(text):
    """How far ``text`` can be read as one sentence of the grammar: the set of places where it may end."""
    seen = {}

    def ends(symbol, at):
        if symbol in "abc":
            return {at + 1} if text[at : at + 1] == symbol else set()
        if (symbol, at) not in seen:
            found = set()
            for rule in procedural.GRAMMAR[symbol]:
                places = {at}
                for part in rule:
                    places = {e for p in places for e in ends(part, p)}
                found |= places
            seen[symbol, at] = found
        return seen[symbol, at]

    return ends("s", 0)


def test_the_text_is_a_sentence_of_the_grammar():
    for seed in range(3):
        text = "".join("abc"[i] for i in procedural.grammar_text(np.random.default_rng(seed), 1))
        assert len(text) in parses(text)
        assert len(text) not in parses(text[:-1] + ("a" if text[-1] != "a" else "b") * 2)


def test_windows_and_longer_texts():
    rng = np.random.default_rng(0)
    text = procedural.grammar_text(rng, 1000)
    assert len(text) >= 1000 and set(text) == {0, 1, 2}
    found = procedural.windows(rng, text, 50, 7)
    joined = "".join(map(str, text))
    assert found.shape == (50, 7) and all("".join(map(str, row)) in joined for row in found)


def test_spread_gives_the_counts_and_the_attribute():
    rng = np.random.default_rng(0)
    text = procedural.windows(rng, procedural.grammar_text(rng, 5000), 4000, 16)
    spurious = rng.random(4000) < 0.5
    found = procedural.spread(rng, text, spurious)
    a, b = ((found == x).sum(1) for x in (0, 1))
    np.testing.assert_array_equal(b - a == 1, spurious)
    assert set(a) == set(range(8)) and set(b) == set(range(9)) and set(np.unique(found)) == {0, 1, 2}
    assert np.bincount(a).min() > 400 and (found == text).mean() > 0.5


def brute(family, text, operand, place):
    word = "".join(text)
    places = [i for i in range(len(word)) if word.startswith(operand * (2 if "compose" in family else 1), i)]
    if family == "token":
        return word[-place]
    if "index" not in family:
        return len(places)
    last = [len(word) - i - (2 if "compose" in family else 1) + 1 for i in reversed(places)]
    return last[place - 1] if len(last) >= place else 0


@pytest.mark.parametrize("family", procedural.FAMILIES)
def test_every_family_says_what_it_is_asked(family):
    source = sources.load(f"procedural:pcfg(family={family},operand=c,place=3,spurious=50,size=60)")
    for row in (source[i] for i in range(60)):
        asked, operand, _, *text, _ = row["prompt"].split()
        assert (asked, operand, len(text)) == (family, "c", 16)
        answer = brute(family, text, operand, 3)
        assert row["completion"] == f" {answer}"
        assert row["label"] == ("abc".index(answer) if family == "token" else answer)


def test_the_counter_has_the_attribute_as_often_as_asked():
    for share, low, high in ((0, 0, 0), (50, 60, 140), (100, 200, 200)):
        source = sources.load(f"procedural:counter(spurious={share},gap=2,operand=d,other=b,size=200)")
        texts = [source[i]["prompt"].split()[3:-1] for i in range(200)]
        assert low <= sum(t.count("d") - t.count("b") == 2 for t in texts) <= high
        assert set().union(*texts) == set("abcdefghi")


def test_arguments_that_cannot_be():
    for spec, message in {
        "pcfg(family=cuont)": "no family called 'cuont'; nearest: 'count'",
        "pcfg(operand=d)": "operands a, b and c, not 'd'",
        "pcfg(operand=1)": "no operand called 1",
        "pcfg(spurious=101)": "whole number from -1 to 100",
        "pcfg(length=2,spurious=0)": "no room for two counts that differ by 1; nearest: 3",
        "counter(operand=a)": "an operand and an other letter",
        "counter(alphabet=2)": "an operand and an other letter",
    }.items():
        with pytest.raises(UserError, match=message):
            sources.load(f"procedural:{spec}")
