"""What the demo's models can still do: task, other domain, calibration, forgetting."""

from experiments import measure
from ft_jax.analysis import forgetting
from ft_jax.data import pipeline, sources
from ft_jax.io import hf, tokenizer


def predict(model, params, data, s, label=None):
    return measure.predict(model, params, data, s.objective, s.eval_batch, label)


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
    spec = s.forgetting
    source = sources.load(spec["source"], "validation")
    texts = [" ".join(source[i]["text"].split()[: spec["words"]]) for i in range(spec["texts"])]
    batches = measure.halves(base_folder, texts, batch_size=spec["batch"], length=spec["max_length"])
    return {name: measure.contrastive(model, p, batches, f"forgetting: {name}") for name, p in trees.items()}


def books(model, trees, s, base_folder):
    """{name: perplexity} on passages of novels."""
    tok = tokenizer.load(hf.resolve(base_folder))
    data = pipeline.build(s.forgetting["books"], "test", tok, "causal_lm", model.config.vocab_size)
    batches = list(pipeline.eval_batches(data, s.eval_batch))
    return {name: forgetting.perplexity(model.apply, p, batches, label=f"novels: {name}") for name, p in trees.items()}


def choices(model, trees, base_folder, spec):
    """{name: multiple-choice accuracy}, every choice after its prompt scored by its log-probability (also per character)."""
    batches = measure.questions(base_folder, spec["source"], spec["split"], limit=spec["limit"], batch_size=spec["batch"],
                                length=spec["length"])  # fmt: skip
    return {name: forgetting.multiple_choice_accuracy(model.apply, p, batches, label=f"{spec['source']}: {name}")
            for name, p in trees.items()}  # fmt: skip
