"""Our side of the benchmarks, for `worker`: functions of a spec that return ``(facts, step)``."""

import jax
import jax.numpy as jnp
import numpy as np

from ft_jax import plan, recipe, train, tree
from ft_jax.models import Model, config_from_hf

LINEAR = r"layers/(attn|mlp)/\w+/kernel"
METHODS = {"full": (), "lora": ((LINEAR, "lora(rank=8, alpha=16)"),), "qlora": ((LINEAR, "lora(rank=8, alpha=16) @ nf4"),)}


def sizes_of(shape, layers=None):
    """The Hugging Face config of a name in `plan.SHAPES`, or of one given whole."""
    raw = plan.SHAPES[shape] if isinstance(shape, str) else shape
    return raw | ({"num_hidden_layers": layers} if layers else {})


def tokens(spec):
    """Token ids [batch, length], the same for every side."""
    return np.random.RandomState(0).randint(0, spec["sizes"]["vocab_size"], (spec["batch"], spec["length"])).astype(np.int32)


def config(spec, path=""):
    """The train config of a spec: AdamW at a constant rate, no clipping, no decay."""
    return train.complete({
        "steps": 1000, "batch_size": spec["batch"], "objective": "causal_lm",
        "model": {"path": path, "head": "lm", "dropout": False, "remat": spec.get("remat", "none"), "dtype": spec.get("dtype", "float32")},
        "method": {"name": spec["method"], "kernels": METHODS.get(spec["method"]) or ((LINEAR, spec["method"]),) * (spec["method"] != "full")},
        "optimizer": {"learning_rate": 1e-4, "schedule": "constant", "warmup": 0.0, "clip": 0.0},
        "data": {"source": "bench.jsonl", "max_length": spec["length"]},
    })  # fmt: skip


def engine(spec):
    """``(step, state, frozen)`` of the engine, on the weights of ``spec["folder"]``, or on random ones where there is none."""
    cfg = config(spec, spec.get("folder", ""))
    base = None
    if "folder" not in spec:
        model = Model(config_from_hf(spec["sizes"], head="lm"), dtype=cfg["model"]["dtype"], remat=cfg["model"]["remat"])
        base = recipe.Base(model, model.init(jax.random.key(0)), (), "")
    model, params, mask, _ = recipe.build(recipe.of_config(cfg), base)
    trainable, frozen = tree.split(params, mask)
    tx, _ = train.optimizer(cfg, cfg["optimizer"]["learning_rate"])
    state = train.TrainState(jnp.zeros((), jnp.int32), trainable, jax.jit(tx.init)(trainable))
    return jax.jit(train.make_step(train.make_objective(cfg, model, None), tx, 1, 0), donate_argnums=0), state, frozen


def engine_step(spec):
    """``(batch -> metrics, trainable, frozen)``: each call is a training step that has ended; the halves are shapes."""
    run, state, frozen = engine(spec)
    shapes = jax.eval_shape(lambda *halves: halves, state.trainable, frozen)
    held = {"state": state}
    del state

    def step(batch):
        held["state"], metrics = run(held.pop("state"), frozen, batch)
        jax.block_until_ready(held["state"])
        return metrics

    return step, *shapes


def train_step(spec):
    """A training step on the weights of ``spec["folder"]``."""
    (advance, *halves), ids = engine_step(spec), tokens(spec)
    batch = jax.device_put({"input_ids": ids, "attention_mask": np.ones_like(ids), "loss_mask": np.ones_like(ids)})
    trains, frozen = (tree.flatten(half) for half in halves)
    weights = [x.size for path, x in frozen.items() if not path.endswith("kernel/scale")]  # alpha / rank is no parameter to the peers
    facts = {"parameters": tree.count(trains) + sum(weights), "trainable": tree.count(trains)}

    def step():
        return {"loss": float(advance(batch)["loss"])} | _device_peak()

    return facts, step


def generate(spec):
    """Greedy tokens after random prompts, as `sampling` gives them."""
    from ft_jax import sampling
    from ft_jax.io import hf

    model, params = hf.load(spec["folder"], head="lm")
    prompts = tokens(spec).tolist()

    def step():
        return {"tokens": sampling.generate(model, params, prompts, max_new_tokens=spec["new"])}

    return {}, step


def _device_peak():
    stats = jax.devices()[0].memory_stats() or {}
    return {"peak_bytes": stats["peak_bytes_in_use"]} if "peak_bytes_in_use" in stats else {}


def weights(folder, sizes):
    """A folder with random weights of these sizes, which every side reads."""
    from ft_jax.io import hf

    model = Model(config_from_hf(sizes, head="lm"))
    hf.save(folder, model, model.init(jax.random.key(0)))
    return str(folder)
