"""LoRA adapters against PEFT, both directions: same logits, same merged model; PiSSA, OLoRA and LoRA+ step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft as hf_peft
import pytest
import torch
import transformers
from peft.optimizers import create_loraplus_optimizer

from ft_jax import masks, registry, tree
from ft_jax.io import hf, peft
from ft_jax.kernels import adapt, is_kernel, merge
from ft_jax.models import names

transformers.utils.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()
TOLERANCE = 1e-4
SMALL = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
         "max_position_embeddings": 32, "initializer_range": 0.2, "num_labels": 3}  # fmt: skip
LLAMA = SMALL | {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "llama-classification": ("LlamaForSequenceClassification", "LlamaConfig", LLAMA),
    "bert": ("BertModel", "BertConfig", SMALL),
    "bert-mlm": ("BertForMaskedLM", "BertConfig", SMALL),
    "bert-classification": ("BertForSequenceClassification", "BertConfig", SMALL),
    "roberta-classification": ("RobertaForSequenceClassification", "RobertaConfig", SMALL | {"type_vocab_size": 1}),
}
LINEAR = r"layers/(attn|mlp)/\w+/kernel"
RULES = {
    "lora": [(LINEAR, "lora(rank=4, alpha=8)")],
    "rslora": [(LINEAR, "rslora(rank=4, alpha=12)")],
    "ranks": [("layers/attn/q/kernel", "lora(rank=2, alpha=7)"), (LINEAR, "lora(rank=5, alpha=8)")],
    "some": [("layers/attn/(q|v)/kernel", "lora(rank=3, alpha=6)")],
}
OPTIONS = {
    "plain": {"r": 4, "lora_alpha": 8},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {r"layers?\.1\..*": 2},
        "alpha_pattern": {r"layers?\.2\..*": 3},
    },
    "one-layer": {"r": 3, "lora_alpha": 8, "layers_to_transform": [1]},
}
# Every variant on one decoder and one encoder, the plain one on every model.
FULL = ("llama", "bert-classification")
ALL_RULES = [(name, rules) for name in MODELS for rules in RULES if name in FULL or rules == "lora"]
ALL_OPTIONS = [(name, kind) for name in MODELS for kind in OPTIONS if name in FULL or kind == "plain"]
QUICK = [("llama", "lora"), ("llama", "ranks"), ("llama", "plain"), ("llama", "patterns"), *((FULL[1], k) for k in ("lora", "plain"))]
ALL_RULES, ALL_OPTIONS = ([pair if pair in QUICK else pytest.param(*pair, marks=pytest.mark.slow) for pair in every]
                          for every in (ALL_RULES, ALL_OPTIONS))
IDS = np.random.default_rng(0).integers(3, 61, (2, 9))


def base_folder(name, tmp_path):
    cls, config, values = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, cls)(getattr(transformers, config)(**values)).eval()
    model.save_pretrained(tmp_path / "base")
    return getattr(transformers, cls), tmp_path / "base"


def trained(params, rules):
    """Params with the kernels of the rules, their B factors random as if trained."""
    params = adapt(params, rules, jax.random.key(1))

    def move(path, leaf):
        return 0.3 * jax.random.normal(jax.random.key(len(path)), leaf.shape) if path.endswith("/b") else leaf

    return tree.map_with_path(move, params)


def torch_output(model):
    with torch.no_grad():
        out = model(input_ids=torch.tensor(IDS))
    return (out.logits if "logits" in out else out.last_hidden_state).numpy()


def our_output(model, params):
    return np.asarray(model.apply(params, {"input_ids": jnp.asarray(IDS, jnp.int32)}))


@pytest.mark.parametrize("name, rules", ALL_RULES)
def test_ours_in_peft(name, rules, tmp_path):
    """PEFT loads our adapter: same logits, and its merged model is ours."""
    cls, folder = base_folder(name, tmp_path)
    model, base = hf.load(folder)
    params = trained(base, RULES[rules])
    if model.config.head == "classification":
        params["head"] = jax.tree.map(lambda x: x + 0.5, params["head"])
    peft.save_adapter(tmp_path / "adapter", model, params, str(folder), base=base, use_rslora=rules == "rslora")
    theirs = hf_peft.PeftModel.from_pretrained(cls.from_pretrained(folder), tmp_path / "adapter").eval()
    got, want = our_output(model, params), torch_output(theirs)
    error = float(np.abs(got - want).max())
    moved = float(np.abs(got - our_output(model, base)).max())
    print(name, rules, f"{error:.1e} (the adapter moves the output by {moved:.1e})")
    assert error < TOLERANCE and moved > 100 * TOLERANCE
    hf.save(tmp_path / "merged", model, params)
    merged, ours = theirs.merge_and_unload().state_dict(), cls.from_pretrained(tmp_path / "merged").state_dict()
    for key, tensor in merged.items():
        if "pooler" not in key or name != "bert":  # a bare encoder is saved without its pooler
            torch.testing.assert_close(tensor, ours[key], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name, kind", ALL_OPTIONS)
def test_theirs_in_ours(name, kind, tmp_path):
    """We load PEFT's adapter: same logits, and the same again after writing it ourselves."""
    cls, folder = base_folder(name, tmp_path)
    torch.manual_seed(1)
    task = "SEQ_CLS" if "classification" in name else None
    targets = ["q_proj", "down_proj"] if "llama" in name else ["query", "output.dense"]
    config = hf_peft.LoraConfig(target_modules=targets, init_lora_weights=False, task_type=task,
                                **OPTIONS[kind])  # fmt: skip
    theirs = hf_peft.get_peft_model(cls.from_pretrained(folder), config).eval()
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "modules_to_save" in key:
                parameter.add_(0.5)
    theirs.save_pretrained(tmp_path / "adapter")
    model, base = hf.load(folder)
    params = peft.load_adapter(tmp_path / "adapter", model, base)
    want = torch_output(theirs)
    error = float(np.abs(our_output(model, params) - want).max())
    print(name, f"{error:.1e}")
    assert error < TOLERANCE and np.abs(our_output(model, base) - want).max() > 100 * TOLERANCE
    peft.save_adapter(tmp_path / "again", model, params, str(folder), base=base)
    again = peft.load_adapter(tmp_path / "again", model, base)
    np.testing.assert_allclose(our_output(model, again), our_output(model, params), atol=1e-5)


@pytest.mark.slow
def test_split_stack(tmp_path):
    """An adapter on the upper layers alone, the stack split: out and in again, into a split and a whole tree."""
    cls, folder = base_folder("llama", tmp_path)
    model, base = hf.load(folder)
    params = trained(masks.split_layers(base, 2), RULES["lora"])
    assert any(p.startswith("frozen_layers/") for p in tree.flatten(params))
    peft.save_adapter(tmp_path / "adapter", model, params, str(folder), base=base)
    theirs = hf_peft.PeftModel.from_pretrained(cls.from_pretrained(folder), tmp_path / "adapter").eval()
    want = our_output(model, params)
    assert np.abs(want - torch_output(theirs)).max() < TOLERANCE
    for start in (base, masks.split_layers(base, 2), masks.split_layers(base, 1)):
        loaded = peft.load_adapter(tmp_path / "adapter", model, start)
        np.testing.assert_allclose(our_output(model, loaded), want, atol=1e-5)
    hf.save(tmp_path / "merged", model, params)
    _, merged = hf.load(tmp_path / "merged")
    np.testing.assert_allclose(our_output(model, merged), want, atol=2e-5)


def test_prototype_head_travels(tmp_path):
    """A head that transformers does not know is kept for us and does not hinder PEFT."""
    cls, folder = base_folder("bert", tmp_path)
    model, base = hf.load(folder, head="prototype", num_labels=2)
    params = trained(base, RULES["lora"])
    params["head"] = jax.tree.map(lambda x: x + 1.0, params["head"])
    peft.save_adapter(tmp_path / "adapter", model, params, str(folder), base=base)
    loaded = peft.load_adapter(tmp_path / "adapter", model, base)
    np.testing.assert_array_equal(our_output(model, loaded), our_output(model, params))
    theirs = hf_peft.PeftModel.from_pretrained(cls.from_pretrained(folder), tmp_path / "adapter").eval()
    hidden = model.with_head("none")
    assert np.abs(our_output(hidden, params) - torch_output(theirs)).max() < TOLERANCE


def test_other_trained_leaves_travel(tmp_path):
    """A norm that was trained beside the adapter becomes a module to save."""
    cls, folder = base_folder("llama", tmp_path)
    model, base = hf.load(folder)
    params = trained(base, RULES["some"])
    params["norm"] = {"scale": params["norm"]["scale"] * 1.5}
    peft.save_adapter(tmp_path / "adapter", model, params, str(folder), base=base)
    theirs = hf_peft.PeftModel.from_pretrained(cls.from_pretrained(folder), tmp_path / "adapter").eval()
    assert np.abs(our_output(model, params) - torch_output(theirs)).max() < TOLERANCE
    loaded = peft.load_adapter(tmp_path / "adapter", model, base)
    assert not is_kernel(loaded["norm"]["scale"])
    for got, want in zip(jax.tree.leaves(merge(loaded)), jax.tree.leaves(merge(params)), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)


def factors_of(theirs):
    """``{checkpoint module: (lora_A, lora_B, scaling, frozen weight)}`` of a PEFT model, as numpy."""
    return {
        name.removeprefix(peft.ROOT): (
            *(x["default"].weight.detach().numpy().copy() for x in (module.lora_A, module.lora_B)),
            module.scaling["default"], module.get_base_layer().weight.detach().numpy().copy(),
        )
        for name, module in theirs.named_modules() if hasattr(module, "lora_A")
    }  # fmt: skip


def modules_of(model, params):
    """The same of our tree: ``{checkpoint module: (A, B, scale, base)}`` in our orientation."""
    out = {}
    for path, leaf in tree.flatten(params, is_leaf=is_kernel).items():
        if is_kernel(leaf):
            name = names(model.config)[path].removesuffix(".weight")
            out |= {name.format(i=i): jax.tree.map(lambda x, i=i: np.asarray(x[i]), (leaf.a, leaf.b, leaf.scale, leaf.base))
                    for i in range(leaf.shape[0])}  # fmt: skip
    return out


def assert_same_adapters(model, params, theirs, atol):
    """Products s·AB (their factors may differ in sign) and frozen matrices; returns how large the products are, and the largest difference."""
    ours, found = modules_of(model, params), factors_of(theirs)
    assert set(ours) == set(found)
    for name, (a, b, scale, base) in found.items():
        mine = ours[name]
        np.testing.assert_allclose(mine[2], scale, rtol=1e-6)
        np.testing.assert_allclose(mine[3].T, base, rtol=0, atol=atol, err_msg=name)
        np.testing.assert_allclose(mine[2] * (mine[0] @ mine[1]).T, scale * (b @ a), rtol=0, atol=atol, err_msg=name)
    size = max(float(np.abs(s * (b @ a)).max()) for a, b, s, _ in found.values())
    return size, max(float(np.abs(ours[n][2] * (ours[n][0] @ ours[n][1]).T - s * (b @ a)).max()) for n, (a, b, s, _) in found.items())


def squared_logits(model, params):
    return jnp.square(model.apply(params, {"input_ids": jnp.asarray(IDS, jnp.int32)})).mean()


@pytest.mark.parametrize("start, rank, alpha", [("pissa", 4, 8), ("pissa", 3, 3), ("olora", 4, 8)])
def test_pissa_and_olora_start_and_step_as_peft(start, rank, alpha, tmp_path):
    """Same product, same residual, and the same again after one step of SGD on A and B."""
    cls, folder = base_folder("llama", tmp_path)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = hf_peft.LoraConfig(target_modules=targets, init_lora_weights=start, r=rank, lora_alpha=alpha)
    theirs = hf_peft.get_peft_model(cls.from_pretrained(folder), config).train()
    model, base = hf.load(folder)
    params = adapt(base, [(LINEAR, f"{start}(rank={rank}, alpha={alpha})")], jax.random.key(1))
    size, _ = assert_same_adapters(model, params, theirs, 1e-5)

    rate = 0.02
    optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=rate)
    theirs(input_ids=torch.tensor(IDS)).logits.square().mean().backward()
    optimizer.step()
    trainable, frozen = tree.split(params, masks.declared(params, 0))
    grads = jax.grad(lambda t: squared_logits(model, tree.join(t, frozen)))(trainable)
    after = tree.join(jax.tree.map(lambda x, g: x - rate * g, trainable, grads), frozen)
    _, off = assert_same_adapters(model, after, theirs, 1e-5)
    before, now = modules_of(model, params), modules_of(model, after)
    moved = max(float(np.abs(now[n][0] @ now[n][1] - before[n][0] @ before[n][1]).max()) for n in now)
    print(f"{start} llama: a step moves the weights by {moved:.1e}, ours differ by {off:.1e} (products up to {size:.2f})")
    assert moved > 1e-3


def test_lora_plus_steps_as_peft(tmp_path):
    """Five steps of PEFT's LoRA+ optimiser (AdamW, ratio 16, weight decay) from one adapter: the same factors."""
    cls, folder = base_folder("llama", tmp_path)
    model, base = hf.load(folder)
    params = trained(base, RULES["lora"])
    peft.save_adapter(tmp_path / "adapter", model, params, str(folder), base=base)
    theirs = hf_peft.PeftModel.from_pretrained(cls.from_pretrained(folder), tmp_path / "adapter", is_trainable=True)
    hp = {"eps": 1e-3, "weight_decay": 0.1}  # with the usual eps, rounding decides the sign of a move where gradients vanish
    rate, ratio, steps = 1e-3, 16.0, 5
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=rate, loraplus_lr_ratio=ratio, eps=hp["eps"], loraplus_weight_decay=hp["weight_decay"])
    tx = registry.call("update", "lora_plus", learning_rate=rate, ratio=ratio, **hp)
    trainable, frozen = tree.split(params, masks.declared(params, 0))
    state, start = tx.init(trainable), trainable

    @jax.jit
    def step(trainable, state):
        grads = jax.grad(lambda t: squared_logits(model, tree.join(t, frozen)))(trainable)
        moves, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, moves), state

    for _ in range(steps):
        optimizer.zero_grad()
        theirs(input_ids=torch.tensor(IDS)).logits.square().mean().backward()
        optimizer.step()
        trainable, state = step(trainable, state)
    ours, found = modules_of(model, tree.join(trainable, frozen)), factors_of(theirs)
    for name, (a, b, _, _) in found.items():
        np.testing.assert_allclose(ours[name][0].T, a, rtol=0, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(ours[name][1].T, b, rtol=0, atol=1e-5, err_msg=name)
    moved = tree.flatten(jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), trainable, start))
    assert min(moved.values()) > 1e-4 and moved["layers/mlp/up/kernel/b"] > 3 * moved["layers/mlp/up/kernel/a"], moved
