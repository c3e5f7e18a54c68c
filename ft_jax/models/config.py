"""``config.json`` of a Hugging Face checkpoint -> ``ModelConfig``, and back."""

import dataclasses
import math

from ft_jax.errors import UserError, nearest

ENCODERS = ("bert", "roberta")
DECODERS = ("llama", "mistral", "qwen2", "qwen3")
ROPE_KEYS = {  # rope type -> (required, optional) keys of its scaling
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
    "yarn": (("factor",), ("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow")),
}
ROPE_NEUTRAL = (("partial_rotary_factor", 1.0), ("truncate", True))  # what goes without saying
HEADS = {
    "encoder": ("none", "pooled", "prototype", "classification", "label_words", "mlm"),
    "decoder": ("none", "pooled", "prototype", "classification", "label_words", "lm"),
}
LANGUAGE_HEADS = {"encoder": "mlm", "decoder": "lm"}  # whose weights label_words reads
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
}
WHOLE = {  # key of config.json -> the least and the largest that it may be, where it is given
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings"), (1, 2**31 - 1)),
    "num_hidden_layers": (1, 10_000), "num_labels": (0, 1_000_000),
    **dict.fromkeys(("num_key_value_heads", "head_dim", "type_vocab_size", "sliding_window", "max_window_layers"), (0, 2**31 - 1)),
    "pad_token_id": (-1, 2**31 - 1),
}  # fmt: skip
REAL = {  # the same of the keys that are real numbers
    **dict.fromkeys(("layer_norm_eps", "rms_norm_eps"), (0, 1)), "rope_theta": (0, math.inf),
    **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout"), (0, 1)),
}  # fmt: skip
# family -> head -> the class transformers would load the checkpoint with
ARCHITECTURES = {
    "bert": {"none": "BertModel", "classification": "BertForSequenceClassification", "mlm": "BertForMaskedLM"},
    "roberta": {
        "none": "RobertaModel",
        "classification": "RobertaForSequenceClassification",
        "mlm": "RobertaForMaskedLM",
    },
    **{
        family: {"none": f"{cls}Model", "classification": f"{cls}ForSequenceClassification", "lm": f"{cls}ForCausalLM"}
        for family, cls in {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}.items()
    },
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that decides shapes and maths of a model; ``raw`` is the config.json it came from."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    activation: str
    norm_eps: float
    head: str = "none"
    num_labels: int = 2
    label_ids: tuple[int | tuple[int, ...], ...] = ()  # label_words: the token of each class, or its several tokens
    mask_id: int | None = None  # label_words of an encoder: the token whose place is read
    pad_token_id: int | None = None
    type_vocab_size: int = 0
    tie_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    rope_theta: float = 10000.0
    rope_scaling: tuple[tuple[str, float | str], ...] = ()
    windows: tuple[int, ...] = ()  # per layer, 0 = full attention; empty = full everywhere
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    raw: dict = dataclasses.field(default_factory=dict, compare=False, repr=False)

    @property
    def kind(self):
        return "encoder" if self.family in ENCODERS else "decoder"

    @property
    def positions(self):
        """How many positions a sequence may have; RoBERTa's count from ``pad_token_id`` + 1."""
        return self.max_positions - (self.family == "roberta") * (1 + (self.pad_token_id or 0))

    @property
    def words(self):
        """The tokens of each class as a tuple of tuples."""
        return tuple(ids if isinstance(ids, tuple) else (ids,) for ids in self.label_ids)

    @property
    def weights_head(self):
        """The head whose weights this one has: label words read a language model's."""
        return LANGUAGE_HEADS[self.kind] if self.head == "label_words" else self.head

    def with_head(self, head, num_labels=None, label_ids=None, mask_id=None):
        """The same model with another head; ``label_ids`` and ``mask_id`` are for label_words, kept if not given."""
        if head not in HEADS[self.kind]:
            raise UserError(f"a {self.family} model has no head {head!r}{nearest(head, HEADS[self.kind])}")
        words = {"label_ids": (), "mask_id": None}
        if head == "label_words":
            words["label_ids"] = tuple(tuple(i) if isinstance(i, (list, tuple)) else i for i in label_ids or self.label_ids)
            if self.kind == "encoder":
                words["mask_id"] = self.mask_id if mask_id is None else mask_id
            if num_labels and words["label_ids"] and num_labels != len(words["label_ids"]):
                raise UserError(f"num_labels is {num_labels} but label_ids names {len(words['label_ids'])} tokens")
            num_labels = len(words["label_ids"]) or num_labels
        return dataclasses.replace(self, head=head, num_labels=num_labels or self.num_labels, **words)

    def check(self):
        """UserError for more labels than a head can have, and label words that cannot be read."""
        if self.num_labels > WHOLE["num_labels"][1]:
            raise UserError(f"num_labels is {self.num_labels}; at most {WHOLE['num_labels'][1]}")
        if self.head != "label_words":
            return
        if not self.label_ids:
            raise UserError("head 'label_words' needs label_ids, the token of each class")
        owner = {}
        for i, token in ((i, token) for i, ids in enumerate(self.words) for token in ids):
            if not 0 <= token < self.vocab_size:
                raise UserError(f"label_ids: token {token} of class {i} is outside the vocabulary of {self.vocab_size}")
            if owner.setdefault(token, i) != i or self.words[i].count(token) > 1:
                raise UserError(f"label_ids: class {i} has the same token {token} as class {owner[token]}")
        for i, ids in enumerate(self.words):
            if not ids:
                raise UserError(f"label_ids: class {i} has no token")
        if self.kind == "encoder" and self.mask_id is None:
            raise UserError("head 'label_words' of an encoder needs mask_id, and its tokenizer has no mask token")


def config_from_hf(raw, head=None, num_labels=None, label_ids=None):
    """``ModelConfig`` of a config.json dict; head and label_ids default to what it names.

    Raises UserError for an unsupported ``model_type``, activation, rope or position scheme, or a missing key.
    """
    family = raw.get("model_type")
    if family not in ARCHITECTURES:
        raise UserError(f"config.json: model_type {family!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    for kinds, table in (((int,), WHOLE), ((int, float), REAL)):
        for key, (low, high) in table.items():
            if key in raw and not (raw[key] is None and low <= 0):
                _check_number(key, raw[key], kinds, low, high)
    try:
        config = (_encoder if family in ENCODERS else _decoder)(family, raw)
    except KeyError as error:
        raise UserError(f"config.json: key {error.args[0]!r} is missing (model_type {family!r})") from None
    if config.hidden_size % config.num_heads and "head_dim" not in raw:
        raise UserError(f"config.json: hidden_size {config.hidden_size} is not a multiple of {config.num_heads} heads")
    if config.num_heads % config.num_kv_heads:
        raise UserError(f"config.json: {config.num_heads} heads cannot share {config.num_kv_heads} heads of keys and values")
    head, own = head or _head_of(raw, family), raw.get("ft_jax", {})
    if head == "label_words":
        return config.with_head(head, num_labels, label_ids or own.get("label_ids"), own.get("mask_id"))
    return config.with_head(head, num_labels or len(raw.get("id2label") or {}) or raw.get("num_labels") or 2)


def _check_number(key, value, kinds, low, high):
    if type(value) not in kinds or not math.isfinite(value) or not low <= value <= high:
        what = "whole number" if kinds == (int,) else "number"
        raise UserError(f"config.json: a value is not of its kind: {key} is {str(value)[:40]!r}; it is a {what} from {low} to {high}")


def _head_of(raw, family):
    own = raw.get("ft_jax", {}).get("head")
    if own:
        return own
    named = (raw.get("architectures") or [None])[0]
    for head, cls in ARCHITECTURES[family].items():
        if named == cls:
            return head
    return "none" if family in ENCODERS else "lm"


def _activation(raw, key):
    name = raw.get(key, "gelu" if raw["model_type"] in ENCODERS else "silu")
    if name not in ACTIVATIONS:
        raise UserError(f"config.json: {key} {name!r} is not supported{nearest(name, ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _encoder(family, raw):
    if raw.get("position_embedding_type", "absolute") != "absolute":
        raise UserError(
            f"config.json: position_embedding_type {raw['position_embedding_type']!r} is not supported; "
            "supported: absolute"
        )
    return ModelConfig(
        family=family, vocab_size=raw["vocab_size"], hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"], num_layers=raw["num_hidden_layers"],
        num_heads=raw["num_attention_heads"], num_kv_heads=raw["num_attention_heads"],
        head_dim=raw["hidden_size"] // raw["num_attention_heads"], max_positions=raw["max_position_embeddings"],
        activation=_activation(raw, "hidden_act"), norm_eps=raw.get("layer_norm_eps", 1e-12),
        pad_token_id=raw.get("pad_token_id", 1 if family == "roberta" else 0),
        type_vocab_size=raw.get("type_vocab_size", 2), tie_embeddings=True,
        qkv_bias=True, out_bias=True, mlp_bias=True, hidden_dropout=raw.get("hidden_dropout_prob", 0.1),
        attention_dropout=raw.get("attention_probs_dropout_prob", 0.1), raw=raw,
    )  # fmt: skip


def _rope(raw):
    """(theta, scaling) from either spelling: ``rope_parameters`` (new) or ``rope_theta`` + ``rope_scaling``."""
    scaling = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = scaling.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0
    kind = scaling.pop("type", None) or "default"
    kind = scaling.pop("rope_type", kind)
    if kind not in ROPE_KEYS:
        raise UserError(f"config.json: rope type {kind!r} is not supported; supported: {', '.join(ROPE_KEYS)}")
    required, optional = ROPE_KEYS[kind]
    scaling = {k: v for k, v in scaling.items() if v is not None}
    for key in required:
        if key not in scaling:
            raise UserError(f"config.json: rope scaling {kind!r} lacks {key!r}")
    for key in {"factor", *required, *optional} & scaling.keys():
        _check_number(f"rope scaling {key}", scaling[key], (int, float), 0, math.inf)
    for key, value in scaling.items():
        if key not in (*required, *optional) and (key, value) not in ROPE_NEUTRAL:
            raise UserError(f"config.json: rope scaling {kind!r} with {key} {value!r} is not supported; supported keys: "
                            f"{', '.join((*required, *optional)) or 'none'}")
    if kind == "default":
        return float(theta), ()
    if optional:
        scaling.setdefault("original_max_position_embeddings", raw["max_position_embeddings"])
    return float(theta), (("rope_type", kind), *((k, scaling[k]) for k in sorted(scaling) if k in (*required, *optional)))


def _windows(family, raw, layers):
    """Sliding-window width per layer (0 = full), as transformers decides it."""
    width = raw.get("sliding_window")
    if not width or family == "llama" or (family != "mistral" and not raw.get("use_sliding_window", False)):
        return ()
    if raw.get("layer_types"):
        return tuple(width if kind == "sliding_attention" else 0 for kind in raw["layer_types"])
    first = 0 if family == "mistral" else raw.get("max_window_layers", layers)
    return tuple(width if i >= first else 0 for i in range(layers))


def _decoder(family, raw):
    layers, heads = raw["num_hidden_layers"], raw["num_attention_heads"]
    theta, scaling = _rope(raw)
    bias = bool(raw.get("attention_bias", False)) and family != "qwen2"
    return ModelConfig(
        family=family, vocab_size=raw["vocab_size"], hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"], num_layers=layers, num_heads=heads,
        num_kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or (128 if family == "qwen3" else raw["hidden_size"] // heads),
        max_positions=raw["max_position_embeddings"], activation=_activation(raw, "hidden_act"),
        norm_eps=raw.get("rms_norm_eps", 1e-6), pad_token_id=raw.get("pad_token_id"),
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2" or bias, out_bias=bias, mlp_bias=bool(raw.get("mlp_bias", False)),
        qk_norm=family == "qwen3", rope_theta=theta, rope_scaling=scaling, windows=_windows(family, raw, layers),
        attention_dropout=raw.get("attention_dropout", 0.0), raw=raw,
    )  # fmt: skip


def config_to_hf(config):
    """The config.json dict to write: ``raw`` with the head, labels and vocabulary as they are now."""
    known = ARCHITECTURES[config.family]
    raw = {**config.raw, "model_type": config.family, "vocab_size": config.vocab_size,
           "architectures": [known.get(config.weights_head, known["none"])]}  # fmt: skip
    raw.pop("ft_jax", None)
    if config.head not in known:
        raw["ft_jax"] = {"head": config.head}
    if config.head == "label_words":
        raw["ft_jax"] |= {"label_ids": list(config.label_ids)}
        raw["ft_jax"] |= {"mask_id": config.mask_id} if config.kind == "encoder" else {}
    if config.head in ("classification", "prototype"):
        labels = raw.get("id2label") or {}
        if len(labels) != config.num_labels:
            raw["id2label"] = {str(i): f"LABEL_{i}" for i in range(config.num_labels)}
            raw["label2id"] = {f"LABEL_{i}": i for i in range(config.num_labels)}
    return raw
