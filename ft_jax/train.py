"""The one engine: state, step and loop for every model, method and objective."""

import dataclasses
import functools
import math
import resource

import jax
import jax.numpy as jnp
import optax
from flax import struct
from tqdm.auto import tqdm

from ft_jax import calibrate, gated, parallel, recipe, registry, tree, updates
from ft_jax.data import pipeline, prompts
from ft_jax.errors import Stopped, UserError, nearest
from ft_jax.io import hf, tokenizer
from ft_jax.io.runs import Run
from ft_jax.kernels import mixture, parse_rule
from ft_jax.models import extend
from ft_jax.objectives import data_of, terms
from ft_jax.progress import Best, Clock, Stop

# Every key a train config may hold, with its default; configs/train.py says what each one means.
DEFAULTS = {
    "seed": 0, "steps": 200, "batch_size": 16, "accumulate": 1, "objective": "classification",
    "model": {"path": "minilm", "head": "", "num_labels": 0, "label_ids": (), "dtype": "float32", "frozen_dtype": "float32",
              "remat": "none", "dropout": True}, "data": {},
    "method": {"name": "full", "kernels": (), "taps": (), "mask": "rules", "trainable": (), "freeze_layers": 0,
               "reinit_layers": 0, "start_examples": 256},
    "optimizer": {"name": "adamw", "learning_rate": 1e-5, "schedule": "linear", "warmup": 0.06, "clip": 1.0, "hp": {}},
    "eval": {"every": 50, "batch_size": 32, "metric": "loss", "patience": 0},
    "save": {"every": 100, "keep": 2},
    "log": {"every": 10, "tensorboard": True},
    "mesh": {"data": -1, "fsdp": 1, "sequence": 1, "tensor": 1},
}  # fmt: skip
OBJECTIVE_HEADS = {
    "classification": ("classification", "prototype", "label_words"), "causal_lm": ("lm",), "mlm": ("mlm",),
    "instruction_alignment": ("lm",),
}  # fmt: skip
POSITIVE = ("steps", "batch_size", "accumulate", "eval.batch_size", "save.every", "save.keep", "log.every",
            "method.start_examples")  # fmt: skip
NOT_NEGATIVE = (
    "seed", "model.num_labels", "method.freeze_layers", "method.reinit_layers", "eval.every", "eval.patience",
    "optimizer.learning_rate", "optimizer.warmup", "optimizer.clip",
)  # fmt: skip
RULES = {"method.kernels": (str, str), "method.taps": (str, str), "method.trainable": (str, bool)}  # of what each rule is a pair


@struct.dataclass
class TrainState:
    """What a step changes: the trainable half of the tree and its optimiser state."""

    step: jax.Array
    trainable: dict
    opt_state: optax.OptState


def complete(cfg, defaults=DEFAULTS, prefix=""):
    """``cfg`` (dict or ConfigDict) with defaults filled in; UserError for an unknown key or a value of another type."""
    out = {}
    for key in cfg:
        if key not in defaults:
            raise UserError(f"unknown config key {prefix + key!r}{nearest(key, defaults)}")
    for key, default in defaults.items():
        value = cfg.get(key, default)
        name = prefix + key
        if isinstance(default, dict) and not hasattr(value, "items"):
            raise UserError(f"config key {name!r} holds {value!r}; it is a group of {', '.join(default) or 'settings'}")
        if name == "data":
            out[key] = pipeline.settings(value)
        elif name == "optimizer.hp":
            out[key] = dict(value.items())
        elif isinstance(default, dict):
            out[key] = complete(value, default, name + ".")
        else:
            out[key] = _typed(name, value, default)
    return out


def _typed(name, value, default):
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(default, tuple) and isinstance(value, (list, tuple)):
        value = [list(v) if isinstance(v, (list, tuple)) else v for v in value]
        if (kinds := RULES.get(name)) and (odd := [v for v in value if not isinstance(v, list) or tuple(map(type, v)) != kinds]):
            raise UserError(f"config key {name!r} holds {odd[0]!r}; each of its rules is a pair of a {kinds[0].__name__} and a {kinds[1].__name__}")
        return value
    if type(value) is not type(default):
        raise UserError(f"config key {name!r} is {value!r}; it takes a {type(default).__name__}, such as {default!r}")
    if name in POSITIVE and value < 1:
        raise UserError(f"config key {name!r} is {value}; it must be at least 1")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"config key {name!r} is {value}; it must be finite")
    if name in NOT_NEGATIVE and value < 0:
        raise UserError(f"config key {name!r} is {value}; it cannot be negative")
    return value


def make_objective(cfg, model, tok):
    """``(params, batch, rng) -> (loss, metrics)`` for a config."""
    (name, hp), own = parse_rule(cfg["objective"]), {}
    needs = registry.get("objective", name).traits["needs"]
    heads = OBJECTIVE_HEADS.get(name, ())
    if heads and model.config.head not in heads:
        raise UserError(
            f"objective {name!r} needs a model head of {', '.join(heads)}; this model has {model.config.head!r}"
        )
    for method in registry.methods("objective"):
        for key in method.traits["needs"]:
            if bool(cfg.get("data", {}).get(key)) != (key in needs):
                raise UserError(f"data setting {key} and objective {method.name!r} go together; this objective is {name!r}")
    if name == "classification" and model.config.num_labels != cfg["data"]["num_labels"]:
        raise UserError(f"data.num_labels is {cfg['data']['num_labels']} but the model's head has {model.config.num_labels}")
    if name == "mlm":
        if tok.mask_id is None:
            raise UserError("objective 'mlm' needs a tokenizer with a mask token; this one has none")
        own = {"mask_token_id": tok.mask_id, "vocab_size": model.config.vocab_size}
    if given := sorted(own.keys() & hp.keys()):
        raise UserError(f"objective {name!r}: {given[0]} is what the tokenizer and the model say")

    def fn(*args):
        return registry.call("objective", name, *args, **hp, **own)

    return terms.added(fn, model, cfg["model"]["dropout"])


def _total(micro, keys, part):
    """The sum of ``part(micro-batch, its key)`` over the micro-batches."""
    first = jax.tree.map(lambda x: x[0], (micro, keys))
    if keys.shape[0] == 1:
        return part(*first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(part, *first))
    sums, _ = jax.lax.scan(lambda s, xs: (jax.tree.map(jnp.add, s, part(*xs)), None), zeros, (micro, keys))
    return sums


def make_step(objective, tx, accumulate, seed):
    """``step(state, frozen, batch) -> (state, metrics)``; the batch is cut into ``accumulate`` micro-batches."""
    tx = optax.with_extra_args_support(tx)

    def loss_fn(trainable, frozen, batch, rng):
        return objective(tree.join(trainable, frozen), batch, rng)

    def step(state, frozen, batch):
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        micro = jax.tree.map(lambda x: x.reshape(accumulate, x.shape[0] // accumulate, *x.shape[1:]), batch)
        keys = rng[None] if accumulate == 1 else jax.random.split(rng, accumulate)
        total = functools.partial(_total, micro, keys)

        def at(trainable):
            """(gradient, metrics, weight) of the batch at these weights."""

            def part(rows, key):
                (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(trainable, frozen, rows, key)
                weight = metrics.pop("weight")
                return *jax.tree.map(lambda x: x * weight, (grads, metrics)), weight

            grads, metrics, weight = total(part)
            return *jax.tree.map(lambda x: x / jnp.maximum(weight, 1e-9), (grads, metrics)), weight

        def each(fn):
            """(Σ fn(gradient of one example), number of examples)."""

            def one(row, key):
                row = jax.tree.map(lambda x: x[None], row)
                return fn(jax.grad(loss_fn, has_aux=True)(state.trainable, frozen, row, key)[0])

            def part(rows, key):
                found = jax.vmap(one)(rows, jax.random.split(key, size // accumulate))
                return jax.tree.map(lambda x: x.sum(0), found)

            size = jax.tree.leaves(batch)[0].shape[0]
            return total(part), size

        def outputs():
            return total(lambda rows, key: objective.outputs(tree.join(state.trainable, frozen), rows, key))

        grads, metrics, weight = at(state.trainable)
        moves, opt_state = tx.update(grads, state.opt_state, state.trainable, grad_fn=lambda p, i: at(p)[0], each=each,
                                     outputs=outputs)  # fmt: skip
        new = TrainState(state.step + 1, optax.apply_updates(state.trainable, moves), opt_state)
        return new, metrics | {"grad_norm": optax.global_norm(grads), "weight": weight}

    return step


def make_eval(objective):
    """``evaluate(trainable, frozen, batches) -> {metric: weighted mean}``, compiled once."""
    one = jax.jit(lambda t, f, batch: objective(tree.join(t, f), batch, None)[1])

    def evaluate(trainable, frozen, batches):
        totals, weight = {}, 0.0
        for batch in batches:
            metrics = {k: float(v) for k, v in one(trainable, frozen, batch).items()}
            w = metrics.pop("weight")
            weight += w
            for key, value in metrics.items():
                totals[key] = totals.get(key, 0.0) + w * value
        return {key: value / max(weight, 1e-9) for key, value in totals.items()}

    return evaluate


def ready(cfg):
    """The config as a run has it: completed, and with what its data say filled in."""
    cfg = complete(cfg)
    if cfg["objective"] == "classification" and not cfg["model"]["num_labels"]:
        cfg["model"]["num_labels"] = cfg["data"]["num_labels"]
    prompts.fill(cfg)
    return cfg


def open_run(cfg, workdir, spare=0):
    """``(ready config, Run)``, keeping ``spare`` checkpoints more than asked; nothing is loaded or written yet."""
    cfg = ready(cfg)
    return cfg, Run(workdir, cfg, keep=cfg["save"]["keep"] + spare, tensorboard=cfg["log"]["tensorboard"])


def optimizer(cfg, learning_rate):
    """``(optax transformation, schedule)`` of a config with another peak ``learning_rate``, which may be traced."""
    opt = cfg["optimizer"]
    if own := {"learning_rate", "warmup", "clip", "steps", "mask", "schedule_name"} & opt["hp"].keys():
        raise UserError(f"optimizer.hp holds {min(own)!r}, which is no parameter of an update; known: {', '.join(opt)}")
    return updates.build(opt["name"], learning_rate=learning_rate, steps=cfg["steps"], schedule_name=opt["schedule"],
                         warmup=opt["warmup"], clip=opt["clip"], mask=cfg["method"]["mask"], **opt["hp"])  # fmt: skip


def prepare(cfg, base=None, dry=False, start=None):
    """Everything that can fail before compute: model, method, data, mesh. Returns a dict of the parts.

    base: a `recipe.Base` that is loaded already. dry: the params are shapes alone. start: `Run.start` of a run that began.
    """
    mesh = parallel.make_mesh(**cfg["mesh"])
    if cfg["batch_size"] % cfg["accumulate"]:
        raise UserError(f"batch_size {cfg['batch_size']} is not a multiple of accumulate {cfg['accumulate']}")
    parallel.check_batch(cfg["batch_size"] // cfg["accumulate"], mesh)
    parallel.check_batch(cfg["eval"]["batch_size"], mesh)
    tx, lr = optimizer(cfg, cfg["optimizer"]["learning_rate"])
    tok = tokenizer.load(hf.resolve(cfg["model"]["path"]))
    model, params, mask, fingerprint = recipe.build(recipe.of_config(cfg), base, dry, start=start,
                                                   gather=calibrate.of_config(cfg, make_objective))
    jax.eval_shape(tx.init, tree.split(params, mask)[0])  # an update that this method does not suit says so
    if not dry:  # a population lays its members out by itself
        model = dataclasses.replace(model, mesh=mesh)
    params = recipe.stored(params, mask, cfg["model"]["frozen_dtype"])
    objective = make_objective(cfg, model, tok)
    limit = model.config.positions - sum(extend.lengths(params.get("taps", {})))
    if (length := pipeline.settings(cfg["data"])["max_length"]) > limit:
        raise UserError(f"data.max_length {length} is beyond the {limit} positions that {cfg['model']['path']!r} has for tokens")
    data = {
        split: pipeline.build(cfg["data"], split, tok, data_of(cfg["objective"]), model.config.vocab_size)
        for split in ("train", "validation")
    }
    if data["train"].tasks:
        mixture.route(params, range(data["train"].tasks))  # a kernel that holds fewer tasks says so
    terms.check(params, data["train"].tasks)
    sample = {**data["validation"].gather([0]), "weight": jnp.ones(1)}
    measured = jax.eval_shape(lambda p, batch: objective(p, batch, None)[1], params, sample).keys() - {"weight"}
    if cfg["eval"]["metric"] not in measured:
        raise UserError(f"eval.metric {cfg['eval']['metric']!r} is not measured{nearest(cfg['eval']['metric'], measured)}")
    return {"mesh": mesh, "tx": tx, "lr": lr, "model": model, "params": params, "mask": mask,
            "fingerprint": fingerprint, "objective": objective, "data": data}  # fmt: skip


def train(cfg, workdir, *, label="train"):
    """Fine-tunes by config in ``workdir``; a second call resumes, a finished run returns its summary at once.

    Returns the summary that DONE holds: steps, best step and metric, last validation, steps/s, sizes.
    Raises UserError before compute for whatever can be known by then, and at the first loss that is not finite.
    """
    cfg, run = open_run(cfg, workdir)
    if run.summary:
        return run.summary
    parts = prepare(cfg, start=run.start)
    run.begin(recipe.started(parts["params"], cfg["method"]))
    try:
        return _train(cfg, run, parts, label)
    finally:
        run.close()


def _start(cfg, run, parts):
    """(state, frozen, meta): fresh, or as the newest checkpoint left them."""
    trainable, frozen = tree.split(parallel.shard(parts["params"], parts["mesh"]), parts["mask"])
    opt_state = parallel.shard(jax.jit(parts["tx"].init)(trainable), parts["mesh"])
    size = _bytes(trainable)
    run.need_space((size + _bytes(opt_state)) * (cfg["save"]["keep"] + 1) + 2 * size)
    meta = {"recipe": {**recipe.of_config(cfg), "fingerprint": parts["fingerprint"]}, "best": None, "stale": 0}
    step = 0
    if run.latest("checkpoints"):
        path, found = cfg["model"]["path"], parts["fingerprint"]
        step, items, meta = run.restore("checkpoints", {"trainable": trainable, "opt_state": opt_state},
                                        lambda meta: recipe.check_base(path, found, meta["recipe"]["fingerprint"]))  # fmt: skip
        trainable, opt_state = items["trainable"], items["opt_state"]
    run.rewind_metrics(step)
    step = parallel.shard(jnp.asarray(step, jnp.int32), parts["mesh"])
    return TrainState(step, trainable, opt_state), frozen, meta


def _train(cfg, run, parts, label):
    mesh, data = parts["mesh"], parts["data"]
    state, frozen, meta = _start(cfg, run, parts)
    del parts["params"]
    best = Best(cfg["eval"]["metric"], *(meta["best"] or ()))
    step_fn = make_step(parts["objective"], parts["tx"], cfg["accumulate"], cfg["seed"])
    # The state keeps its shardings, else the second step finds others than the first and compiles again.
    step_fn = jax.jit(step_fn, donate_argnums=0, out_shardings=(jax.tree.map(lambda x: x.sharding, state), None))
    evaluate = make_eval(parts["objective"])
    first, stale, finite, clock = int(state.step), meta["stale"], jnp.asarray(True), Clock()
    rows = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    batches = pipeline.prefetch(pipeline.batches(data["train"], cfg["batch_size"], cfg["seed"], **rows), first)
    bar = tqdm(total=cfg["steps"], initial=first, desc=label, unit="step", dynamic_ncols=True)
    stopped = 0 < cfg["eval"]["patience"] <= stale  # by patience, then killed before DONE
    with bar, Stop() as stop:
        for step in range(first + 1, first if stopped else cfg["steps"] + 1):
            state, metrics = step_fn(state, frozen, parallel.shard_batch(next(batches), mesh))
            clock.tick(metrics)
            finite = finite & jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
            ends = step == cfg["steps"]
            if step % cfg["log"]["every"] == 0 or ends:
                _check_finite(finite, metrics, step, run)
                run.log(step, {f"train/{k}": v for k, v in metrics.items()} | {"lr": parts["lr"](step - 1)})
                bar.set_postfix(loss=f"{float(metrics['loss']):.4f}", refresh=False)
            if ends or (cfg["eval"]["every"] and step % cfg["eval"]["every"] == 0):
                _check_finite(finite, metrics, step, run)
                with clock.paused(metrics):
                    held_out = pipeline.eval_batches(data["validation"], cfg["eval"]["batch_size"], **rows)
                    held = evaluate(state.trainable, frozen, (parallel.shard_batch(b, mesh) for b in held_out))
                    _check_finite(math.isfinite(held["loss"]), held, step, run)
                    run.log(step, {f"validation/{k}": v for k, v in held.items()})
                    stale = 0 if best.take(held, step) else stale + 1
                    if stale == 0:
                        run.save("best", step, {"trainable": state.trainable}, {**meta, "validation": held})
                ends = ends or 0 < cfg["eval"]["patience"] <= stale
            stops = stop.asked(step % cfg["log"]["every"] == 0) and not ends
            if ends or stops or step % cfg["save"]["every"] == 0:
                _check_finite(finite, metrics, step, run)
                meta = {**meta, "best": [best.value, best.step] if best.step else None, "stale": stale}
                with clock.paused(metrics):
                    run.save("checkpoints", step, {"trainable": state.trainable, "opt_state": state.opt_state}, meta)
            bar.update()
            if stops:
                raise Stopped(f"stopped by SIGTERM after step {step}, which is saved in {run.path}; the same command goes on from there")
            if ends:
                break

    summary = summarise(run, state, frozen, best, clock)
    summary |= updates.spent(cfg["optimizer"], cfg["batch_size"], len(data["train"]), summary["steps"])
    run.finish(summary)
    return summary


def _check_finite(finite, metrics, step, run):
    if not bool(finite):
        raise UserError(divergence(step, metrics["loss"], run))


def divergence(step, loss, run):
    """What to say of a run whose loss or gradient was not finite by ``step``."""
    saved = run.latest("checkpoints")
    kept = f"the checkpoint of step {saved} is intact" if saved else "nothing was saved"
    return (f"the loss or its gradient stopped being finite by step {step} (loss {float(loss)}) in {run.path}; {kept}. "
            "Lower optimizer.learning_rate, set optimizer.clip, or use model.dtype=float32")


def _bytes(values):
    return sum(x.nbytes for x in jax.tree.leaves(values))


def summarise(run, state, frozen, best, clock):
    """What DONE holds; ``frozen`` may be shapes."""
    rows = [row for row in run.metrics() if any(k.startswith("validation/") for k in row)]
    trains = tree.count(state.trainable)
    return {
        "steps": int(state.step), "best_step": best.step, f"best_{best.metric}": best.value,
        "validation": {k.removeprefix("validation/"): v for k, v in rows[-1].items() if k != "step"},
        "trainable_parameters": trains, "moving_parameters": gated.moving(state.trainable, state.opt_state),
        "total_parameters": trains + tree.count(frozen),
        "optimizer_bytes": _bytes(state.opt_state), "steps_per_second": clock.rate,
        "compile_seconds": clock.first, "seconds": clock.total, "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "device": jax.devices()[0].device_kind, "devices": jax.device_count(),
    }  # fmt: skip
