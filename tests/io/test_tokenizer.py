"""Tokenizer reading: plain errors, truncation, fingerprints, and templates that cannot leave the sandbox."""

import json
import pathlib

import pytest
import tokenizers

from ft_jax.errors import UserError
from ft_jax.io import tokenizer

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "a", "b", "c", "d", "e"]


def make(folder, template=None, **config):
    folder = pathlib.Path(folder)
    folder.mkdir(exist_ok=True)
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(WORDS[:3])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    backend.enable_truncation(3)
    backend.enable_padding()
    backend.save(str(folder / "tokenizer.json"))
    values = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>"} | config
    (folder / "tokenizer_config.json").write_text(
        json.dumps(values | ({"chat_template": template} if template else {}))
    )
    return folder


def test_ids_and_truncation(tmp_path):
    made = tokenizer.load(make(tmp_path, pad_token="<pad>"))
    # what the file says of truncation and padding is for its author's use, not ours
    assert made.encode_batch(["a b c d e", "a z"]) == [[1, 4, 5, 6, 7, 8, 2], [1, 4, 3, 2]]
    assert made.encode_batch(["a b c d e"], max_length=4) == [[1, 4, 5, 2]]
    assert made.encode_batch(["a b c d e"], max_length=4, add_special_tokens=False) == [[4, 5, 6, 7]]
    assert made.encode_batch(["a b c d", "a"], ["e", "b c d"], max_length=6) == [[1, 4, 5, 2, 8, 2], [1, 4, 2, 5, 6, 2]]
    encoding = made.encodings(["a b"], ["c"])[0]
    assert encoding.type_ids == [0, 0, 0, 0, 1, 1] and encoding.offsets[1:3] == [(0, 1), (2, 3)]
    assert (made.pad_id, made.bos_id, made.eos_id, made.unk_id, made.cls_id, made.mask_id) == (0, 1, 2, 3, None, None)
    assert made.vocab_size == 9 and made.special_ids == [0, 1, 2]
    assert made.decode([1, 4, 5, 2], skip_special_tokens=True) == "a b"
    assert tokenizer.load(make(tmp_path)).pad_id == 2  # no padding token: the end token stands in


def test_fingerprint(tmp_path):
    """Equal for equal content wherever it lies, another one for any change that matters."""
    first = tokenizer.load(make(tmp_path / "a"))
    assert tokenizer.load(make(tmp_path / "b")).fingerprint == first.fingerprint
    first.encode_batch(["a b"], max_length=3)
    others = [tokenizer.load(make(tmp_path / "c", template="x")), tokenizer.load(make(tmp_path / "d", bos_token="a"))]
    text = (tmp_path / "a" / "tokenizer.json").read_text().replace('"e":8', '"f":8')
    (tmp_path / "a" / "tokenizer.json").write_text(text)
    prints = {first.fingerprint, tokenizer.load(tmp_path / "a").fingerprint, *(o.fingerprint for o in others)}
    assert len(prints) == (4 if '"f":8' in text else 3)


def test_bad_input(tmp_path):
    made = tokenizer.load(make(tmp_path))
    with pytest.raises(UserError, match="text 1 is no string: '3'"):
        made.encode_batch(["a", 3])
    with pytest.raises(UserError, match="2 texts but 1 second texts"):
        made.encode_batch(["a", "b"], ["c"])
    for length in (0, 2, -1):
        with pytest.raises(UserError, match=f"max_length {length} leaves no room for text beside 2 special tokens"):
            made.encode_batch(["a"], max_length=length)
    with pytest.raises(UserError, match="bos_token '<z>' is not in the vocabulary"):
        tokenizer.load(make(tmp_path, bos_token="<z>"))
    make(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(UserError, match="tokenizer.json: cannot be read as a tokenizer"):
        tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").rename(tmp_path / "tokeniser.json")
    with pytest.raises(UserError, match="holds no tokenizer.json; nearest: 'tokeniser.json'"):
        tokenizer.load(tmp_path)


CHAT = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('touch PWNED').read() }}",
    "{{ raise_exception.__globals__['__builtins__']['open']('PWNED', 'w') }}",
    "{{ strftime_now.__code__ }}",
    "{{ ('%s' | attr('format')).__self__ }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ '{m.__class__}'.format_map({'m': messages}) }}",
    "{{ messages | map(attribute='__class__') | list | first }}",
    "{{ (messages | map(attribute='__class__') | list)[0].mro() }}",
    "{{ self._TemplateReference__context.environment }}{{ self.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__['sys'].modules['os'].system('touch PWNED') }}",
    "{% import 'os' as os %}{{ os.system('touch PWNED') }}",
    "{% include '/etc/passwd' %}",
    "{{ lipsum.__globals__['os'].popen('touch PWNED').read() }}",
    "{{ messages.append({'role': 'x', 'content': 'y'}) }}",
    "{{ messages[0].update({'content': 'changed'}) }}",
    "{{ messages[0].clear() }}",
    "{{ range(10 ** 9) | list | length }}",
])  # fmt: skip
def test_malicious_template(tmp_path, monkeypatch, template):
    """Nothing of Python, of the files or of the caller's messages is reached."""
    monkeypatch.chdir(tmp_path)
    made = tokenizer.load(make(tmp_path / "t", template))
    chat = [dict(CHAT[0])]
    try:
        text = made.apply_chat_template(chat)
    except UserError as error:
        assert str(error).startswith("chat template: ") and "\n" not in str(error)
    else:
        assert not any(word in text for word in ("class", "<function", "object at", "Popen", "root:", "environment")), (
            text
        )
    assert chat == CHAT and not pathlib.Path("PWNED").exists()


def test_template_errors(tmp_path):
    with pytest.raises(UserError, match="no chat template"):
        tokenizer.load(make(tmp_path)).apply_chat_template(CHAT)
    made = tokenizer.load(
        make(tmp_path, "{% if messages[0].role != 'system' %}{{ raise_exception('System first!') }}{% endif %}")
    )
    with pytest.raises(UserError, match="chat template: System first!"):
        made.apply_chat_template(CHAT)
    with pytest.raises(UserError, match="chat template: "):
        tokenizer.load(make(tmp_path, "{% for %}")).apply_chat_template(CHAT)
    with pytest.raises(UserError, match="message 1 is not of the form"):
        made.apply_chat_template([CHAT[0], "hello"])
    with pytest.raises(UserError, match="chat_template in tokenizer_config.json is no text"):
        tokenizer.load(make(tmp_path, {"a": 1}))


def test_template_sources(tmp_path):
    """A file beside wins over the config; of several named ones the default is taken."""
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes {{ messages[0].content }}"}]
    made = tokenizer.load(make(tmp_path, named))
    assert made.apply_chat_template(CHAT) == "yes hi"
    (tmp_path / "chat_template.jinja").write_text("file {{ bos_token }}{{ add_generation_prompt }}")
    assert tokenizer.load(tmp_path).apply_chat_template(CHAT, add_generation_prompt=True) == "file <s>True"
