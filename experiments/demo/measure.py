"""What a tree of dense weights can still do: task, other domain, calibration, forgetting."""

import functools

from tqdm.auto import tqdm

from ft_jax.analysis import forgetting, predictions
from ft_jax.data import pipeline, sources
from ft_jax.io import hf, tokenizer
from ft_jax.objectives import inputs_of


@functools.lru_cache(maxsize=4)
def _predictor(model, objective):
    return predictions.predictor(lambda params, batch: model.apply(params, inputs_of(batch)), objective)


def predict(model, params, data, s, label=None):
    """Answers over the examples (classification) or target tokens (causal LM) of a dataset; see `predictions`."""
    batches = pipeline.eval_batches(data, s.eval_batch)
    bar = tqdm(batches, desc=label, unit="batch", leave=False, disable=label is None)
    return _predictor(model, s.objective)(params, bar)


def datasets(s, base_folder, vocab_size):
    """{train, validation, test, ood}: what the study learns from, selects masks on, and reports on.

    WinoGrande has no public test half: there masks are selected on a part of train, and validation is reported on.
    """
    tok = tokenizer.load(hf.resolve(base_folder))
    specs = {"train": (s.data, "train"), "validation": ({**s.data, "limit": s.data.get("eval_limit", 0)}, s.splits[0]),
             "test": ({**s.data, "eval_limit": s.test_limit}, s.splits[1]), "ood": (s.ood, "test")}  # fmt: skip
    return {k: pipeline.build(cfg, split, tok, s.objective, vocab_size) for k, (cfg, split) in specs.items() if cfg}


def contrastive(model, trees, s, base_folder):
    """{name: contrastive loss and retrieval accuracy} of the pooled embeddings, over the halves of held-out texts."""
    tok, spec = tokenizer.load(hf.resolve(base_folder)), s.forgetting
    source = sources.load(spec["source"], "validation")
    texts = [" ".join(source[i]["text"].split()[: spec["words"]]) for i in range(spec["texts"])]

    def encode(texts):
        return tok.encode_batch(texts, max_length=spec["max_length"])

    batches = forgetting.pair_batches(texts, encode, batch_size=spec["batch"], length=spec["max_length"], pad_id=tok.pad_id)
    embed = model.with_head("pooled").apply
    return {name: forgetting.contrastive_loss(embed, p, batches, label=f"forgetting: {name}") for name, p in trees.items()}


def books(model, trees, s, base_folder):
    """{name: perplexity} on passages of novels."""
    tok = tokenizer.load(hf.resolve(base_folder))
    data = pipeline.build(s.forgetting["books"], "test", tok, "causal_lm", model.config.vocab_size)
    batches = list(pipeline.eval_batches(data, s.eval_batch))
    return {name: forgetting.perplexity(model.apply, p, batches, label=f"novels: {name}") for name, p in trees.items()}


def choices(model, trees, base_folder, spec):
    """{name: multiple-choice accuracy}, every choice after its prompt scored by its log-probability (also per character)."""
    tok = tokenizer.load(hf.resolve(base_folder))
    source = sources.load(spec["source"], spec["split"])
    asked = []
    for i in range(min(spec["limit"], len(source))):
        row = source[i]
        prompt = tok.encode_batch([row["prompt"]])[0]
        ends = tok.encode_batch(row["completions"], add_special_tokens=False)
        room = spec["length"] - max(len(end) for end in ends)  # a long prompt loses its left end, the same for every choice
        asked.append({"choices": [(prompt[-room:] + end, len(prompt[-room:])) for end in ends],
                      "lengths": [len(c) for c in row["completions"]], "label": row["gold"]})  # fmt: skip
    batches = forgetting.choice_batches(asked, batch_size=spec["batch"], length=spec["length"])
    return {name: forgetting.multiple_choice_accuracy(model.apply, p, batches, label=f"{spec['source']}: {name}")
            for name, p in trees.items()}  # fmt: skip
