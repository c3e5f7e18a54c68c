"""The same examples under an instruction and under a paraphrase of it: ``data.paraphrases``, templates beside ``data.template``."""

import dataclasses

import numpy as np

from ft_jax.data import examples
from ft_jax.errors import UserError


def check(c):
    """UserError for paraphrases without a template and a completion, or that ask for other fields than it does."""
    if not c["paraphrases"]:
        return
    if not c["template"] or not c["completion_field"]:
        raise UserError("data setting paraphrases needs a template that makes the prompt, and completion_field")
    for other in ("packing", "sources"):
        if c[other]:
            raise UserError(f"data settings paraphrases and {other}: an example stands beside its paraphrase, leave one out")
    seen, fields = {c["template"]}, _fields(c["template"])
    for text in c["paraphrases"]:
        if not isinstance(text, str) or not text.strip() or text in seen:
            raise UserError(f"data setting paraphrases holds {text!r}; it takes templates, each another one than template")
        if odd := sorted(_fields(text) ^ fields):
            raise UserError(f"data setting paraphrases: {text!r} and the template differ in the field {odd[0]!r}")
        seen.add(text)


def _fields(template):
    return {field for _, field in examples.template_fields(template) if field}


@dataclasses.dataclass(frozen=True)
class Paraphrased:
    """``first``, and each example once more as one of ``others`` has it: arrays under ``paraphrase_`` and their name."""

    first: object
    others: tuple

    tasks, drawn = 0, True

    @property
    def name(self):
        return self.first.name

    @property
    def objective(self):
        return self.first.objective

    @property
    def length(self):
        return self.first.length

    @property
    def info(self):
        return self.first.info

    def __len__(self):
        return len(self.first)

    def __getitem__(self, index):
        return {key: value[0] for key, value in self.gather([index]).items()}

    def draw(self, seed, step, count):
        """Which paraphrase each row of batch number ``step`` gets: a function of the seed and the step alone."""
        return np.random.default_rng((seed, int(step))).integers(len(self.others), size=count)

    def gather(self, indices, which=None):
        """The examples at ``indices`` stacked; ``which`` paraphrase of each, by default its index modulo their number."""
        indices = np.asarray(indices)
        which, beside = indices % len(self.others) if which is None else np.asarray(which), {}
        for number in np.unique(which):
            rows = which == number
            for key, value in self.others[number].gather(indices[rows]).items():
                beside.setdefault(f"paraphrase_{key}", np.zeros((len(indices), *value.shape[1:]), value.dtype))[rows] = value
        return self.first.gather(indices) | beside


def beside(first, *others):
    """The `Paraphrased` of data sets of the same examples, padded to the longest."""
    length = max(part.length for part in (first, *others))
    first, *others = (dataclasses.replace(part, length=length) for part in (first, *others))
    return Paraphrased(first, tuple(others))
