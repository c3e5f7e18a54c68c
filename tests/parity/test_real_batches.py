"""Every kernel, tap, update and mask takes the loss down on a real batch of both demo models.

MiniLM as it is, on film reviews with a classification head drawn at random and frozen; SmolLM2's embeddings, lowest two
layers and head, on the same texts. Without dropout, on one batch: the loss before a step is that of the step before.
"""

import dataclasses
import itertools
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.train import method as method_of
from ft_jax import allocation, importance, masks, models, registry, taps, tree, updates
from ft_jax import train as engine
from ft_jax.data import pipeline
from ft_jax.errors import UserError
from ft_jax.io import hf, tokenizer
from tests.gate_trees import KINDS
from tests.kernels.trees import put
from tests.taps.trees import PARENTS, attached

pytestmark = pytest.mark.slow

MODELS = {"minilm": ("classification", "classification"), "smollm2": ("causal_lm", "lm")}
ROWS, LENGTH, DEPTH, STEPS = 4, 12, 2, 6
FALL = 1e-3  # the least share of the loss that a method has to take off
TASKS = ("polytropon(tasks=2)", "mhr(tasks=2)", "bank(adapters=2)")


class World(NamedTuple):
    """A model on a batch: what a run makes of a config, without its head or embeddings training."""

    name: str
    folder: str
    model: models.Model
    params: dict
    objective: object
    batch: dict


@pytest.fixture(scope="session", params=MODELS)
def world(request, real_model, tmp_path_factory):
    name = real_model(request.param)
    objective, head = MODELS[name]
    model, params = hf.load(name, head=head, num_labels=2, rng=jax.random.key(0))
    tok, folder = tokenizer.load(hf.resolve(name)), str(hf.resolve(name))
    if name == "smollm2":
        model = models.Model(dataclasses.replace(model.config, num_layers=DEPTH, windows=model.config.windows[:DEPTH],
                                                 raw=type(model.config.raw)({**model.config.raw, "num_hidden_layers": DEPTH})))
        params = params | {"layers": jax.tree.map(lambda x: x[:DEPTH], params["layers"])}
        folder = tmp_path_factory.mktemp("cut")
        hf.save(folder, model, params)
    data = {"source": "imdb", "num_labels": 2 if head == "classification" else 0, "max_length": LENGTH, "limit": ROWS}
    found = pipeline.build(data, "train", tok, objective, model.config.vocab_size, tmp_path_factory.mktemp("tokens"))
    cfg = {"objective": objective, "model": {"dropout": False}, "data": {"num_labels": 2}}
    made = engine.make_objective(cfg, model, SimpleNamespace(mask_id=None))
    return World(name, str(folder), model, params, made, found.gather(range(ROWS)))


def losses(world, params, mask, tx, batch=None):
    """The loss before each step and after the last but one."""
    trainable, frozen = tree.split(params, mask)
    step = engine.make_step(world.objective, tx, 1, 0)

    @jax.jit
    def run(trainable, frozen, batch):
        state = engine.TrainState(jnp.zeros((), jnp.int32), trainable, tx.init(trainable))
        return jax.lax.scan(lambda state, _: step(state, frozen, batch), state, None, length=STEPS)[1]["loss"]

    return run(trainable, frozen, batch or world.batch).tolist()


def assert_falls(seen):
    assert np.isfinite(seen).all(), seen
    assert seen[-1] < (1 - FALL) * seen[0], seen


def built(name, learning_rate, mask="rules", **hp):
    return updates.build(name, learning_rate=learning_rate, steps=STEPS, schedule_name="constant", warmup=0,
                         clip=0.0 if name in updates.PRIVATE else 1.0, mask=mask, **hp)[0]  # fmt: skip


def with_kernel(world, text):
    """The tree with a kernel on the queries and values of every layer, and what of it trains."""
    attn = world.params["layers"]["attn"]
    new = put({n: {"kernel": attn[n]["kernel"]} for n in "qv"}, text, fit=False)
    params = tree.nest(tree.flatten(world.params, is_leaf=lambda x: not isinstance(x, dict)))
    for n in "qv":
        params["layers"]["attn"][n]["kernel"] = new[n]["kernel"]
    return params, masks.declared(params, 0)


KERNELS = [m.name for m in registry.methods("kernel")]
# Λ = 0 between factors of 0.02: six steps at LoRA's rate would not show.
KERNEL_RATES = {"adalora": 3e-2, "c3a": 3e-2, "vera": 2e-2, "did": 2e-2, "said": 2e-2, "mhr_z": 1.0, "meteora": 2e-2}
FIT = {"c3a": "c3a(block=96)"}  # where the defaults fit neither width


@pytest.mark.parametrize("text", [*KERNELS, *TASKS, "lora(rank=8) @ nf4", "lora(rank=8) @ int8"])
def test_every_kernel(text, world):
    params, mask = with_kernel(world, FIT.get(text, text))
    if not any(jax.tree.leaves(mask)):  # a base that others stand around
        params, mask = with_kernel(world, f"lora @ {text}")
    tasks = {"tasks": np.arange(ROWS, dtype=np.int32) % 2} if text in TASKS else {}
    assert_falls(losses(world, params, mask, built("adamw", KERNEL_RATES.get(text, 2e-3)), world.batch | tasks))


TAPS = [m.name for m in registry.methods("tap") if m.traits["sites"]]  # the others go where a config says
TAP_FIT = {"lofit": "lofit(heads=0:1/1:3)", "qst": "qst(reduction=8)", "mixda_domain": "mixda_domain(width=64)"}  # heads that a first run would choose; a width that divides both
TAP_RATES = {"sciprompt": 5e-2, "lofit": 2e-2, "lofit_scale": 2e-2, "p_tuning": 1e-3}


def worded(world):
    """The language model as a classifier by label words, on the same texts with labels in turn."""
    tok = tokenizer.load(hf.resolve(world.name))
    words = tuple(tuple(tok.encode_batch([f" {w}"], add_special_tokens=False)[0][0] for w in own)
                  for own in (("bad", "poor"), ("good", "great")))  # fmt: skip
    model = world.model.with_head("label_words", label_ids=words)
    cfg = {"objective": "classification", "model": {"dropout": False}, "data": {"num_labels": 2}}
    batch = {k: world.batch[k] for k in ("input_ids", "attention_mask")} | {"label": np.arange(ROWS, dtype=np.int32) % 2}
    return world._replace(model=model, objective=engine.make_objective(cfg, model, SimpleNamespace(mask_id=None)), batch=batch)


@pytest.mark.parametrize("name", TAPS)
def test_every_tap(name, world):
    if name == "sciprompt":
        if world.name == "minilm":  # a sentence encoder without words to fill in
            with pytest.raises(UserError):
                world.model.with_head("label_words", label_ids=(1, 2))
            return
        world = worded(world)
    group, _ = method_of(TAP_FIT.get(name, name))
    params = (attached(world.model, world.params, name) if name in PARENTS
              else taps.attach(world.model, world.params, group["taps"], jax.random.key(1)))  # fmt: skip
    mask = masks.declared(params, 0)
    assert any(jax.tree.leaves(mask))
    batch = world.batch | {"tasks": np.arange(ROWS, dtype=np.int32) % 2} if name == "mixda_domain" else None
    assert_falls(losses(world, params, mask, built("adamw", TAP_RATES.get(name, 5e-3)), batch))


@pytest.fixture(scope="session")
def scores(world, tmp_path_factory):
    """``{kind: folder}`` of the scores of the world's batch."""
    mask, out = masks.rules(world.params, 0, trainable=[("layers/.*", True)]), tmp_path_factory.mktemp("scores")
    slope = importance.gradient(world.objective, world.params, mask, [world.batch])
    held = {"gradient": slope, "fisher": {p: x**2 for p, x in slope.items()}, "change": {p: np.abs(x) for p, x in slope.items()}}
    weights = tree.flatten(world.params)  # the slope of a gate on a unit, of the loss and not of a KL: two more passes take minutes
    held["disagreement"] = {p: (np.asarray(weights[p]) * slope[p]).sum(-2) for p in allocation.GATED}
    for kind, values in held.items():
        importance.save(out / kind, values, kind)
    return {kind: out / kind for kind in held}


# What an update needs to be met: the kernel that it is for, and hyper-parameters for so few steps.
FOR = {
    "lora_plus": ("lora", {}), "allora": ("lora", {}), "dp_sgd": ("lora", {"noise": 0.01}), "dp_adamw": ("lora", {"noise": 0.01}),
    "adalora_adamw": ("adalora(rank=8)", {"target": 4.0, "begin": 0.2, "end": 0.8, "every": 1}),
    "adamw_l1": ("", {"l1": 1e-5}),  # its default pull is larger than the gradient of so large a model, clipped to norm 1
}  # fmt: skip
RATES = {"sgd": 0.1, "dp_sgd": 0.5, "lora_plus": 1e-3, "allora": 2e-3, "dp_adamw": 2e-3, "adalora_adamw": 3e-2}


@pytest.mark.parametrize("name", [m.name for m in registry.methods("update")])
def test_every_update(name, world, scores):
    params, mask, hp = world.params, masks.rules(world.params, 0, trainable=[("layers/attn/.*", True)]), {}
    if name in FOR:
        text, hp = FOR[name]
        params, mask = with_kernel(world, text) if text else (params, mask)
    if name == "cofitune_soft":
        mask, hp = masks.rules(params, 0, trainable=[("layers/mlp/.*", True)]), {"scores": str(scores["disagreement"])}
    if name == "drift":  # drawn towards the model as it was
        params = tree.map_with_path(lambda p, x: 0.99 * x if p.startswith("layers/") else x, params)
        hp = {"prior": world.folder}
    assert_falls(losses(world, params, mask, built(name, RATES.get(name, 1e-4), **hp)))


NOTHING = {("bitfit", "smollm2")}  # a Llama has no biases
GATES = {"cofitune": "low=0.0", "lisa": "period=2", "only_layers": "layers='0-1'"}
ENTRIES = ("random", "magnitude", "movement", "fisher", "hft")  # sorts or draws for every entry: the attention alone


@pytest.mark.parametrize("name", [m.name for m in registry.methods("mask")])
def test_every_mask(name, world, scores):
    params, layers = world.params, [("layers/attn/.*" if name in ENTRIES else "layers/.*", True)]
    if name == "declared":
        params, _ = with_kernel(world, "lora")
    hp = ",".join(filter(None, (GATES.get(name), f"scores={scores[KINDS[name]]}" if name in KINDS else None)))
    text = f"{name}({hp})" if hp else name
    mask = masks.whole(params, text, () if name == "declared" else layers)
    if (name, world.name) in NOTHING:
        assert not any(jax.tree.leaves(mask))
        return
    assert_falls(losses(world, params, mask, built("adamw", 2e-3 if name == "declared" else 5e-4, mask=text)))


def test_the_contract_fails_a_method_that_does_not_move(world):
    """A rate of zero is told from one that learns."""
    params, mask = with_kernel(world, "lora")
    seen = losses(world, params, mask, built("adamw", 0.0))
    assert all(a == pytest.approx(b, rel=1e-6) for a, b in itertools.pairwise(seen))
    with pytest.raises(AssertionError):
        assert_falls(seen)
