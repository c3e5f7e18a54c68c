"""Tokenizers: a thin reader of ``tokenizer.json`` with truncation, special tokens and sandboxed chat templates."""

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import json
import pathlib

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers

from ft_jax.errors import UserError, nearest, one_line
from ft_jax.io import files

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
         "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back; ``special`` maps ``bos_token`` … ``mask_token`` to the token's text."""

    backend: tokenizers.Tokenizer = dataclasses.field(repr=False)
    special: dict[str, str]
    chat_template: str | None = dataclasses.field(repr=False)
    fingerprint: str

    @property
    def vocab_size(self):
        """Number of ids, added tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def id(self, token):
        """Id of a token, or None."""
        return self.backend.token_to_id(token)

    def _special_id(self, key):
        return self.id(self.special[key]) if key in self.special else None

    @property
    def pad_id(self):
        """Id to fill with: the padding token, else the end token, else 0 (attention masks hide it)."""
        return next((i for i in (self._special_id("pad_token"), self.eos_id) if i is not None), 0)

    bos_id = property(lambda self: self._special_id("bos_token"), doc="Id of the begin token, or None.")
    eos_id = property(lambda self: self._special_id("eos_token"), doc="Id of the end token, or None.")
    cls_id = property(lambda self: self._special_id("cls_token"), doc="Id of the class token, or None.")
    sep_id = property(lambda self: self._special_id("sep_token"), doc="Id of the separator token, or None.")
    mask_id = property(lambda self: self._special_id("mask_token"), doc="Id of the mask token, or None.")
    unk_id = property(lambda self: self._special_id("unk_token"), doc="Id of the unknown token, or None.")

    @property
    def special_ids(self):
        """Ids of all special tokens."""
        return sorted(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)

    def encodings(self, texts, pairs=None, *, max_length=None, add_special_tokens=True, side="right"):
        """One ``tokenizers.Encoding`` (ids, type_ids, offsets, special_tokens_mask) a text or pair of texts.

        ``max_length`` counts special tokens and cuts on a ``side``, right or left, the longer text of a pair first.
        """
        texts = list(texts)
        if pairs is not None:
            pairs = list(pairs)
            if len(pairs) != len(texts):
                raise UserError(f"{len(texts)} texts but {len(pairs)} second texts")
            texts = list(zip(texts, pairs, strict=True))
        for row, text in enumerate(texts):
            if not all(isinstance(t, str) for t in (text if pairs is not None else (text,))):
                raise UserError(f"text {row} is no string: {str(text)[:60]!r}")
        with _library("tokenizer.json cannot encode this text"):
            self._truncate(max_length, pairs is not None, add_special_tokens, side)
            return self.backend.encode_batch(texts, add_special_tokens=add_special_tokens)

    def _truncate(self, max_length, pair, add_special_tokens, side):
        if max_length is None:
            self.backend.no_truncation()
            return
        added = self.backend.num_special_tokens_to_add(pair) if add_special_tokens else 0
        if max_length <= added:
            raise UserError(f"max_length {max_length} leaves no room for text beside {added} special tokens")
        self.backend.enable_truncation(max_length, strategy="longest_first", direction=side)

    def encode_batch(self, texts, pairs=None, *, max_length=None, add_special_tokens=True):
        """Token ids of each text (or pair of texts) as lists of int; ``max_length`` as in ``encodings``."""
        made = self.encodings(texts, pairs, max_length=max_length, add_special_tokens=add_special_tokens)
        return [e.ids for e in made]

    def decode(self, ids, *, skip_special_tokens=False):
        """Text of token ids."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def apply_chat_template(self, messages, *, add_generation_prompt=False, **variables):
        """The text of a conversation ``[{"role": …, "content": …}, …]`` in this model's own form.

        The template comes with the model and is not trusted: it runs in jinja2's immutable sandbox.
        """
        if self.chat_template is None:
            raise UserError("this tokenizer has no chat template; give text, or a model that was tuned for chat")
        for i, message in enumerate(messages):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise UserError(f"message {i} is not of the form {{'role': …, 'content': …}}: {str(message)[:60]}")
        # A copy through JSON: the template sees plain values only and can change nothing of the caller's.
        plain = json.loads(json.dumps({"messages": messages, **variables}))
        given = {"tools": None, "documents": None, **self.special, **plain,
                 "add_generation_prompt": add_generation_prompt}  # fmt: skip
        try:
            return _compile(self.chat_template).render(**given)
        except jinja2.TemplateError as error:
            raise UserError(f"chat template: {one_line(error)}") from None
        except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError) as error:
            raise UserError(f"chat template: {type(error).__name__}: {one_line(error)}") from None


class _Generation(jinja2.ext.Extension):
    """``{% generation %}…{% endgeneration %}`` marks what the assistant says; rendered as its body."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


@functools.lru_cache(maxsize=32)
def _compile(template):
    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


@contextlib.contextmanager
def _library(what):
    """UserError for what the tokenizers library raises: plain Exceptions, and panics, which are no Exceptions at all."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what}: {one_line(error)}") from None


def load(folder):
    """The tokenizer of a model folder (``tokenizer.json`` and, where present, its two config files).

    UserError for a missing or unreadable file, or a special token that is not in the vocabulary.
    """
    folder = pathlib.Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder}: holds no tokenizer.json{nearest('tokenizer.json', files.entries(folder))}")
    text = path.read_bytes()
    with _library(f"{path}: cannot be read as a tokenizer"):
        backend = tokenizers.Tokenizer.from_buffer(text)
    backend.no_padding()
    backend.no_truncation()
    config = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            config |= files.read_json(folder / name)
    special = {}
    for key in SPECIAL:
        value = config.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if value is None:
            continue
        if not isinstance(value, str) or backend.token_to_id(value) is None:
            raise UserError(f"{folder}: {key} {value!r} is not in the vocabulary{nearest(value, _added(backend))}")
        special[key] = value
    template = _template(folder, config)
    digest = hashlib.sha256(text + json.dumps([special, template], sort_keys=True).encode()).hexdigest()
    return Tokenizer(backend, special, template, digest)


def _added(backend):
    return [token.content for token in backend.get_added_tokens_decoder().values()]


def _template(folder, config):
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text("utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones: the one called default
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise UserError(f"{folder}: chat_template in tokenizer_config.json is no text")
    return template
