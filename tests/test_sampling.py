"""Generation with a cache: the tokens that the whole sequence would give, and those of transformers; what drawing leaves out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ft_jax import kernels, sampling, taps
from ft_jax.errors import UserError
from ft_jax.io import hf
from tests.helpers import FIRST, VOCAB, make_model, make_params

PROMPTS = [[7, 9, 11, 30, 12], [21], [40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56]]


def by_hand(model, params, prompt, new):
    """Greedy tokens, each from a forward pass over all that came before; behind it padding, so that one program does."""
    ids, run, length = list(prompt), jax.jit(model.apply), max(map(len, PROMPTS)) + new
    for _ in range(new):
        behind = [0] * (length - len(ids))
        batch = {"input_ids": np.asarray([ids + behind]), "attention_mask": np.asarray([[1] * len(ids) + behind])}
        ids.append(int(run(params, batch)[0, len(ids) - 1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_greedy_tokens_are_those_of_the_whole_sequence(family):
    """Rows of several lengths; windows of 4 and 5 tokens in mistral and qwen2."""
    model = make_model(family)
    params = make_params(model, spread=0.4)
    found = sampling.generate(model, params, PROMPTS, max_new_tokens=9)
    assert found == [by_hand(model, params, prompt, 9) for prompt in PROMPTS]
    assert len({tuple(row) for row in found}) == 3 and len(set(found[0])) > 2


def test_with_adapters_a_prefix_and_frozen_layers():
    model = make_model("llama")
    params = kernels.adapt(make_params(model, spread=0.4), ((r"layers/.*/kernel", "lora(rank=2)"),), jax.random.key(0))
    params = taps.attach(model, params, (("prefix", "prefix_tuning(length=3)"), ("ffn_out", "adapter(size=4)")), jax.random.key(1))
    params = jax.tree.map(lambda x: x + 0.05 if x.dtype == jnp.float32 else x, params)
    found = sampling.generate(model, params, PROMPTS, max_new_tokens=5)
    assert found == [by_hand(model, params, prompt, 5) for prompt in PROMPTS]
    assert found != sampling.generate(model, kernels.merge({k: v for k, v in params.items() if k != "taps"}), PROMPTS, max_new_tokens=5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_transformers_says_the_same(family, tmp_path):
    import torch
    import transformers

    model = make_model(family)
    params = make_params(model, spread=0.4)
    hf.save(tmp_path, model, params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    length = max(map(len, PROMPTS))
    ids, mask = ([[fill] * (length - len(p)) + [1] * len(p) for p in PROMPTS] for fill in (0, 0))
    ids = [[0] * (length - len(p)) + p for p in PROMPTS]
    out = theirs.generate(torch.tensor(ids), attention_mask=torch.tensor(mask), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert sampling.generate(model, params, PROMPTS, max_new_tokens=12) == out[:, length:].tolist()


def test_a_row_ends_with_its_end():
    model = make_model("llama")
    params = make_params(model, spread=0.4)
    whole = sampling.generate(model, params, PROMPTS, max_new_tokens=9)
    end = whole[0][2]
    for row, cut in zip(whole, sampling.generate(model, params, PROMPTS, max_new_tokens=9, ends=(end,)), strict=True):
        assert cut == (row[: row.index(end) + 1] if end in row else row)


def test_drawn_tokens_follow_the_distribution():
    model = make_model("llama")
    params = make_params(model, spread=0.4)
    rows = 3000
    drawn = sampling.generate(model, params, [PROMPTS[0]] * rows, max_new_tokens=1, temperature=0.7, seed=3)
    want = jax.nn.softmax(model.apply(params, {"input_ids": jnp.asarray([PROMPTS[0]])})[0, -1] / 0.7)
    counts = np.bincount([row[0] for row in drawn], minlength=VOCAB) / rows
    assert np.abs(counts - want).max() < 4 * np.sqrt(0.25 / rows)
    again, other = (sampling.generate(model, params, PROMPTS, max_new_tokens=6, temperature=1.0, seed=seed) for seed in (1, 2))
    assert again == sampling.generate(model, params, PROMPTS, max_new_tokens=6, temperature=1.0, seed=1) != other


@pytest.mark.parametrize("options, kept", [
    ({"top_k": 2}, {0, 1}), ({"top_p": 0.5}, {0}), ({"top_p": 0.51}, {0, 1}), ({"top_p": 0.81}, {0, 1, 2}), ({"top_k": 3, "top_p": 0.9}, {0, 1, 2}), ({}, {0, 1, 2, 3}),
])  # fmt: skip
def test_what_is_left_to_draw_from(options, kept):
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]]))
    assert set(np.flatnonzero(np.isfinite(sampling.narrowed(logits, **options)[0]))) == kept


def test_what_generation_refuses():
    model = make_model("llama")
    params = make_params(model)
    for prompts, options, message in (
        ([[7], []], {}, "at least one token in each prompt"), ([[7]], {"temperature": -1.0}, "temperature >= 0"), ([[7]], {"top_p": 0.0}, "0 < top_p <= 1"),
        ([[7] * 60], {"max_new_tokens": 9}, "60 tokens of prompt and 9 new ones are more than the 64 positions"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            sampling.generate(model, params, prompts, **{"max_new_tokens": 4, **options})
    prompted = taps.attach(model, params, (("prompt", "prompt_tuning(length=3)"),), jax.random.key(1))
    with pytest.raises(UserError, match="taps at prompt work on a whole sequence"):
        sampling.generate(model, prompted, [[FIRST]], max_new_tokens=2)
    encoder = make_model("bert")
    with pytest.raises(UserError, match="generation needs a decoder with head 'lm', and this bert model has 'classification'"):
        sampling.generate(encoder, make_params(encoder), [[FIRST]], max_new_tokens=2)
