"""Gates and updates beside torch loops that freeze, thaw and mask as the published code does, and beside PEFT."""

import jax
import jax.numpy as jnp
import numpy as np
import peft as hf_peft
import pytest
import torch
import transformers

from ft_jax import allocation, importance, masks, models, registry, tree, updates
from ft_jax.io import hf
from tests import folders, gate_trees
from tests.gate_trees import LAYERS

STEPS, RATE, CLIP = 11, 3e-2, 5.0
ADAM = {"b1": 0.8, "b2": 0.9, "eps": 1e-6, "weight_decay": 0.05}


def ours(mask, **hp):
    tx, lr = updates.build("adamw", learning_rate=RATE, steps=STEPS, warmup=0, clip=CLIP, mask=mask, **{**ADAM, **hp})
    seen, _, _ = gate_trees.run(tx, STEPS)
    return {p: np.asarray(x) for p, x in tree.flatten(seen[-1]).items()}, lr


class Torch:
    """The same tree, every layer's weights tensors of their own, and AdamW on the quadratic loss."""

    def __init__(self, **hp):
        self.params, self.targets = (self.tensors(gate_trees.make(seed)) for seed in (0, 1))
        self.hp = {**ADAM, **hp}
        self.fresh()

    @staticmethod
    def tensors(params):
        rows = {}
        for path, x in tree.flatten(params).items():
            parts = np.asarray(x) if path.startswith("layers/") else [np.asarray(x)]
            rows |= {(path, i): torch.tensor(np.array(part)) for i, part in enumerate(parts)}
        return rows

    def fresh(self):
        hp = {"betas": (self.hp["b1"], self.hp["b2"]), "eps": self.hp["eps"], "weight_decay": self.hp["weight_decay"]}
        self.optimizer = torch.optim.AdamW(list(self.params.values()), lr=RATE, **hp)

    def step(self, rate, trains, mask=None):
        """One step at a rate: ``trains(path, layer)`` says what has a gradient at all, ``mask`` multiplies gradients."""
        for key, x in self.params.items():
            x.grad = (x - self.targets[key]) if trains(*key) else None
            if mask is not None and x.grad is not None:
                x.grad *= mask[key]
        torch.nn.utils.clip_grad_norm_([x for x in self.params.values() if x.grad is not None], CLIP)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()

    def assert_equal(self, found, atol):
        start = self.tensors(gate_trees.make())
        for (path, i), x in self.params.items():
            value = found[path][i] if path.startswith("layers/") else found[path]
            np.testing.assert_allclose(value, x.numpy(), rtol=0, atol=atol, err_msg=f"{path} {i}")
        assert max(float((x - start[key]).abs().max()) for key, x in self.params.items()) > 0.1


def rows_on(name, step, **hp):
    on = tree.flatten(registry.call("mask", name, gate_trees.make(), step, **hp))

    def trains(path, layer):
        m = on[path]
        return m is True or bool(layer in m if m.dtype != bool else m[layer])

    return trains


def test_lisa_is_adamw_with_layers_frozen_and_thawed():
    """As LMFlow does it: requires_grad toggled every period under one torch optimiser and one schedule."""
    found, lr = ours("lisa(n=2,period=2)")
    theirs = Torch()
    for step in range(STEPS):
        theirs.step(float(lr(step)), rows_on("lisa", step, n=2, period=2))
    theirs.assert_equal(found, 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name, hp", [("lisa", {"n": 2, "period": 3, "moments": "restart"}), ("hft", {"period": 3})])
def test_rounds_with_restarts_are_runs_with_new_optimisers(name, hp):
    """A new torch optimiser every period for what is drawn, one for the whole run for what always trains."""
    text = ",".join(f"{k}={v}" for k, v in hp.items())
    found, lr = ours(f"{name}({text})")
    theirs, always = Torch(), Torch()
    always.params = {k: x for k, x in theirs.params.items() if not k[0].startswith("layers/")}
    always.fresh()
    theirs.params = {k: x for k, x in theirs.params.items() if k[0].startswith("layers/")}
    whole = {**theirs.params, **always.params}
    for step in range(STEPS):
        if step % hp["period"] == 0:
            theirs.fresh()
        trains = rows_on(name, step, **hp)
        for key, x in whole.items():
            x.grad = (x - theirs.targets[key]) if trains(*key) else None
        torch.nn.utils.clip_grad_norm_([x for x in whole.values() if x.grad is not None], CLIP)
        for part in (theirs, always):
            part.optimizer.param_groups[0]["lr"] = float(lr(step))
            part.optimizer.step()
    theirs.params = whole
    theirs.assert_equal(found, 2e-6)


@pytest.mark.parametrize("mask", ["magnitude(share=0.2)", "random(share=0.3)"])
def test_a_fixed_gate_is_a_masked_gradient(mask):
    """As composable-sft does it: gradients times the mask before clipping; without weight decay nothing else moves."""
    found, lr = ours(mask, weight_decay=0.0)
    on = masks.fixed(masks.gates(mask).fixed, gate_trees.make())
    whole = jax.tree.map(lambda m, x: jnp.broadcast_to(m, x.shape).astype(jnp.float32), on, gate_trees.make())
    theirs = Torch(weight_decay=0.0)
    for step in range(STEPS):
        theirs.step(float(lr(step)), lambda *_: True, Torch.tensors(whole))
    theirs.assert_equal(found, 2e-6)
    assert LAYERS > 1


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.05, 0.25, 0.3, 0.5, 0.7, 1.0])
def test_migu_keeps_the_outputs_that_its_published_code_keeps(share):
    """Its lines: outputs summed by a hook, kept from `torch.quantile(sums, 1 - share)` up, `weight.grad` times that, AdamW."""
    torch.manual_seed(0)
    rng, tx = np.random.default_rng(0), registry.call("update", "migu", learning_rate=RATE, share=share, **ADAM)
    for width in (1, 2, 3, 8, 11, 12, 21, 48, 101, 768):
        layer, x, target = torch.nn.Linear(5, width, bias=False), torch.randn(4, 6, 5), torch.randn(4, 6, width)
        with torch.no_grad():
            layer.weight.copy_(layer.weight.mul(16).round() / 16)  # few values, so that sums of outputs tie
            x = x.round()
        before, sums = layer.weight.detach().clone(), []
        layer.register_forward_hook(lambda m, i, out, w=width, sums=sums: sums.append(out.reshape(-1, w).abs().sum(0)))
        (layer(x) - target).square().mean().backward()
        grad = layer.weight.grad.clone()
        layer.weight.grad *= (sums[0] >= torch.quantile(sums[0], 1 - share)).float().unsqueeze(-1)
        torch.optim.AdamW(layer.parameters(), lr=RATE, betas=(ADAM["b1"], ADAM["b2"]), eps=ADAM["eps"],
                          weight_decay=ADAM["weight_decay"]).step()  # fmt: skip
        params, grads = ({"layers": {"mlp": {"up": {"kernel": jnp.asarray(w.numpy().T[None])}}}} for w in (before, grad))
        moves, _ = tx.update(grads, tx.init(params), params, outputs=lambda s=sums[0]: {"layers/mlp/up/kernel": jnp.asarray(s.detach().numpy()[None])})
        moved = params["layers"]["mlp"]["up"]["kernel"][0] + moves["layers"]["mlp"]["up"]["kernel"][0]
        np.testing.assert_allclose(moved, layer.weight.detach().numpy().T, rtol=0, atol=1e-6, err_msg=str(width))
        spread = torch.tensor(rng.standard_normal((3, width)), dtype=torch.float32).abs()
        mine = np.asarray(allocation.quantile(jnp.asarray(spread.numpy()), 1 - share))[:, 0]
        np.testing.assert_array_equal(spread.numpy() >= mine[:, None], (spread >= spread.quantile(1 - share, 1, True)).numpy())


def dropped(shape, key, rate):
    return np.asarray(jax.random.bernoulli(key, 1 - rate, shape))


@pytest.mark.slow
def test_cofitunes_soft_mask_beside_gates_in_torch(tmp_path, monkeypatch):
    """Its lines: gates of 1 on the outputs of up and down, KL of two training passes, signed slopes, tanh of their z-scores."""
    rate, rows, length, layers = 0.2, 2, 6, 3
    adam = {**ADAM, "eps": 0.1}  # else Adam's first step has the size of the rate, whatever the gradient's
    folders.make_model_folder(tmp_path, "llama", "lm")
    model, params = hf.load(tmp_path, head="lm")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", attention_dropout=rate).train()
    masks_left, gates = [], {name: torch.ones(layers, width, requires_grad=True) for name, width in (("up", 48), ("down", 32))}
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda x, **_: x * torch.tensor(masks_left.pop(0)).view_as(x) / (1 - rate))
    for i, block in enumerate(theirs.model.layers):
        block.mlp.up_proj.register_forward_hook(lambda m, x, y, i=i: y * gates["up"][i])
        block.mlp.down_proj.register_forward_hook(lambda m, x, y, i=i: torch.nn.functional.dropout(y * gates["down"][i]))
    rng, batches = np.random.default_rng(0), []
    for number in range(2):
        ids = rng.integers(7, 20, (rows, length))
        batches.append({"input_ids": ids.astype(np.int32), "attention_mask": np.ones_like(ids, np.int32)})
        for key in jax.random.split(jax.random.fold_in(jax.random.key(5), number)):
            for own in jax.random.split(key, layers):
                masks_left += [dropped((rows, 2, 2, length, length), own, rate), dropped((rows, length, 32), jax.random.fold_in(own, 1), rate)]
        first, second = (theirs(input_ids=torch.tensor(ids)).logits for _ in range(2))
        kl = torch.nn.functional.kl_div(first.log_softmax(-1), second.softmax(-1), reduction="batchmean") * 0.1
        kl.backward()
    assert not masks_left and kl.item() > 1e-3
    ours = importance.disagreement(model, params, batches, rate=rate, seed=5)
    importance.save(tmp_path / "scores", ours, "disagreement")
    params = {"layers": {"mlp": params["layers"]["mlp"]}}
    tx = registry.call("update", "cofitune_soft", learning_rate=RATE, scores=str(tmp_path / "scores"), **adam)
    grads = jax.tree.map(lambda x: jnp.cos(9 * x), params)
    moves, _ = tx.update(grads, tx.init(params), params)
    state, gradient = theirs.state_dict(), tree.flatten(grads)
    for name, gate in gates.items():
        slope = gate.grad / (2 * rows * length)
        np.testing.assert_allclose(ours[f"layers/mlp/{name}/kernel"] * 0.1 / rows, slope.numpy(), rtol=0, atol=1e-6)
        for layer in range(layers):
            impt = ((slope[layer] - slope[layer].mean()) / slope[layer].std()).tanh().abs()
            weight = torch.nn.Parameter(state[f"model.layers.{layer}.mlp.{name}_proj.weight"].clone())
            weight.grad = torch.tensor(np.array(gradient[f"layers/mlp/{name}/kernel"][layer])).T * (1 - impt)[:, None]
            before = weight.detach().clone()
            torch.optim.AdamW([weight], lr=RATE, betas=(adam["b1"], adam["b2"]), eps=adam["eps"], weight_decay=adam["weight_decay"]).step()
            moved = moves["layers"]["mlp"][name]["kernel"][layer]
            np.testing.assert_allclose(moved, (weight.detach() - before).numpy().T, rtol=0, atol=1e-5)
    plain, _ = (own := registry.call("update", "adamw", learning_rate=RATE, **adam)).update(grads, own.init(params), params)
    np.testing.assert_array_equal(plain["layers"]["mlp"]["gate"]["kernel"], moves["layers"]["mlp"]["gate"]["kernel"])


@pytest.mark.slow
@pytest.mark.parametrize("family, task, auto", [
    ("bert", "SEQ_CLS", transformers.AutoModelForSequenceClassification),
    ("llama", "CAUSAL_LM", transformers.AutoModelForCausalLM),
])  # fmt: skip
def test_ln_tuning_trains_what_peft_trains(family, task, auto, tmp_path):
    """The same leaves, and one SGD step of them to the same weights."""
    folders.make_model_folder(tmp_path, family, "classification" if family == "bert" else "lm")
    model, params = hf.load(tmp_path, **({"head": "classification", "num_labels": 2} if family == "bert" else {"head": "lm"}))
    mask = tree.flatten(registry.call("mask", "ln_tuning", params, 0))
    chosen = hf_peft.LNTuningConfig(task_type=task, target_modules=["LayerNorm"] if family == "bert" else None)
    theirs = hf_peft.get_peft_model(auto.from_pretrained(tmp_path), chosen).eval()
    trained = {n for n, p in theirs.named_parameters() if p.requires_grad}
    wanted = set()
    for path, name in models.names(model.config).items():
        if mask.get(path) and not path.startswith("head/"):
            wanted |= {name.replace("{i}", str(i)) for i in range(model.config.num_layers if "{i}" in name else 1)}
    inner = {n.split("base_model.model.")[-1].replace(".ln_tuning_layers.default", "") for n in trained}
    heads = {n for n in inner if n.startswith(("classifier", "score"))}
    assert inner - heads == wanted

    ids, rate = np.arange(5, 17).reshape(2, 6), 0.1
    theirs(input_ids=torch.tensor(ids)).logits.square().mean().backward()
    torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=rate).step()
    state = {n.split("base_model.model.")[-1].replace(".ln_tuning_layers.default", ""): p for n, p in theirs.named_parameters()}
    chosen, rest = tree.split(params, registry.call("mask", "ln_tuning", params, 0))
    grads = jax.grad(lambda t: jnp.square(model.apply(tree.join(t, rest), {"input_ids": ids})).mean())(chosen)
    after = tree.flatten(jax.tree.map(lambda x, g: x - rate * g, chosen, grads))
    for path, name in models.names(model.config).items():
        if mask.get(path) and not path.startswith("head/"):
            rows = [name.replace("{i}", str(i)) for i in range(model.config.num_layers)] if "{i}" in name else [name]
            value = np.stack([state[n].detach().numpy() for n in rows])
            np.testing.assert_allclose(after[path] if "{i}" in name else after[path][None], value, rtol=0, atol=1e-5, err_msg=path)
