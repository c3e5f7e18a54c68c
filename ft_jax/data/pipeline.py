"""From a data config to batches: ``build`` a dataset, then ``batches``, ``prefetch`` or ``eval_batches``."""

import dataclasses
import pathlib

import grain
import numpy as np

from ft_jax.data import examples, files, mixing, packing, paraphrases, prompts, sources, tasks, tokenise
from ft_jax.errors import UserError, nearest
from ft_jax.io import assets

DEFAULTS = {
    "source": "",  # see ft_jax.data.sources.load
    "sources": {},  # {name: settings of its own}: several sources at once, each with a task id, in the order of the names
    "splits": {},  # {train/validation/test: the source's name for it, or the path of a file of its own}
    "validation_fraction": 0.1,  # held out of a file that has no validation file in splits, by the hash of its text
    "test_fraction": 0.0,  # the same for test
    "text_field": "text",
    "pair_field": "",  # second text of an encoder's pair
    "template": "",  # text made of named fields, "{question}\nAnswer:"; with completion_field it is the prompt
    "paraphrases": (),  # causal LM: templates that say what template says, one of them beside it (instruction_alignment)
    "label_words": (),  # model.head=label_words: a word for each label, at the template's [MASK] or after its end
    "prompt_field": "",  # causal LM: no loss on it
    "completion_field": "",
    "append_eos": True,  # causal LM: the end of a text is a target too
    "label_field": "label",
    "label_names": (),  # names of the labels 0, 1, …, where the field holds names
    "num_labels": 0,
    "max_length": 128,
    "truncation_side": "right",  # where a classified text that is too long is cut; left keeps its end
    "limit": 0,  # examples of the train split, a fixed random subset; 0 is all
    "eval_limit": 0,  # the same for the other splits
    "shots": 0,  # K examples of each class for train and K more for validation; 0 is all, or what the limits say
    "shots_seed": 100,  # which ones; the papers draw with 100, 13, 21, 42, 87
    "packing": False,
}


def settings(cfg):
    """``cfg`` (dict or ConfigDict) over DEFAULTS as a plain dict; UserError for unknown keys and wrong types."""
    given = cfg.to_dict() if hasattr(cfg, "to_dict") else dict(cfg)
    out = dict(DEFAULTS)
    for key, value in given.items():
        if key not in DEFAULTS:
            raise UserError(f"unknown data setting {key!r}{nearest(key, DEFAULTS)}")
        if value is None:
            continue
        kind = type(DEFAULTS[key])
        if kind is float and type(value) is int:
            value = float(value)
        if kind is tuple and isinstance(value, list):
            value = tuple(value)
        if type(value) is not kind:
            raise UserError(f"data setting {key} must be {kind.__name__}, not {value!r}")
        out[key] = value
    for key, least in (("max_length", 2), ("limit", 0), ("eval_limit", 0), ("num_labels", 0), ("shots", 0), ("shots_seed", 0)):
        if out[key] < least:
            raise UserError(f"data setting {key} must be at least {least}, not {out[key]}")
    if out["truncation_side"] not in (sides := ("right", "left")):
        raise UserError(f"data setting truncation_side is {out['truncation_side']!r}{nearest(out['truncation_side'], sides)}")
    for role in out["splits"]:
        if role not in sources.SPLITS:
            raise UserError(f"data setting splits: unknown split {role!r}{nearest(role, sources.SPLITS)}")
    if out["shots"] and out["limit"]:
        raise UserError(f"data settings shots {out['shots']} and limit {out['limit']} both choose the training examples: leave one out")
    if out["shots"] and not out["num_labels"]:
        raise UserError(f"data setting shots {out['shots']} counts examples of each class: set num_labels")
    prompts.check(out)
    paraphrases.check(out)
    if out["sources"]:
        mixing.check(out, settings)
    if out["prompt_field"] and not out["completion_field"]:
        raise UserError("data setting prompt_field needs completion_field: what is to be learnt after the prompt")
    if out["completion_field"] and not out["prompt_field"] and not out["template"]:
        raise UserError("data setting completion_field needs prompt_field, or a template that makes the prompt")
    if out["prompt_field"] and out["template"]:
        raise UserError("data settings prompt_field and template both make the prompt: leave one out")
    return out


def source_of(c, split):
    """The Source of a split: ``splits`` may give it another name, or a file of its own.

    A file that serves several splits is divided by the hash of its texts; the fractions mean nothing elsewhere.
    """
    name = c["splits"].get(split, split)
    if files.is_file_spec(name):
        return sources.load(name, split, text_field=_identity_field(c))
    if not files.is_file_spec(c["source"]):
        return sources.load(c["source"], name, text_field=c["text_field"])
    own = {role for role, value in c["splits"].items() if files.is_file_spec(value)}
    held = {f"{role}_fraction": 0.0 if role in own else c[f"{role}_fraction"] for role in ("validation", "test")}
    if split != "train" and not held[f"{split}_fraction"]:
        raise UserError(f"{c['source']} has no {split} split; set {split}_fraction, or splits.{split} to a file")
    return sources.load(c["source"], split, text_field=_identity_field(c), **held)


def _identity_field(c):
    """The field whose text decides a row's split: equal texts, or equal prompts, stay on one side."""
    if c["template"]:
        return next((f for _, f in examples.template_fields(c["template"]) if f), c["text_field"])
    return c["prompt_field"] or c["text_field"]


# Encoding: one function an objective, (tokenizer, settings) -> encode for tokenise.


def _text(c):
    fields = examples.template_fields(c["template"]) if c["template"] else None
    if fields is None:
        return lambda row, where: examples.text_of(row, c["text_field"], where)
    return lambda row, where: examples.render(fields, row, where)[0]


def _classification(tokenizer, c):
    if c["num_labels"] < 1:
        raise UserError("classification needs num_labels of at least 1")
    if c["label_names"] and len(c["label_names"]) != c["num_labels"]:
        raise UserError(f"label_names has {len(c['label_names'])} names for num_labels {c['num_labels']}")
    text, prompt = _text(c), prompts.encoder(tokenizer, c) if c["template"] and not c["pair_field"] else None

    def encode(rows, wheres):
        labels = [examples.label_of(row, c["label_field"], c["num_labels"], c["label_names"], where)
                  for row, where in zip(rows, wheres)]
        if prompt:
            return [(ids, len(ids), label) for ids, label in zip(prompt(rows, wheres), labels)]
        texts = [text(row, where) for row, where in zip(rows, wheres)]
        pairs = [examples.text_of(r, c["pair_field"], w) for r, w in zip(rows, wheres)] if c["pair_field"] else None
        encoded = tokenizer.encodings(texts, pairs, max_length=c["max_length"], side=c["truncation_side"])
        # Token types are 0, then 1 for a second text (always 0 in the RoBERTa family): where they begin says all.
        return [(e.ids, e.type_ids.index(1) if 1 in e.type_ids else len(e.ids), label)
                for e, label in zip(encoded, labels)]

    return encode


def _mlm(tokenizer, c):
    text = _text(c)

    def encode(rows, wheres):
        texts = [text(row, where) for row, where in zip(rows, wheres)]
        return [(row, 0, -1) for row in tokenizer.encode_batch(texts, None, max_length=c["max_length"])]

    return encode


def _causal_lm(tokenizer, c):
    text = _text(c)
    end = [tokenizer.eos_id] if c["append_eos"] and tokenizer.eos_id is not None else []

    def without_end(row):
        return row[:-1] if row and row[-1] == tokenizer.eos_id else row

    def whole(rows, wheres):
        encoded = tokenizer.encode_batch([text(row, where) for row, where in zip(rows, wheres)])
        return [((without_end(row) + end)[: c["max_length"]], 1, -1) for row in encoded]

    def in_two(rows, wheres):
        if c["prompt_field"]:
            prompts = [examples.text_of(row, c["prompt_field"], where, empty=True) for row, where in zip(rows, wheres)]
        else:
            prompts = [text(row, where) for row, where in zip(rows, wheres)]
        targets = [examples.text_of(row, c["completion_field"], where) for row, where in zip(rows, wheres)]
        first = tokenizer.encode_batch(prompts)
        second = tokenizer.encode_batch(targets, add_special_tokens=False)
        return [(*fit(without_end(p), q + end, c["max_length"], tokenizer.bos_id), -1) for p, q in zip(first, second)]

    return in_two if c["completion_field"] else whole


def fit(prompt, target, max_length, bos_id=None):
    """``(ids, start of the target)``, at most ``max_length``: the prompt loses its left end first, never its BOS.

    At least one token stands before the first target wherever there is a prompt.
    """
    head = prompt[:1] if prompt and prompt[0] == bos_id else []
    room = max(max_length - len(target), min(len(prompt), 1))
    if len(prompt) > room:
        body = prompt[len(head) :]
        keep = room - len(head)
        prompt = head + body[len(body) - keep :]
    ids = (prompt + target)[:max_length]
    return ids, max(1, len(prompt))


OBJECTIVES = {"classification": _classification, "causal_lm": _causal_lm, "mlm": _mlm}


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Examples of one fixed ``length`` by index; every array int32.

    classification: input_ids, attention_mask [length], label [], with a pair token_type_ids · mlm: input_ids,
    attention_mask, special_tokens_mask · causal_lm: input_ids, attention_mask, loss_mask (1 where the token is a
    target), packed also segment_ids and positions. ``info``: examples, tokens, longest, and packed: rows, filled.
    """

    name: str
    objective: str
    length: int
    arrays: dict
    info: dict
    pad_id: int
    special_ids: tuple = ()
    pair: bool = False
    packed: bool = False

    tasks = 0  # task ids: those of a `Mixed` alone
    drawn = False  # whether a batch also depends on its number: that of a `Paraphrased` alone

    def __len__(self):
        return self.info["rows" if self.packed else "examples"]

    def __getitem__(self, index):
        return {key: value[0] for key, value in self.gather([index]).items()}

    def gather(self, indices):
        """The examples at ``indices`` stacked: ``{name: [len(indices), …]}``."""
        indices = np.asarray(indices)
        if self.packed:
            out = {key: np.asarray(self.arrays[key][indices])
                   for key in ("input_ids", "segment_ids", "positions", "loss_mask")}
            return out | {"attention_mask": (out["segment_ids"] > 0).astype(np.int32)}
        begin, end = self.arrays["offsets"][indices], self.arrays["offsets"][indices + 1]
        ids = np.full((len(indices), self.length), self.pad_id, np.int32)
        for row, (i, j) in enumerate(zip(begin, end)):
            ids[row, : j - i] = self.arrays["ids"][i:j]
        where = np.arange(self.length)
        mask = where < (end - begin)[:, None]
        second = where >= self.arrays["starts"][indices][:, None]
        out = {"input_ids": ids, "attention_mask": mask.astype(np.int32)}
        if self.objective == "classification":
            out["label"] = np.asarray(self.arrays["labels"][indices])
            if self.pair:
                out["token_type_ids"] = (mask & second).astype(np.int32)
        elif self.objective == "mlm":
            out["special_tokens_mask"] = (np.isin(ids, self.special_ids) | ~mask).astype(np.int32)
        else:
            out["loss_mask"] = (mask & second).astype(np.int32)
        return out


def build(cfg, split, tokenizer, objective, vocab_size, cache_dir=None):
    """The ``Dataset`` of a split (of several sources the ``Mixed``): tokenised, and packed if asked, once, and kept in ``cache_dir``.

    ``length`` is ``max_length``, or the smallest multiple of 8 that holds the longest example where that is less.
    UserError, before anything is written, for wrong settings and wrong rows; for token ids beyond ``vocab_size``.
    """
    c = settings(cfg)
    if c["sources"]:
        return mixing.mixed({name: build(own, split, tokenizer, objective, vocab_size, cache_dir)
                             for name, own in mixing.settings_of(c).items()})  # fmt: skip
    if objective not in OBJECTIVES:
        raise UserError(f"no objective called {objective!r}{nearest(objective, OBJECTIVES)}")
    for name, owner in (("packing", "causal_lm"), ("completion_field", "causal_lm"), ("pair_field", "classification"),
                        ("label_words", "classification"), ("paraphrases", "causal_lm")):  # fmt: skip
        if c[name] and objective != owner:
            raise UserError(f"data setting {name} is for {owner}, not for {objective}")
    if c["truncation_side"] == "left" and (objective != "classification" or c["template"]):
        raise UserError("data setting truncation_side=left is for classification without a template")
    source = source_of(c, split)
    made = [_dataset({**c, "template": text}, split, source, tokenizer, objective, vocab_size, cache_dir)
            for text in (c["template"], *c["paraphrases"])]  # fmt: skip
    return paraphrases.beside(*made) if c["paraphrases"] else made[0]


def _dataset(c, split, source, tokenizer, objective, vocab_size, cache_dir):
    encode, left, drawn = OBJECTIVES[objective](tokenizer, c), c["truncation_side"] == "left", _draw(c, split, source)
    limit = 0 if drawn else c["limit" if split == "train" else "eval_limit"]
    folder = pathlib.Path(cache_dir) if cache_dir else assets.cache_dir() / "tokens"
    decides = ("text_field", "pair_field", "template", "prompt_field", "completion_field", "append_eos", "label_field",
               "label_names", "num_labels", "max_length")
    key = {"source": source.fingerprint, "tokenizer": tokenizer.fingerprint, "objective": objective, "limit": limit,
           **drawn, **{name: c[name] for name in decides}, **({"cut": "left"} if left else {})}
    if objective == "classification" and c["template"]:
        key |= {"shortened": "fields", "prompted": bool(c["label_words"])}

    def make():
        chosen = few(source, c, **drawn) if drawn else subset(len(source), limit)
        return tokenise.tokenise(source, chosen, encode)

    arrays, info = tokenise.cached(folder, key, make)
    tokenise.check_vocabulary(source, info, vocab_size)
    length = min(c["max_length"], -(-info["longest"] // 8) * 8)
    if c["packing"]:
        length = c["max_length"]
        tokens = arrays
        arrays, filled = tokenise.cached(folder, {**key, "packing": packing.BINS, "pad": tokenizer.pad_id},
                                         lambda: packing.pack(tokens, length, tokenizer.pad_id, source.name))
        info = info | filled
    return Dataset(source.name, objective, length, arrays, info, tokenizer.pad_id,
                   tuple(tokenizer.special_ids), bool(c["pair_field"]), c["packing"])


def _draw(c, split, source):
    """What decides which shots a split gets, ``{}`` where it gets none: part of the key of its tokens."""
    if not c["shots"] or split not in ("train", "validation"):
        return {}
    # Where validation is drawn from the training examples, it gets the K after those of train.
    same = split == "validation" and source.fingerprint == source_of(c, "train").fingerprint
    return {"shots": c["shots"], "shots_seed": c["shots_seed"], "skip": c["shots"] if same else 0}


def few(source, c, shots, shots_seed, skip=0):
    """Indices, in order, of ``shots`` rows of each class drawn by the seed, after the ``skip`` that are drawn first.

    UserError for a class that has fewer.
    """
    labels = [examples.label_of(source[i], c["label_field"], c["num_labels"], c["label_names"], source.where(i))
              for i in range(len(source))]  # fmt: skip
    rng, chosen = np.random.RandomState(shots_seed), []
    for label in range(c["num_labels"]):
        rows = rng.permutation(np.flatnonzero(np.asarray(labels) == label))
        if len(rows) < skip + shots:
            names = c["label_names"] or (tasks.TASKS[c["source"]].labels if c["source"] in tasks.TASKS else ())
            name = f" ({names[label]})" if label < len(names) else ""
            beside = f" beside the {skip} that train takes" if skip else ""
            raise UserError(f"{source.name}: class {label}{name} has {len(rows)} examples, too few for shots {shots}{beside}")
        chosen.append(rows[skip : skip + shots])
    return np.sort(np.concatenate(chosen))


def subset(count, limit):
    """Indices of a fixed random subset, in order; a smaller limit gives a subset of a larger one's."""
    if not limit or limit >= count:
        return np.arange(count)
    return np.sort(np.random.RandomState(0).permutation(count)[:limit])


def process_rows(batch_size, process_index, process_count):
    """The slice of a global batch that one process loads."""
    if batch_size < 1 or batch_size % process_count:
        raise UserError(f"the global batch size {batch_size} cannot be shared by {process_count} processes"
                        f"; nearest: {max(1, round(batch_size / process_count)) * process_count}")
    share = batch_size // process_count
    return slice(process_index * share, (process_index + 1) * share)


def batches(dataset, batch_size, seed, shuffle=True, process_index=0, process_count=1):
    """Endless ``grain.MapDataset``: ``ds[step]`` is the batch of a global step, whatever was read before.

    Shuffled anew each epoch; a batch may reach into the next epoch, so that every example is seen equally often.
    With several processes each gets its own rows of the same global batch.
    """
    rows = process_rows(batch_size, process_index, process_count)
    indices = grain.MapDataset.range(len(dataset)).seed(seed)
    if shuffle:
        indices = indices.shuffle()

    def load(step, chosen):
        drawn = (dataset.draw(seed, step, batch_size)[rows],) if dataset.drawn else ()
        return dataset.gather(np.asarray(chosen)[rows], *drawn)

    return indices.repeat().batch(batch_size).map_with_index(load)


def prefetch(ds, start=0, threads=2, ahead=4):
    """Iterator over ``ds[start], ds[start + 1], …``, read ahead by threads."""
    return iter(ds[start:].to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)))


def eval_batches(dataset, batch_size, process_index=0, process_count=1):
    """``grain.MapDataset`` of ceil(n / batch_size) batches that hold every example once, in order.

    ``weight`` (float32 [batch]) is 1 for an example and 0 for the padding of the last batch.
    """
    rows = process_rows(batch_size, process_index, process_count)

    def make(step):
        indices = np.arange(step * batch_size, (step + 1) * batch_size)[rows]
        weight = (indices < len(dataset)).astype(np.float32)
        return dataset.gather(np.minimum(indices, len(dataset) - 1)) | {"weight": weight}

    return grain.MapDataset.range(-(-len(dataset) // batch_size)).map(make)
