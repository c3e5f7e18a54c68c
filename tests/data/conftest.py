import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from ft_jax.io.tokenizer import Tokenizer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]


def make(kind):
    """A word tokenizer of 33 ids: ``bert`` puts [CLS] a [SEP] b [SEP] around texts, ``lm`` a <s> before them."""
    backend = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(WORDS[:7])
    if kind == "bert":
        special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
                   "mask_token": "[MASK]"}  # fmt: skip
        backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    else:
        special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "[UNK]"}
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 5)])
    return Tokenizer(backend, special, None, kind)


@pytest.fixture
def bert():
    return make("bert")


@pytest.fixture
def lm():
    return make("lm")
