"""Templates with label words: which tokens they are, what a row becomes, what is cut when a text is too long."""

import json

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from ft_jax.data import pipeline, prompts, tasks, templates
from ft_jax.errors import UserError
from ft_jax.io.tokenizer import Tokenizer

A = 7  # id of the word "a"


def settings(template, words, **more):
    return pipeline.settings({"template": template, "label_words": words, "num_labels": len(words), **more})


def ids(tok, kind, template, words, **more):
    return prompts.label_ids(tok, kind, settings(template, words, **more))


@pytest.fixture
def bpe():
    """A byte-level BPE tokenizer: a space belongs to the word after it; it ends texts with </s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(["</s>", *alphabet])}
    merges = [("Ġ", "n"), ("Ġn", "o"), ("Ġ", "y"), ("Ġy", "e"), ("n", "o"), (".", "Ċ")]
    for pair in merges:
        vocabulary["".join(pair)] = len(vocabulary)
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    return Tokenizer(backend, {"eos_token": "</s>"}, None, "bpe")


def rows_of(tok, template, words, rows, max_length, tmp_path, **more):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"label": i % len(words), **row}) + "\n" for i, row in enumerate(rows)))
    cfg = {"source": str(path), "splits": {"train": str(path)}, "template": template, "label_words": words,
           "num_labels": len(words), "max_length": max_length, **more}  # fmt: skip
    ds = pipeline.build(cfg, "train", tok, "classification", tok.vocab_size, tmp_path / "cache")
    assert "token_type_ids" not in ds[0] and [int(ds[i]["label"]) for i in range(len(ds))] == [i % len(words) for i in range(len(ds))]
    return [ds[i]["input_ids"][ds[i]["attention_mask"] > 0].tolist() for i in range(len(ds))]


def test_label_ids_of_an_encoder(bert):
    assert ids(bert, "encoder", "{text} x [MASK] y", ("a", "c")) == (A, A + 2)
    assert ids(bert, "encoder", "[MASK] {text}", ("c", "b", "a")) == (A + 2, A + 1, A)


def test_label_ids_of_a_decoder_carry_the_space(bpe):
    no, ye, bare = (bpe.id(token) for token in ("Ġno", "Ġye", "no"))
    assert ids(bpe, "decoder", "{text} ?", ("no", "ye")) == (no, ye)
    assert ids(bpe, "decoder", "{text} ?", (" no", " ye")) == (no, ye)
    assert ids(bpe, "decoder", "{text}?\n", ("no", "a")) == (bare, bpe.id("a"))  # after a line break there is no space


BAD = {
    "label word 'yes' is 2 tokens in the template \\(' ye' 's'\\)": ("bpe", "decoder", "{text} ?", ("no", "yes")),
    "end the template without a space": ("bpe", "decoder", "{text} ", ("no", "ye")),
    "label word 'zz' is not in the vocabulary": ("bert", "encoder", "{text} [MASK]", ("a", "zz")),
    "label word 'a b' is 2 tokens in the template \\('a' 'b'\\)": ("bert", "encoder", "{text} [MASK]", ("a b", "c")),
    "label words 'a' and 'a' are the same token 'a'": ("bert", "encoder", "{text} [MASK]", ("a", "b", "a")),
    "an encoder's has a \\[MASK\\]": ("bert", "encoder", "{text} x", ("a", "b")),
    "a decoder's ends where the label word follows": ("bert", "decoder", "{text} [MASK]", ("a", "b")),
    "has 2 places for the label word": ("bert", "encoder", "[MASK] {text} [MASK]", ("a", "b")),
    "tokenizer has no mask token": ("bpe", "encoder", "{text} [MASK]", ("no", "ye")),
    "needs data.template and data.label_words": ("bert", "encoder", "", ()),
    "needs a template": ("bert", "encoder", "", ("a", "b")),
    "the word of class 1 is ' '": ("bert", "encoder", "{text} [MASK]", ("a", " ")),
}


@pytest.mark.parametrize("message", BAD)
def test_words_and_templates_that_cannot_be(message, bert, bpe):
    name, kind, template, words = BAD[message]
    with pytest.raises(UserError, match=message) as error:
        ids({"bert": bert, "bpe": bpe}[name], kind, template, words)
    assert "\n" not in str(error.value)


def test_settings_that_do_not_fit(bert, tmp_path):
    with pytest.raises(UserError, match="label_words has 2 words for num_labels 3"):
        settings("{text} [MASK]", ("a", "b"), num_labels=3)
    with pytest.raises(UserError, match="write {second} into the template instead"):
        settings("{text} [MASK]", ("a", "b"), pair_field="second")
    with pytest.raises(UserError, match="label_words is for classification, not for mlm"):
        cfg = {**settings("{text} [MASK]", ("a", "b")), "source": "imdb"}
        pipeline.build(cfg, "train", bert, "mlm", 33, tmp_path)


def test_a_long_text_is_cut_and_the_prompt_is_not(bert, tmp_path):
    """[CLS] text x [MASK] y [SEP]: the text loses its end."""
    short, long = rows_of(bert, "{text} x [MASK] y", ("a", "b"), [{"text": "a b"}, {"text": "a b c d e f g"}], 8, tmp_path)
    assert short == [2, A, A + 1, A + 23, 4, A + 24, 3]
    assert long == [2, A, A + 1, A + 2, A + 23, 4, A + 24, 3]


def test_the_longer_field_loses_its_end_first(bert, tmp_path):
    rows = [{"text": "a b c d e", "pair": "f g"}, {"text": "a", "pair": "b c d e f"}]
    first, second = rows_of(bert, "{text} [MASK] {pair} z", ("a", "b"), rows, 8, tmp_path)
    assert first == [2, A, A + 1, 4, A + 5, A + 6, A + 25, 3]
    assert second == [2, A, 4, A + 1, A + 2, A + 3, A + 25, 3]


def test_a_decoders_prompt_ends_with_its_last_token(bpe, tmp_path):
    whole, cut = rows_of(bpe, "{text}: ok", ("no", "ye"), [{"text": "ab"}, {"text": "äbcdefgh"}], 8, tmp_path)
    assert bpe.decode(whole) == "ab: ok" and bpe.decode(cut) == "äbc: ok" and len(cut) == 8
    # The end token that the tokenizer adds is left out: the label word follows the prompt.
    assert 0 not in whole + cut


def test_a_token_that_the_template_shares_stays(bpe, tmp_path):
    """The text's full stop and the template's line break are one token."""
    (cut,) = rows_of(bpe, "{text}\nok", ("no",), [{"text": "abcdef."}], 6, tmp_path)
    assert bpe.decode(cut) == "abc.\nok"


def test_templates_without_label_words_keep_their_words_too(bert, tmp_path):
    c = pipeline.settings({"template": "{text} z", "max_length": 5})
    (cut,) = prompts.encoder(bert, c)([{"text": "a b c d e"}], ["row 1"])
    assert cut == [2, A, A + 1, A + 25, 3]


def test_rows_that_cannot_be_prompted_are_named(bert, tmp_path):
    with pytest.raises(UserError, match=r"rows.jsonl, line 2: its text holds the mask token '\[MASK\]' itself"):
        rows_of(bert, "{text} [MASK]", ("a", "b"), [{"text": "a"}, {"text": "b [MASK]"}], 8, tmp_path)
    with pytest.raises(UserError, match="max_length 4 leaves no room for text beside the 5 tokens of the template"):
        rows_of(bert, "{text} x y [MASK]", ("a", "b"), [{"text": "a"}], 4, tmp_path)


def test_the_mask_token_has_the_tokenizers_spelling(bert, tmp_path):
    tok = Tokenizer(bert.backend, {**bert.special, "mask_token": "z"}, None, "other")
    (row,) = rows_of(tok, "{text} x [MASK]", ("a",), [{"text": "b"}], 8, tmp_path)
    assert row == [2, A + 1, A + 23, A + 25, 3]


def test_label_words_decide_no_tokens(bert, tmp_path, monkeypatch):
    calls, real = [], pipeline.tokenise.tokenise
    monkeypatch.setattr(pipeline.tokenise, "tokenise", lambda *a: calls.append(1) or real(*a))
    for words in (("a", "b"), ("c", "d")):
        rows_of(bert, "{text} x [MASK]", words, [{"text": "b"}], 8, tmp_path)
    assert len(calls) == 1


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize("task", templates.PROMPTS)
def test_every_task_has_a_prompt(task, kind):
    c = pipeline.settings(templates.settings(task, kind))
    prompts.check(c)
    assert len(c["label_words"]) == len(tasks.TASKS[task].labels) == c["num_labels"]
    assert (prompts.MASK in c["template"]) == (kind == "encoder")
    row = tasks.rows(task, "test")[0] if task in tasks.MADE else {"text": "", "asked": "", "passage": ""}
    assert all(field in row for _, field in prompts.examples.template_fields(c["template"]) if field)


def test_prompts_and_tasks_are_the_same():
    assert set(templates.PROMPTS) == set(tasks.TASKS)
