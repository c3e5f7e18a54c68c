"""Several sources as one data set: ``data.sources = {name: settings}``, each example with its source's number as task id."""

import dataclasses

import numpy as np

from ft_jax.errors import UserError

# What is one for all sources: it decides the model's head, or what a batch is.
SHARED = ("sources", "label_words", "packing", "paraphrases", "max_length")


def settings_of(c):
    """``{name: data settings}`` of the sources in the order of their task ids, which is that of their names.

    A source's settings stand over the common ones; its name is its ``source`` unless they say otherwise.
    """
    return {name: {**c, "sources": {}, "source": name, **dict(c["sources"][name])} for name in sorted(c["sources"])}


def check(c, settings):
    """UserError for sources that are no mixture; ``settings`` checks the settings of one."""
    if c["source"]:
        raise UserError(f"data settings source {c['source']!r} and sources both say where examples come from: leave one out")
    if len(c["sources"]) < 2:
        raise UserError(f"data setting sources holds {len(c['sources'])} source; it takes two or more, or use source")
    for name, own in c["sources"].items():
        if not hasattr(own, "items"):
            raise UserError(f"data setting sources.{name} is {own!r}; it is a group of settings, {{}} for none of its own")
        if odd := [key for key in own if key in SHARED]:
            raise UserError(f"data setting sources.{name} sets {odd[0]}, which is one for all sources")
    for name, one in settings_of(c).items():
        try:
            found = settings(one)
        except UserError as error:
            raise UserError(f"data setting sources.{name}: {error}") from None
        if found["num_labels"] > c["num_labels"]:
            raise UserError(f"data setting sources.{name} has num_labels {found['num_labels']}, more than the "
                            f"{c['num_labels']} of all: set num_labels to the largest")


@dataclasses.dataclass(frozen=True)
class Mixed:
    """Data sets one after the other, as one of the same ``length``; every batch has ``tasks`` int32 [B] besides."""

    name: str
    parts: tuple
    info: dict

    drawn = False

    @property
    def objective(self):
        return self.parts[0].objective

    @property
    def length(self):
        return self.parts[0].length

    @property
    def tasks(self):
        """How many task ids there are."""
        return len(self.parts)

    def __len__(self):
        return sum(map(len, self.parts))

    def __getitem__(self, index):
        return {key: value[0] for key, value in self.gather([index]).items()}

    def gather(self, indices):
        """The examples at ``indices`` stacked, and ``tasks``: which source each is of."""
        indices, ends = np.asarray(indices), np.cumsum([len(part) for part in self.parts])
        tasks, out = np.searchsorted(ends, indices, side="right"), {}
        for task in np.unique(tasks):
            rows = tasks == task
            for key, value in self.parts[task].gather(indices[rows] - (ends[task - 1] if task else 0)).items():
                out.setdefault(key, np.zeros((len(indices), *value.shape[1:]), value.dtype))[rows] = value
        return out | {"tasks": tasks.astype(np.int32)}


def mixed(parts):
    """The `Mixed` of ``{name: Dataset}``: padded to the longest, with token types for all where one has a second text."""
    length, pair = max(part.length for part in parts.values()), any(part.pair for part in parts.values())
    alike = tuple(dataclasses.replace(part, length=length, pair=pair) for part in parts.values())
    info = {key: sum(part.info[key] for part in alike) for key in ("examples", "tokens")}
    return Mixed(" + ".join(parts), alike, info | {"longest": max(part.info["longest"] for part in alike)})
