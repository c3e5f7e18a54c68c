"""Tiny Hugging Face model folders with a real tokenizer, and data files that such a model learns in seconds."""

import json
import os
import pathlib
import subprocess
import sys

import tokenizers
from tokenizers import models as token_models
from tokenizers import pre_tokenizers, processors

from ft_jax.io import files, hf
from tests import helpers

ROOT = pathlib.Path(__file__).resolve().parents[1]
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<s>", "</s>")
GOOD = ("good", "great", "superb", "lovely")
BAD = ("bad", "awful", "dull", "dreadful")
NEUTRAL = ("the", "film", "was", "a", "story", "of", "and", "it")
LETTERS = tuple("abcdefghij")
WORDS = (*SPECIAL, *GOOD, *BAD, *NEUTRAL, *LETTERS)


def _tokenizer(family, words):
    backend = tokenizers.Tokenizer(token_models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(list(SPECIAL))
    ids = {w: words.index(w) for w in SPECIAL}
    if family in ("bert", "roberta"):
        backend.post_processor = processors.TemplateProcessing(
            "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [(w, ids[w]) for w in ("[CLS]", "[SEP]")])
        special = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "mask_token": "[MASK]"}
    else:
        backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", ids["<s>"])])
        special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "[PAD]"}
    return backend, {**special, "unk_token": "[UNK]"}


def make_model_folder(path, family="bert", head="none", *, seed=0, mask=True, words=WORDS, **changes):
    """A tiny random checkpoint: config.json, model.safetensors, tokenizer.json; ``changes`` are keys of config.json."""
    model = helpers.make_model(family, head, vocab_size=changes.pop("vocab_size", len(WORDS)), **changes)
    path = pathlib.Path(path)
    hf.save(path, model, helpers.make_params(model, seed))
    backend, special = _tokenizer(family, words)
    backend.save(str(path / "tokenizer.json"))
    if not mask:
        special.pop("mask_token", None)
    files.write_json(path / "tokenizer_config.json", special)
    return path


def write_rows(path, rows):
    """Rows as JSON lines."""
    path = pathlib.Path(path)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def reviews(rng, count):
    """Labelled sentences: one telling word among neutral ones."""
    rows = []
    for _ in range(count):
        label = int(rng.integers(2))
        words = [str(w) for w in rng.choice(NEUTRAL, 5)]
        words[rng.integers(5)] = str(rng.choice((BAD, GOOD)[label]))
        rows.append({"text": " ".join(words), "label": label})
    return rows


def recited(rng, count):
    """Texts that begin freely and then say the alphabet."""
    return [{"text": " ".join((*map(str, rng.choice(NEUTRAL, 3)), *LETTERS[:8]))} for _ in range(count)]


def alphabets(rng, count, length=4):
    """Prompts of letters and their continuation: the next letters of the (circular) alphabet."""
    rows = []
    for _ in range(count):
        start = int(rng.integers(len(LETTERS)))
        letters = [LETTERS[(start + i) % len(LETTERS)] for i in range(2 + length)]
        prompt = " ".join((*map(str, rng.choice(NEUTRAL, 2)), *letters[:2]))
        completion = " ".join(letters[2:])
        rows.append({"prompt": prompt, "completion": completion, "text": f"{prompt} {completion}"})
    return rows


def run_script(name, *args, **options):
    """``python scripts/<name> args`` in a process of its own; stdout and stderr as text."""
    env = {**os.environ, "PYTHONWARNINGS": "ignore"} | options.pop("env", {})
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, args)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, **options)
