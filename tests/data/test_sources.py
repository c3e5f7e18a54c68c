import json
import os
import subprocess
import sys

import pyarrow
import pytest
from pyarrow import parquet

from ft_jax.data import procedural, sources
from ft_jax.errors import UserError

ROWS = [{"text": "good, \"really\"\ngood", "label": 1}, {"text": "naïve\u2028bad", "label": 0},
        {"text": "fine", "label": 1}]  # fmt: skip


def write(folder, suffix):
    path = folder / f"data{suffix}"
    if suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps(r, ensure_ascii=False) for r in ROWS) + "\n", encoding="utf-8-sig")
    elif suffix == ".json":
        path.write_text(json.dumps(ROWS))
    elif suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=2)
    else:
        import csv

        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["text", "label"], delimiter="\t" if suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(ROWS)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_files_hold_the_rows_that_were_written(tmp_path, suffix):
    source = sources.load(str(write(tmp_path, suffix)))
    found = [source[i] for i in range(len(source))]
    assert [r["text"] for r in found] == [r["text"] for r in ROWS]
    assert [int(r["label"]) for r in found] == [r["label"] for r in ROWS]
    place = "line 3" if suffix == ".jsonl" else "row 2"
    assert source.where(1) == f"{source.name}, {place}"


def test_long_csv_fields(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text\n" + "x" * 300_000 + "\n")
    assert len(sources.load(str(path))[0]["text"]) == 300_000


BAD_FILES = {
    "empty.jsonl": (b"", "is empty: it holds no rows"),
    "blank.jsonl": (b"\n\n", "is empty"),
    "empty.json": (b"", "is empty"),
    "list.json": (b"[]", "is empty"),
    "empty.csv": (b"", "is empty"),
    "header.csv": (b"text,label\n", "is empty"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', "broken.jsonl, line 2: not JSON: .*column"),
    "number.jsonl": (b'{"text": "a"}\n3\n', "line 2: a JSON int, not an object"),
    "object.json": (b'{"text": "a"}', "holds a JSON dict, not a list"),
    "deep.json": (b"[" * 100_000, "nested too deep"),
    "bytes.jsonl": (b'{"text": "a"}\n{"text": "\xff\xfe"}\n', "bytes.jsonl, line 2: bytes that are not UTF-8 .0xff"),
    "bytes.csv": (b"text\na\nb\nna\xefve\n", "bytes.csv, line 4: bytes that are not UTF-8 .0xef"),
    "wide.csv": (b"text,label\na,1\nb,1,2\n", "row 2: more cells than the header has columns"),
    "quote.csv": (b'text,label\n"a,1\n', "quote.csv, line"),
    "cut.parquet": (b"PAR1 nothing PAR1", "no readable Parquet file"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(tmp_path, name):
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        len(sources.load(str(tmp_path / name)))


def test_bad_specs(tmp_path):
    write(tmp_path, ".jsonl")
    for spec, message in {
        str(tmp_path / "dat.jsonl"): "nearest: 'data.jsonl'",
        str(tmp_path / "nowhere" / "data.jsonl"): "the folder .*nowhere does not exist",
        "data.xlsx": r"no data source 'data.xlsx'.*a file \(.jsonl",
        "": "a data source is a name or a path",
        "procedural:majorty": "nearest: 'majority'",
        "procedural:majority(lenth=3)": "no argument 'lenth'; nearest: 'length'",
        "procedural:majority(length=4)": "odd length",
        "procedural:copy(length=0)": "whole number from 1",
        "procedural:copy(length=True)": "whole number",
        "procedural:copy(": "cannot read",
        "tfds:imdb_revews": "nearest: 'imdb_reviews'",
    }.items():
        with pytest.raises(UserError, match=message):
            sources.load(spec)
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        sources.load(str(tmp_path / "folder.csv"))


def test_fractions_split_a_file_by_text(tmp_path):
    texts = [f"text {i % 900}" for i in range(1000)]  # 100 texts stand there twice
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": t, "n": i}) + "\n" for i, t in enumerate(texts)))
    parts = {}
    for split in sources.SPLITS:
        source = sources.load(str(path), split, validation_fraction=0.2, test_fraction=0.1)
        parts[split] = [source[i] for i in range(len(source))]
        assert source.where(0).endswith(f"line {parts[split][0]['n'] + 1}")
    assert sorted(r["n"] for rows in parts.values() for r in rows) == list(range(1000))
    words = {split: {r["text"] for r in rows} for split, rows in parts.items()}
    assert not words["train"] & words["validation"] and not words["train"] & words["test"]
    assert not words["validation"] & words["test"]
    assert 150 < len(parts["validation"]) < 250 and 60 < len(parts["test"]) < 140
    whole = sources.load(str(path))
    assert len(whole) == 1000 and len({whole.fingerprint, *(
        sources.load(str(path), s, validation_fraction=0.2).fingerprint for s in ("train", "validation"))}) == 3


def test_fractions_that_cannot_be(tmp_path):
    path = str(write(tmp_path, ".jsonl"))
    for fractions in ({"validation_fraction": 1.5}, {"test_fraction": -0.1},
                      {"validation_fraction": 0.5, "test_fraction": 0.5}):  # fmt: skip
        with pytest.raises(UserError, match="fraction"):
            sources.load(path, **fractions)
    with pytest.raises(UserError, match="none of its rows falls into the validation split"):
        len(sources.load(path, "validation", validation_fraction=1e-9))


def test_fingerprint_follows_the_content(tmp_path):
    path = write(tmp_path, ".jsonl")
    before = sources.load(str(path)).fingerprint
    os.utime(path, (1, 1))
    assert sources.load(str(path)).fingerprint == before
    path.write_text(path.read_text() + '{"text": "more"}\n')
    assert sources.load(str(path)).fingerprint != before


SOLVE = {
    "modular_addition": lambda p: str((int(p.split()[0]) + int(p.split()[2])) % 97),
    "copy": lambda p: p.removeprefix("copy ").removesuffix(" ="),
    "reverse": lambda p: " ".join(reversed(p.split()[1:-1])),
    "majority": lambda p: max("ab", key=p.split()[:-2].count),
    "counting": lambda p: str(p.split()[: p.split().index("count")].count(p.split()[-2])),
    "parity": lambda p: str(sum(map(int, p.split()[:-2])) % 2),
    "counter": lambda p: str(p.split()[3:-1].count(p.split()[1])),
    "pcfg": lambda p: str(p.split()[3:-1].count(p.split()[1])),
}
LABEL = {"majority": "ab".index}


@pytest.mark.parametrize("name", procedural.GENERATORS)
def test_procedural_rows_follow_their_rule(name):
    prompts = {}
    for split in sources.SPLITS:
        source = sources.load(f"procedural:{name}(size=300,seed=5)", split)
        assert len(source) == (300 if split == "train" else 30)
        found = [source[i] for i in range(len(source))]
        prompts[split] = {r["prompt"] for r in found}
        for row in found:
            answer = SOLVE[name](row["prompt"])
            assert row["completion"] == f" {answer}" and row["text"] == row["prompt"] + row["completion"]
            if name not in ("copy", "reverse"):
                assert row["label"] == LABEL.get(name, int)(answer)
        again = sources.load(f"procedural:{name}(seed=5, size=300)", split)
        assert again[7] == found[7] and again.fingerprint == source.fingerprint
    assert not prompts["train"] & prompts["validation"] and not prompts["train"] & prompts["test"]
    other = sources.load(f"procedural:{name}(size=300,seed=6)", "train")
    assert [other[i] for i in range(9)] != [sources.load(f"procedural:{name}(size=300,seed=5)")[i] for i in range(9)]


def test_procedural_with_too_few_prompts():
    with pytest.raises(UserError, match="too few prompts for a (train|validation|test) split"):
        for split in sources.SPLITS:
            sources.load("procedural:majority(length=1)", split)[0]


PREPARE = """
import sys, numpy as np, tensorflow_datasets as tfds
class TinyTalk(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="loud"), tfds.core.BuilderConfig(name="quiet")]
    def _info(self):
        label = tfds.features.ClassLabel(names=["bad", "good"])
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(
            {"text": tfds.features.Text(), "label": label, "raw": tfds.features.Tensor(shape=(), dtype=np.object_)}))
    def _split_generators(self, manager):
        return {"train": self._generate_examples(6), "test": self._generate_examples(2)}
    def _generate_examples(self, n):
        for i in range(n):
            raw = b"\\xff" if i == 5 else b"ok"
            yield i, {"text": f"na\\u00efve {self.builder_config.name} {i}", "label": i % 2, "raw": raw}
for name in ("loud", "quiet"):
    builder = TinyTalk(config=name, data_dir=sys.argv[1], file_format="array_record")
    builder.download_and_prepare(file_format="array_record")
"""
READ = """
import sys
from ft_jax.data import sources
from ft_jax.errors import UserError
assert not any(m.startswith("tensorflow") for m in sys.modules), "unused, yet imported"
source = sources.load("tfds:tiny_talk:quiet", "train")
broken, rows = 0, []
for i in range(len(source)):
    try:
        rows.append(source[i])
    except UserError as error:
        assert "row" in str(error) and "raw" in str(error) and "UTF-8" in str(error), error
        broken += 1
assert (len(source), len(rows), broken) == (6, 5, 1)
assert {r["text"] for r in rows} == {f"na\\u00efve quiet {i}" for i in range(5)}
assert all(type(r["label"]) is int and r["label"] == int(r["text"][-1]) % 2 for r in rows)
assert len(sources.load("tfds:tiny_talk:quiet", "train[:50%]")) == 3
assert sources.load("tfds:tiny_talk:loud", "train").fingerprint != source.fingerprint
assert sources.load("tfds:tiny_talk:quiet", "train").fingerprint == source.fingerprint
for split, message in (("validation", "it has test, train"), ("train[:x", "split")):
    try:
        sources.load("tfds:tiny_talk:quiet", split)
        raise SystemExit("no error")
    except UserError as error:
        assert message in str(error), error
assert "tensorflow" not in sys.modules and "torch" not in sys.modules
"""


def test_tfds_without_tensorflow(tmp_path):
    # A stand-in that fails to import: the test means the same where TensorFlow happens to be installed.
    (tmp_path / "tensorflow.py").write_text("raise ImportError('TensorFlow was imported')")
    env = os.environ | {"TFDS_DATA_DIR": str(tmp_path / "data"), "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.getcwd()}"}
    for code in (PREPARE, READ):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "data")], capture_output=True, text=True,
                              env=env, timeout=120)  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
