"""Logits and hidden states against transformers: random tiny models of every family, and the real weights."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
import transformers

from ft_jax.data import pipeline, prompts, templates
from ft_jax.io import hf, safetensors, tokenizer
from ft_jax.models import config_from_hf

transformers.utils.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()
TOLERANCE = 2e-4
SMALL = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 4,
         "max_position_embeddings": 64, "initializer_range": 0.3}  # fmt: skip
ENCODER = SMALL | {"num_labels": 3, "hidden_act": "gelu"}
GQA = SMALL | {"num_key_value_heads": 2, "num_labels": 3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}

CASES = {
    "bert": ("Bert", "Model", ENCODER, {}),
    "bert-mlm": ("Bert", "ForMaskedLM", ENCODER, {}),
    "bert-classification": ("Bert", "ForSequenceClassification", ENCODER, {}),
    "bert-gelu-new": ("Bert", "ForMaskedLM", ENCODER, {"hidden_act": "gelu_new"}),
    "bert-relu": ("Bert", "ForMaskedLM", ENCODER, {"hidden_act": "relu"}),
    "roberta": ("Roberta", "Model", ENCODER, {"type_vocab_size": 1}),
    "roberta-mlm": ("Roberta", "ForMaskedLM", ENCODER, {"type_vocab_size": 1}),
    "roberta-classification": ("Roberta", "ForSequenceClassification", ENCODER, {"type_vocab_size": 1}),
    "llama2": ("Llama", "ForCausalLM", GQA, {"num_key_value_heads": 4}),
    "llama2-model": ("Llama", "Model", GQA, {"num_key_value_heads": 4}),
    "llama2-linear": ("Llama", "ForCausalLM", GQA, {"rope_parameters": LINEAR}),
    "llama3": ("Llama", "ForCausalLM", GQA, {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama-biases": ("Llama", "ForCausalLM", GQA, {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("Llama", "ForCausalLM", GQA, {"head_dim": 12}),
    "llama-classification": ("Llama", "ForSequenceClassification", GQA, {}),
    "mistral-window": ("Mistral", "ForCausalLM", GQA, {"sliding_window": 5}),
    "mistral-full": ("Mistral", "ForCausalLM", GQA, {"sliding_window": None}),
    "mistral-classification": ("Mistral", "ForSequenceClassification", GQA, {"sliding_window": 5}),
    "qwen2": ("Qwen2", "ForCausalLM", GQA, {}),
    "qwen2-tied": ("Qwen2", "ForCausalLM", GQA, {"tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2",
        "ForCausalLM",
        GQA,
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen2-yarn": ("Qwen2", "ForCausalLM", GQA, {"rope_parameters": YARN}),
    "qwen2-classification": ("Qwen2", "ForSequenceClassification", GQA, {}),
    "qwen3": ("Qwen3", "ForCausalLM", GQA, {"head_dim": 16}),
    "qwen3-tied": ("Qwen3", "ForCausalLM", GQA, {"head_dim": 8, "tie_word_embeddings": True}),
}


def random_model(case, seed=0):
    """A transformers model whose biases and norms are random too, so that none of them can be left out."""
    family, kind, base, changes = CASES[case]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**(base | changes))
    model = getattr(transformers, f"{family}{kind}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def batch(vocab, pad, side, rows=3, length=17):
    """Token ids with lengths 17, 11 and 4, filled with ``pad`` on one side, and the mask."""
    rng = np.random.default_rng(1)
    ids = rng.integers(5, vocab, (rows, length))
    mask = np.ones((rows, length), np.int64)
    for row, real in enumerate((length, 11, 4)[:rows]):
        empty = slice(real, None) if side == "right" else slice(0, length - real)
        ids[row, empty], mask[row, empty] = pad, 0
    return ids, mask


def compare(theirs, apply, params, ids, mask, **extra):
    """Largest difference over real tokens (or over pooled rows); apply is jitted, compiled once per kind of input."""
    given = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    with torch.no_grad():
        out = theirs(**given, **{k: torch.tensor(v) for k, v in extra.items()})
    want = (out.logits if "logits" in out else out.last_hidden_state).numpy()
    names = {"token_type_ids": "token_type_ids", "position_ids": "positions"}
    inputs = {"input_ids": ids, "attention_mask": mask} | {names[k]: v for k, v in extra.items()}
    got = np.asarray(apply(params, {k: np.asarray(v, np.int32) for k, v in inputs.items()}))
    assert got.shape == want.shape and got.dtype == np.float32
    assert np.std(want) > 1e-2, "a test of nothing: the outputs hardly vary"
    if want.ndim == 3:
        got, want = got[mask > 0], want[mask > 0]
    return float(np.abs(got - want).max())


@pytest.mark.parametrize("case", CASES)
def test_random_model(case, tmp_path, record_property):
    theirs = random_model(case)
    theirs.save_pretrained(tmp_path)
    model, params = hf.load(tmp_path)
    pad, apply = theirs.config.pad_token_id, jax.jit(model.apply)
    errors = {}
    for side in ("right", "left"):
        errors[side] = compare(theirs, apply, params, *batch(97, pad, side))
    if model.config.kind == "decoder":  # what generation with left padding uses
        ids, mask = batch(97, pad, "left")
        errors["positions"] = compare(theirs, apply, params, ids, mask, position_ids=np.maximum(mask.cumsum(1) - 1, 0))
    elif model.config.type_vocab_size > 1:
        ids, mask = batch(97, pad, "right")
        errors["types"] = compare(theirs, apply, params, ids, mask, token_type_ids=(np.arange(ids.shape[1]) > 6) * mask)
    print(case, {k: f"{v:.1e}" for k, v in errors.items()})
    record_property("errors", errors)
    assert max(errors.values()) < TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_saved_folder_loads_in_transformers(case, tmp_path):
    """What ``hf.save`` writes gives transformers the same model back."""
    theirs = random_model(case)
    theirs.save_pretrained(tmp_path / "theirs")
    model, params = hf.load(tmp_path / "theirs")
    hf.save(tmp_path / "ours", model, params)
    again, report = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    unused = {"pooler.dense.weight", "pooler.dense.bias"} if CASES[case][1] == "Model" else set()
    assert set(report["missing_keys"]) <= unused and not report["unexpected_keys"] and not report["mismatched_keys"]
    mine = again.state_dict()
    for name, tensor in theirs.state_dict().items():
        if name not in unused:
            assert torch.equal(tensor, mine[name]), name
    assert again.dtype == torch.float32


@pytest.mark.parametrize("case", ["bert-mlm", "roberta-mlm", "llama2", "llama3", "mistral-window"])
def test_label_words(case, tmp_path):
    """Label words are transformers' logits at the mask token or after the last one, of the words' ids alone."""
    theirs = random_model(case)
    theirs.save_pretrained(tmp_path)
    model, params = hf.load(tmp_path)
    chosen, mask_id = (11, 96, 3, 40), 4
    words = model.with_head("label_words", label_ids=chosen, mask_id=mask_id)
    apply, errors = jax.jit(words.apply), []
    for side in ("right", "left"):
        ids, mask = batch(97, theirs.config.pad_token_id, side)
        places = np.array([np.flatnonzero(row)[-1] for row in mask])
        if words.config.kind == "encoder":
            places = np.array([np.flatnonzero(row)[1 + i] for i, row in enumerate(mask)])
            ids[np.arange(3), places] = mask_id
        with torch.no_grad():
            want = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.numpy()[np.arange(3), places]
        got = np.asarray(apply(params, {"input_ids": ids.astype(np.int32), "attention_mask": mask.astype(np.int32)}))
        assert np.std(want) > 1e-2 and got.shape == (3, 4)
        errors.append(np.abs(got - want[:, chosen]).max())
    print(case, "label words", [f"{e:.1e}" for e in errors])
    assert max(errors) < 1e-4


@pytest.mark.parametrize("case", ["llama2-linear", "llama3", "qwen2-yarn"])
def test_old_rope_spelling(case, tmp_path):
    """``rope_theta`` + ``rope_scaling`` with ``type`` means what ``rope_parameters`` means."""
    random_model(case).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    new = config_from_hf(raw)
    rope = raw.pop("rope_parameters")
    raw |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": {"type": rope.pop("rope_type"), **rope}}
    assert config_from_hf(raw) == new and new.rope_scaling


@pytest.mark.parametrize("case", ["llama2-linear", "llama3", "qwen2-yarn", "mistral-window", "qwen2-window", "qwen3"])
def test_the_comparison_notices(case, tmp_path):
    """Leaving out what is special about a case (rope scaling, window, q/k norm scale) breaks the agreement."""
    theirs = random_model(case)
    theirs.save_pretrained(tmp_path)
    model, params = hf.load(tmp_path)
    if case == "qwen3":
        norm = params["layers"]["attn"]["q_norm"]
        norm["scale"] = np.ones_like(norm["scale"])
    plain = dataclasses.replace(model, config=dataclasses.replace(model.config, rope_scaling=(), windows=()))
    assert compare(theirs, plain.apply, params, *batch(97, 0, "right")) > 100 * TOLERANCE


@pytest.mark.slow
def test_minilm(real_model):
    """The real encoder: hidden states, and sentence embeddings by mean pooling."""
    folder = hf.resolve(real_model("minilm"))
    theirs = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    model, params = hf.load(folder)
    ids, mask = batch(30000, 0, "right", length=40)
    hidden = compare(theirs, model.apply, params, ids, mask)
    with torch.no_grad():
        states = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state.numpy()
    mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    want = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    got = model.with_head("pooled").apply(params, {"input_ids": ids, "attention_mask": mask})
    pooled = float(np.abs(np.asarray(got) - want).max())
    print(f"minilm hidden {hidden:.1e} pooled {pooled:.1e}")
    assert hidden < TOLERANCE and pooled < 1e-5


@pytest.mark.slow
def test_smollm2(real_model, tmp_path):
    """The real decoder, read from its GGUF file by both sides."""
    from ft_jax.io import assets

    file = assets.gguf_file(real_model("smollm2"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()
    folder = hf.resolve("smollm2")
    model, params = hf.load(folder)
    hf.save(tmp_path, model, params)
    for name, tensor in safetensors.Checkpoint(tmp_path).items():
        assert np.array_equal(tensor, theirs.state_dict()[name].numpy()), name
    tok = tokenizer.load(folder)
    # The first token's activations reach the thousands: against float64, both sides are off by about 1e-4 there.
    chat = tok.apply_chat_template([{"role": "user", "content": "What is gravity?"}], add_generation_prompt=True)
    rows = tok.encode_batch(["def f(x): return", "In 1969, three astronauts", "Water boils at 100 degrees", chat])
    longest = max(map(len, rows))
    ids = np.array([row + [2] * (longest - len(row)) for row in rows])
    mask = np.array([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    error = compare(theirs, model.apply, params, ids, mask)
    print(f"smollm2 logits {error:.1e}")
    assert error < TOLERANCE
    prompt = np.array(tok.encode_batch(["The capital of France is Paris, and the capital of Italy is"]))
    assert tok.decode([np.asarray(model.apply(params, {"input_ids": prompt}))[0, -1].argmax()]) == " Rome"

    c = templates.settings("rotten_tomatoes", "decoder", max_length=32)
    words = model.with_head("label_words", label_ids=prompts.label_ids(tok, "decoder", c))
    assert [tok.decode([i]) for i in words.config.label_ids] == [f" {word}" for word in c["label_words"]]
    encoded = prompts.encoder(tok, pipeline.settings(c))([{"text": "a fine film"}, {"text": "dull " * 40}], ["row 1", "row 2"])
    assert [len(row) for row in encoded][1] == 32 and all(tok.decode(row).endswith("\nSentiment:") for row in encoded)
    ids = np.array([row + [2] * (32 - len(row)) for row in encoded])
    mask = np.array([[1] * len(row) + [0] * (32 - len(row)) for row in encoded])
    with torch.no_grad():
        want = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.numpy()
    want = want[[0, 1], mask.sum(1) - 1][:, words.config.label_ids]
    got = np.asarray(words.apply(params, {"input_ids": ids, "attention_mask": mask}))
    print(f"smollm2 label words {np.abs(got - want).max():.1e}")
    assert np.abs(got - want).max() < 1e-4
