"""MixDA's two taps restated in torch as published, and the term that keeps layers as they were on other texts."""

import jax
import numpy as np
import pytest

from ft_jax.errors import UserError
from ft_jax.models import KEPT
from ft_jax.objectives import terms
from tests.helpers import make_batch, make_model, make_objective, make_params
from tests.taps.trees import FAMILIES, attached, moved, setting, tap_at

torch = pytest.importorskip("torch")


def tensor(x):
    return torch.tensor(np.array(x, np.float64))


def linear(weight, bias):
    layer = torch.nn.Linear(*weight.shape).double()
    layer.weight.data, layer.bias.data = tensor(weight).T, tensor(bias)
    return layer


def mixed(tap, h, y, by_row):
    """The adapters' outputs and y, stacked, times the softmax of the gate's network; of the last position for all of a row."""
    hidden = [linear(tap.gate_in, tap.gate_in_bias), *map(linear, tap.gate_mid, tap.gate_mid_bias)]
    network = torch.nn.Sequential(*(part for layer in hidden for part in (layer, torch.nn.ReLU())), linear(tap.gate_out, tap.gate_out_bias))
    weights = torch.softmax(network(h[:, -1].unsqueeze(1) if by_row else h), -1)
    adapters = [torch.nn.Sequential(linear(d, e), torch.nn.GELU(), linear(u, v))
                for d, e, u, v in zip(tap.down, tap.down_bias, tap.up, tap.up_bias, strict=True)]  # fmt: skip
    return (torch.stack([*(adapter(h) for adapter in adapters), y], 3) @ weights.unsqueeze(3)).squeeze(3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["mixda_domain", "mixda"])
def test_the_ffn_is_mixed_with_its_adapters(name, family):
    model, plain, batch = setting(family)
    params = moved(attached(model, plain, name))
    _, seen = jax.jit(lambda p: model.apply(p, batch, capture=("ffn_in", "ffn_hidden", "ffn_out", "block_out", KEPT)))(params)
    for i in range(model.config.num_layers):
        p, tap = (jax.tree.map(lambda x, i=i: x[i], tree) for tree in (plain["layers"], tap_at(params, "ffn_out")))
        now = {site: tensor(x[i]) for site, x in seen.items()}
        y = now["ffn_hidden"] @ tensor(p["mlp"]["down"]["kernel"]) + tensor(p["mlp"]["down"].get("bias", np.zeros(32)))

        def after(y, now=now, p=p):
            if family == "llama":
                return now["block_out"] - now["ffn_out"] + y
            return torch.nn.functional.layer_norm(now["ffn_in"] + y, [32], *map(tensor, (p["mlp_norm"]["scale"], p["mlp_norm"]["bias"])), 1e-12)

        expected = mixed(tap, now["ffn_hidden"], y, family == "bert")
        if name == "mixda":
            task = [linear(tap.task_down, tap.task_down_bias), torch.nn.SiLU(), linear(tap.task_up, tap.task_up_bias)]
            expected = expected + torch.nn.Sequential(*task)(after(expected))
        np.testing.assert_allclose(now["ffn_out"], expected.detach(), rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(now[KEPT], after(y), rtol=2e-5, atol=2e-5)


@pytest.mark.slow
def test_other_texts_count_for_the_term_alone():
    model = make_model("bert", "mlm")
    params = moved(attached(model, make_params(model), "mixda_domain", domain=1, keep=3.0))
    batch, key = make_batch(model) | {"tasks": np.asarray([1, 0, 2, 1], np.int32)}, jax.random.key(0)
    objective = make_objective("mlm", model)
    loss, metrics = jax.jit(objective)(params, batch, key)
    tap = tap_at(params, "ffn_out")
    free = {**params, "layers": {**params["layers"], "taps": {"ffn_out": tap.replace(weight=None)}}}
    alone, plain = jax.jit(objective)(free, batch | {"weight": np.asarray([1.0, 0, 0, 1])}, key)
    assert set(plain) == set(metrics) - {"keep"} and metrics["loss"] == pytest.approx(float(alone), rel=1e-6)
    assert float(loss) == pytest.approx(float(metrics["loss"] + metrics["keep"]), rel=1e-6)
    held = jax.jit(objective)(params, batch, None)[1]
    assert set(held) == set(plain) and held["weight"] < jax.jit(objective)(free, batch, None)[1]["weight"]
    rng = np.random.default_rng(0)
    before, after = (rng.standard_normal((3, 4, 8, 32)).astype(np.float32) for _ in range(2))
    real = batch["attention_mask"] > 0
    found = jax.vmap(lambda t, *x: t.penalty(*x, real, batch["tasks"]))(tap, before, after)
    rows = [1, 2]
    np.testing.assert_allclose(found, [np.square(a - b)[rows][real[rows]].mean() for a, b in zip(after, before, strict=True)], rtol=2e-5)


@pytest.mark.parametrize("tasks, domain, words", [(0, 0, "no sources"), (1, 0, "1 sources"), (2, 2, "2 sources")])
def test_the_term_needs_other_texts(tasks, domain, words):
    model, plain, _ = setting("bert")
    params = attached(model, plain, "mixda_domain", domain=domain)
    with pytest.raises(UserError, match=f"layers/taps/ffn_out: mixda_domain keeps .* {words} with task ids; give them as data=DOMAIN.OTHER"):
        terms.check(params, tasks)
    terms.check(attached(model, plain, "mixda_domain", keep=0.0), tasks)
