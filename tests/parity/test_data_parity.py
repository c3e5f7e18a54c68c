"""Batches against what transformers makes of the same rows with the same tokenizer."""

import csv

import numpy as np
import pytest
import transformers

from ft_jax.data import pipeline
from ft_jax.io import assets, tokenizer

TEXTS = ["A fine film.", "naïve, über-long " * 40, "[SEP] tricks & <br /> 日本", "short", "the the the"]


@pytest.fixture(scope="module")
def both():
    folder = assets.model_folder("minilm")
    return tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "rows.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "second", "label"])
        writer.writerows([t, s, i % 2] for i, (t, s) in enumerate(zip(TEXTS, reversed(TEXTS), strict=True)))
    return {"source": str(path), "splits": {"train": str(path)}, "max_length": 32}


@pytest.mark.parametrize("pair", [False, True])
def test_classification_inputs_equal_transformers(both, source, tmp_path, pair):
    ours, theirs = both
    cfg = source | {"num_labels": 2, "pair_field": "second" if pair else ""}
    ds = pipeline.build(cfg, "train", ours, "classification", ours.vocab_size, tmp_path)
    want = theirs(TEXTS, TEXTS[::-1] if pair else None, max_length=32, truncation=True, padding="max_length",
                  return_tensors="np")  # fmt: skip
    got = ds.gather(range(len(TEXTS)))
    for name in ("input_ids", "attention_mask", *(["token_type_ids"] if pair else [])):
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def test_mlm_special_tokens_equal_transformers(both, source, tmp_path):
    ours, theirs = both
    ds = pipeline.build(source, "train", ours, "mlm", ours.vocab_size, tmp_path)
    for i in range(len(TEXTS)):
        row = ds[i]
        want = theirs.get_special_tokens_mask(row["input_ids"].tolist(), already_has_special_tokens=True)
        assert row["special_tokens_mask"].tolist() == want
