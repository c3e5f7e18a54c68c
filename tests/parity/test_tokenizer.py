"""Token ids, decoding and chat templates against transformers, on the bundled models and a small vocabulary."""

import random

import pytest
import tokenizers
import transformers

from ft_jax.io import assets, gguf, hf, tokenizer

PIECES = [
    "The capital of France is Paris.", "don't can't I'll we've", "naïve café — “quotes” …", "日本語のテキスト", "Привет, мир!",
    "مرحبا بالعالم", "नमस्ते दुनिया", "emoji 👩‍👩‍👧‍👦 🎉", "tabs\tand\nnew\r\nlines", "   leading and trailing   ",
    "a  b   c    d",
    "3.14159", "2024-11-21", "$1,234.56", "x=1;y=22;z=333", "def f(x):\n    return x ** 2\n",
    "<|im_start|>user\nhi<|im_end|>",
    "<|endoftext|>", "[CLS] [MASK] [SEP]", "http://a.b/c?d=e&f=%20", "ALL CAPS AND camelCase snake_case", "",
    " ", "\n\n\n", "ﬁ ligature ½ ² Ⅷ", "e\u0301 combining", "zero\u200bwidth\u00a0space", "\ufeffbom",
    "a" * 300, "0123456789" * 5,
    "isn't it?!...", "«guillemets»", "中文，标点。", "한국어 문장", "ไทย", "C++ & C#", "\\escape \\n", "'single' \"double\"",
    "\x00\x01",
]  # fmt: skip


def texts(count=260):
    """Every piece alone, and random joins of them."""
    rng = random.Random(0)
    joined = [rng.choice(["", " ", "\n", "  "]).join(rng.sample(PIECES, rng.randint(2, 5)))
              for _ in range(count - len(PIECES))]  # fmt: skip
    return PIECES + joined


def same(ours, theirs, strings):
    """Ids and decoded text equal on every string."""
    for text, ids in zip(strings, ours.encode_batch(strings), strict=True):
        assert ids == theirs(text)["input_ids"], text
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False), text
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False), text  # fmt: skip


@pytest.mark.slow
def test_minilm_tokenizer(real_model):
    folder = hf.resolve(real_model("minilm"))
    ours, theirs = tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    same(ours, theirs, texts())
    for name in ("pad", "cls", "sep", "mask", "unk"):
        assert getattr(ours, f"{name}_id") == getattr(theirs, f"{name}_token_id") is not None
    assert ours.vocab_size == len(theirs)
    first, second = texts()[:60], texts()[60:120]
    for length in (8, 24):
        want = theirs(first, second, truncation=True, max_length=length)
        got = ours.encodings(first, second, max_length=length)
        assert [e.ids for e in got] == want["input_ids"] and [e.type_ids for e in got] == want["token_type_ids"]
        assert (
            ours.encode_batch(first, max_length=length)
            == theirs(first, truncation=True, max_length=length)["input_ids"]
        )
    want = theirs(first, add_special_tokens=False, return_offsets_mapping=True)
    got = ours.encodings(first, add_special_tokens=False)
    assert [e.ids for e in got] == want["input_ids"] and [e.offsets for e in got] == want["offset_mapping"]


@pytest.fixture(scope="module")
def upstream_split():
    """The split SmolLM2's own tokenizer.json has: digits one by one, then GPT-2's. transformers' reader of GGUF files
    leaves the digits out, so it differs from upstream where white space stands before a digit."""
    return tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])  # fmt: skip


@pytest.mark.slow
def test_smollm2_tokenizer(real_model, upstream_split, tmp_path):
    file = assets.gguf_file(real_model("smollm2"))
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    folder = gguf.cached_folder(file)
    ours = tokenizer.load(folder)
    strings = texts()
    plain = [t for t in strings if not any(c.isdigit() for c in t)]
    assert len(plain) >= 100
    same(ours, theirs, plain)
    theirs.backend_tokenizer.pre_tokenizer = upstream_split
    assert len(strings) >= 200
    same(ours, theirs, strings)
    same(ours, transformers.AutoTokenizer.from_pretrained(folder), strings)
    for name in ("pad", "bos", "eos", "unk"):
        assert getattr(ours, f"{name}_id") == getattr(theirs, f"{name}_token_id") is not None
    assert ours.vocab_size == len(theirs) == 49152
    for text, ids in zip(strings, ours.encode_batch(strings), strict=True):
        assert ours.decode(ids) == text  # byte-level: nothing is lost


CHATS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <b>&amp;</b>"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b\n"}, {"role": "user", "content": "{{ c }}"}],
]


@pytest.mark.slow
@pytest.mark.parametrize("prompt", [False, True])
def test_smollm2_chat_template(real_model, prompt):
    folder = hf.resolve(real_model("smollm2"))
    ours, theirs = tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for chat in CHATS:
        want = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
        assert ours.apply_chat_template(chat, add_generation_prompt=prompt) == want
        assert "<|im_start|>" in want and want.endswith("assistant\n") == prompt


TEMPLATES = {
    "trim": "{% for m in messages %}\n  {% if m.role == 'user' %}\n{{ m.content | trim }}\n  {% endif %}\n{% endfor %}",
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
    "sorted": "{{ {'b': 'é<>', 'a': 1} | tojson(sort_keys=true) }}",
    "special": "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}{{ tools is none }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}|{% endfor %}",
    "loop": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "prompt": "{% if add_generation_prompt %}{{ 'A:' }}{% else %}-{% endif %}{{ strftime_now('%Y') }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_template_features(name, tmp_path):
    """What templates in the wild use renders as transformers renders it."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    theirs.chat_template = TEMPLATES[name]
    theirs.save_pretrained(tmp_path)
    ours = tokenizer.load(tmp_path)
    for chat in CHATS:
        for prompt in (False, True):
            want = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
            assert ours.apply_chat_template(chat, add_generation_prompt=prompt) == want
