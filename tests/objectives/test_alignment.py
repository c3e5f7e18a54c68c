"""An instruction beside a paraphrase: the loss in numpy, which rendering a batch holds, and what training does to their distance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.train import get_config
from ft_jax import registry, train
from ft_jax.data import paraphrases, pipeline
from ft_jax.errors import UserError
from ft_jax.io import tokenizer
from tests import folders
from tests.helpers import make_batch, make_model, make_objective, make_params

VOCAB, LENGTH = 11, 7


def shifted():
    """Two rows of the same answers after prompts of 2 and 4, of 3 and 1 tokens; the rest is padding."""
    rng = np.random.default_rng(0)
    batch = {f"{k}{n}": np.zeros((2, LENGTH), np.int32) for k in ("", "paraphrase_") for n in ("input_ids", "attention_mask", "loss_mask")}
    for row, (answer, *prompts) in enumerate([(3, 2, 4), (2, 3, 1)]):
        tokens = rng.integers(1, VOCAB, answer)
        for kind, prompt in zip(("", "paraphrase_"), prompts):
            batch[f"{kind}input_ids"][row, : prompt + answer] = [*rng.integers(1, VOCAB, prompt), *tokens]
            batch[f"{kind}attention_mask"][row, : prompt + answer] = 1
            batch[f"{kind}loss_mask"][row, prompt : prompt + answer] = 1
    return batch, [(3, 2, 4), (2, 3, 1)]


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 2.0)])
def test_the_loss_in_numpy_and_where_it_pulls(weights):
    batch, rows = shifted()
    batch["weight"] = np.asarray(weights, np.float32)
    logits = jnp.asarray(np.random.default_rng(1).standard_normal((4, LENGTH, VOCAB)), jnp.float32)
    fn, log_p, ce, kl = registry.get("objective", "instruction_alignment").fn, log_softmax(logits), 0.0, 0.0
    for row, (answer, first, second) in enumerate(rows):
        for t in range(answer):
            p, q = log_p[row, first + t - 1], log_p[2 + row, second + t - 1]
            ce -= weights[row] * p[batch["input_ids"][row, first + t]]
            kl += weights[row] * (np.exp(p) * (p - q)).sum()
    count = sum(w * answer for w, (answer, *_) in zip(weights, rows))
    loss, metrics = fn(lambda params, inputs, rng: params, logits, batch, None, weight=0.7)
    assert float(metrics["divergence"]) == pytest.approx(kl / count, rel=1e-5)
    assert float(loss) == float(metrics["loss"]) == pytest.approx((ce + 0.7 * kl) / count, rel=1e-5)
    grads = [jax.grad(lambda x, w=w: fn(lambda params, inputs, rng: params, x, batch, None, weight=w)[0])(logits) for w in (0.0, 0.7)]
    np.testing.assert_array_equal(grads[0][:2], grads[1][:2])  # the instruction's side of the KL is a constant
    assert not np.asarray(grads[0][2:]).any()
    pulled = {(int(b), int(t)) for b, t in zip(*np.nonzero(np.abs(grads[1][2:]).sum(-1)))}
    assert pulled == {(row, second + t - 1) for row, (answer, _, second) in enumerate(rows) for t in range(answer)}
    same = {**batch, **{f"paraphrase_{k}": batch[k] for k in ("input_ids", "attention_mask", "loss_mask")}}
    alike = jnp.concatenate([logits[:2], logits[:2]])
    assert float(fn(lambda params, inputs, rng: params, alike, same, None)[1]["divergence"]) == pytest.approx(0, abs=1e-7)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    with folders.small_home(tmp_path_factory, 8) as home:
        folders.make_model_folder(home / "llama", "llama", "lm")
        folders.write_rows(home / "alphabets.jsonl", folders.alphabets(np.random.default_rng(0), 200))
        yield home


TEMPLATES = {"template": "the film {prompt}", "completion_field": "completion", "paraphrases": ("{prompt}", "a story of {prompt}", "it was {prompt} and")}


def config(home, objective="instruction_alignment(weight=2.0)", data=(), **keys):
    cfg = get_config(f"model={home / 'llama'},data={home / 'alphabets.jsonl'},objective={objective}").to_dict()
    cfg["data"] |= {"max_length": 16, **TEMPLATES, **dict(data)}
    cfg["eval"]["batch_size"] = 8
    return cfg | {"batch_size": 8, "mesh": {"data": 1, "fsdp": 1, "tensor": 1}, **keys}


def test_a_batch_holds_each_answer_twice_by_seed_and_step(home):
    data = pipeline.build(config(home)["data"], "train", tok := tokenizer.load(home / "llama"), "causal_lm", 64)
    assert isinstance(data, paraphrases.Paraphrased) and data.length == 16 == data[0]["paraphrase_input_ids"].shape[0]
    stream, again, other = (pipeline.batches(data, 8, seed) for seed in (3, 3, 4))
    seen = []
    for step in (0, 1, 40):  # the last one in the second epoch, read without those before
        batch = again[step]
        for key, value in stream[step].items():
            np.testing.assert_array_equal(value, batch[key], err_msg=key)
        for row in range(8):
            answers, texts = [], []
            for kind in ("", "paraphrase_"):
                ids, real, targets = (batch[f"{kind}{k}"][row] for k in ("input_ids", "attention_mask", "loss_mask"))
                answers.append(ids[targets > 0].tolist())
                texts.append(tok.decode(ids[(real > 0) & (targets == 0)].tolist()).removeprefix("<s>").split())
            assert answers[0] == answers[1] and len(answers[0]) == 5
            letters = texts[0][2:]
            form = [["X", *letters], ["a", "story", "of", *letters], ["it", "was", *letters, "and"]]
            assert texts[0][:2] == ["the", "film"] and ["X", *texts[1]] in form[:1] + [["X", *f] for f in form[1:]]
            seen.append(len(texts[1]) - len(letters) + 3 * (texts[1][:1] == ["it"]))
    assert len(set(seen)) == 3, "all paraphrases are drawn"
    assert (other[0]["input_ids"] != stream[0]["input_ids"]).any()
    lengths = [row["paraphrase_attention_mask"].sum() - row["attention_mask"].sum() for row in next(iter([[data[i] for i in range(6)]]))]
    assert lengths == [-2, 1, 1] * 2, "without a step, the index decides"
    rows = pipeline.batches(data, 8, 3, process_index=1, process_count=2)[5]
    np.testing.assert_array_equal(rows["paraphrase_input_ids"], stream[5]["paraphrase_input_ids"][4:])


@pytest.mark.slow
def test_held_out_paraphrases_come_closer_with_the_term_than_without(home):
    keys = {"steps": 40, "eval": {"every": 20, "batch_size": 8, "metric": "divergence"}, "log": {"tensorboard": False},
            "optimizer": {"learning_rate": 3e-3}}  # fmt: skip
    found = {w: train.train(config(home, f"instruction_alignment(weight={w})", **keys), home / f"run{w}")["validation"] for w in (0.0, 2.0)}
    assert found[2.0]["divergence"] < 0.5 * found[0.0]["divergence"], found
    assert found[2.0]["accuracy"] > 0.3 and found[0.0]["accuracy"] > 0.3, "both learn the answers"


@pytest.mark.parametrize("objective, data, words", [
    ("instruction_alignment", {"paraphrases": ()}, "data setting paraphrases and objective 'instruction_alignment' go together"),
    ("causal_lm", {}, "go together; this objective is 'causal_lm'"),
    ("instruction_alignment(wieght=1)", {}, "has no parameter 'wieght'; nearest: 'weight'"),
    ("instruction_alignment(weight=-1.0)", {}, "weight is -1.0; it cannot be negative"),
    ("instruction_alignmnet", {}, "no objective called 'instruction_alignmnet'; nearest: 'instruction_alignment'"),
    ("instruction_alignment", {"completion_field": ""}, "paraphrases needs a template that makes the prompt, and completion_field"),
    ("instruction_alignment", {"packing": True}, "paraphrases and packing"),
    ("instruction_alignment", {"paraphrases": ("the film {prompt}",)}, "each another one than template"),
    ("instruction_alignment", {"paraphrases": ("of {text}",)}, "'of {text}' and the template differ in the field 'prompt'"),
    ("instruction_alignment", {"paraphrases": ("of {prompt!r}",)}, "is no plain field name"),
])  # fmt: skip
def test_what_makes_no_pairs_is_one_line_before_compute(objective, data, words, home):
    with pytest.raises(UserError, match=words) as error:
        train.prepare(train.ready(config(home, objective, data)))
    assert "\n" not in str(error.value)


def test_the_terms_of_kernels_and_a_models_own_dropout_see_both_renderings():
    """One pass over both, so that whatever looks at a pass sees instruction and paraphrase alike."""
    model = make_model("llama")
    params, batch, calls = make_params(model), make_batch(model), []

    def apply(params, inputs, rng):
        calls.append(inputs["input_ids"].shape)
        return model.apply(params, inputs, rng)

    fn = registry.get("objective", "instruction_alignment").fn
    loss, _ = fn(apply, params, {**batch, "tasks": np.arange(4, dtype=np.int32)}, None)
    assert calls == [(8, 8)] and float(loss) > 0
    whole = make_objective("causal_lm", model)(params, batch, None)[1]
    _, metrics = fn(apply, params, batch, None, weight=0.0)
    assert float(metrics["loss"]) == pytest.approx(float(whole["loss"]), rel=1e-5)
