"""Many runs as one program: members that share a base train under one ``vmap``, their ranks padded with zeros.

A zero column of A and the zero row of B that meets it get zero gradients, and every update of `PADDED` leaves a
zero with zero gradients where it is: so each member is the run it would be alone, up to rounding.
"""

import contextlib
import dataclasses
import functools
import json
import math
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm.auto import tqdm

from ft_jax import recipe, tree
from ft_jax import train as engine
from ft_jax.data import pipeline
from ft_jax.errors import UserError
from ft_jax.io import files
from ft_jax.io.runs import Run
from ft_jax.kernels import LowRank, is_kernel, parse_rule

# Updates that see each number of a leaf by itself, and so let ranks be padded with zeros.
PADDED = ("adamw", "adamw_l1", "lion", "lora_plus", "sgd")
SMALL_RANK, SPREAD = 64, 8  # ranks up to SMALL_RANK train together; above it the largest is at most SPREAD x the smallest


@dataclasses.dataclass
class Member:
    """One run of a population; ``parts`` are those of `train.prepare`, its params shapes alone."""

    name: str
    cfg: dict
    run: Run
    parts: dict
    meta: dict | None = None
    best: engine.Best | None = None
    step: int = 0
    active: bool = True  # neither failed nor stopped by patience

    @property
    def failed(self):
        return failure(self.run.path)

    @property
    def rank(self):
        leaves = jax.tree.leaves(self.parts["params"], is_leaf=lambda x: isinstance(x, LowRank))
        return max((x.a.shape[-1] for x in leaves if isinstance(x, LowRank)), default=0)

    @property
    def frozen_shapes(self):
        return tree.split(self.parts["params"], self.parts["mask"])[1]


def failure(path):
    """The message of a run that diverged, or None."""
    mark = Path(path) / "FAILED"
    return mark.read_text().strip() if mark.exists() else None


def train(configs, workdir, *, size=8, label="population"):
    """Trains ``{name: config}`` in ``workdir/name`` each, as `train.train` does, up to ``size`` of them in one program.

    Members of one program differ only in seed, learning rate, data, and the rank and alpha of low-rank kernels; what
    differs otherwise is another program. A run whose loss is not finite gets a file FAILED and leaves the others
    alone. Finished and failed runs are not touched again; unfinished ones resume with the members that they began with.

    Returns ``{name: summary of train.train, or {"failed": message}}``.
    Raises UserError, before anything trains, that names the member whose config is at fault.
    """
    if size < 1:
        raise UserError(f"a population has at least one member a program, not size={size}")
    # One checkpoint more than asked for until all have saved: a stop in between must leave a step that all hold.
    opened = {name: _told(name, engine.open_run, cfg, Path(workdir) / name, 1) for name, cfg in configs.items()}
    done = {name: run.summary for name, (_, run) in opened.items()}
    todo = {n: opened[n] for n in opened if not done[n] and not failure(opened[n][1].path)}
    todo |= {n: opened[n] for n in opened if not done[n] and n not in todo and _began_with(opened[n][1], todo)}
    load = functools.lru_cache(maxsize=1)(lambda spec: recipe.load(json.loads(spec), jax.random.key(0)))
    members = [
        Member(name, cfg, run, _told(name, _prepare, cfg, load(_spec(cfg))))
        for name, (cfg, run) in sorted(todo.items(), key=lambda item: _spec(item[1][0]))
    ]
    for number, group in enumerate(groups := _groups(members, size)):
        text = f"{label} {number + 1}/{len(groups)}" if len(groups) > 1 else label
        try:
            done |= _train(group, load(_spec(group[0].cfg)), text)
        finally:
            for member in group:
                member.run.close()
    return {name: done[name] or {"failed": failure(opened[name][1].path)} for name in configs}


def _told(name, fn, *args):
    try:
        return fn(*args)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def _spec(cfg):
    return json.dumps(cfg["model"], sort_keys=True)


def _prepare(cfg, base):
    parts = engine.prepare(cfg, base, dry=True)
    if jax.process_count() > 1 or parts["mesh"].size != parts["mesh"].shape["data"]:
        raise UserError("a population shards its members over mesh.data of one process; set mesh.fsdp and mesh.tensor to 1")
    return parts


# Who trains with whom


def _companions(run):
    file = run.path / "population.json"
    return json.loads(file.read_text())["members"] if file.exists() else None


def _began_with(run, todo):
    """Whether a failed run began in one program with a run that still is to be finished."""
    return bool(set(_companions(run) or ()) & todo.keys())


def _groups(members, size):
    """Lists of members that train as one program: those that began so, then the others by what their program is."""
    begun, fresh = {}, {}
    for member in members:
        names = _companions(member.run)
        begun.setdefault(tuple(names), []).append(member) if names else fresh.setdefault(_key(member), []).append(member)
    out = [sorted(group, key=lambda m, names=names: names.index(m.name)) for names, group in begun.items()]
    for alike in fresh.values():
        group = []
        for member in sorted(alike, key=lambda m: m.rank):
            if group and (len(group) == size or member.rank > max(SMALL_RANK, SPREAD * group[0].rank)):
                out.append(group)
                group = []
            group.append(member)
        out.append(group)
    return out


def _key(member):
    """What the program of a member is made of, as text: its config but for what may differ, every shape, the batch."""
    cfg = {k: v for k, v in member.cfg.items() if k not in ("seed", "data")}
    cfg["optimizer"] = {k: v for k, v in cfg["optimizer"].items() if k != "learning_rate"}
    rules = [(regex, *parse_rule(rule)) for regex, rule in cfg["method"]["kernels"]]
    rules = [(regex, name, {k: v for k, v in hp.items() if k not in ("rank", "alpha")}) for regex, name, hp in rules]
    cfg["method"] = {k: v for k, v in cfg["method"].items() if k != "name"} | {"kernels": rules}
    padded = cfg["optimizer"]["name"] in PADDED
    leaves = tree.flatten(member.parts["params"], is_leaf=is_kernel)
    shapes = {path: _shapes(leaf, padded) for path, leaf in leaves.items()}
    batch = {k: (v.shape, str(v.dtype)) for k, v in member.parts["data"]["train"].gather([0]).items()}
    return json.dumps([cfg, shapes, jax.tree.leaves(member.parts["mask"]), batch], sort_keys=True, default=str)


def _shapes(leaf, padded):
    """Shapes of a leaf as text; low-rank factors that can be padded without their rank."""
    if padded and isinstance(leaf, LowRank):
        return [type(leaf).__name__, _shapes(leaf.base, padded), leaf.a.shape[:-1], leaf.b.shape[-1:]]
    return str(jax.tree.map(jnp.shape, leaf))


# One program


def _train(members, base, label):
    """Trains a group to its end; ``{name: summary}`` of those that did not fail."""
    cfg, first = members[0].cfg, _resume_at(members)
    clock = engine.Clock()
    carry, frozen, rates = _start(members, base, first)
    step_fn = _program(members[0], frozen, jax.tree.map(lambda x: x.sharding, carry))
    evaluate = engine.make_eval(members[0].parts["objective"])
    batches = _batches(members, first)
    with tqdm(total=cfg["steps"], initial=first, desc=label, unit="step", dynamic_ncols=True) as bar:
        for step in range(first + 1, cfg["steps"] + 1):
            if not any(m.active for m in members):
                break
            carry, metrics = step_fn(carry, rates, frozen.own, frozen.shared, next(batches))
            clock.tick(metrics)
            ends = step == cfg["steps"]
            logs, evals, saves = (ends or (every and step % every == 0) for every in
                                  (cfg["log"]["every"], cfg["eval"]["every"], cfg["save"]["every"]))  # fmt: skip
            if logs or evals or saves:
                with clock.paused(metrics):
                    _note_failures(members, carry, metrics)
                    if logs:
                        _log(members, step, metrics)
                        bar.set_postfix(loss=_span(members, metrics["loss"]), refresh=False)
                    ended = _evaluate(members, step, carry[0], frozen, evaluate) if evals else []
                    if saves or ended:
                        _save([m for m in members if m.active] if saves else ended, members, step, carry[0])
                    for member in ended:
                        member.active = False
                    carry = carry[0], _place(np.asarray([m.active for m in members]), frozen.mesh)
            bar.update()
    return _finish(members, carry[0], clock)


@dataclasses.dataclass
class Frozen:
    """The frozen half: leaves that all members share, leaves of their own stacked, and how to put them together."""

    mesh: jax.sharding.Mesh
    structure: jax.tree_util.PyTreeDef
    shared: dict
    own: dict

    def join(self, own, shared):
        leaves = own | shared
        return self.structure.unflatten([leaves[i] for i in range(len(leaves))])


def _program(member, frozen, shardings):
    """``(carry, rates, own, shared, batch) -> (carry, metrics)`` of all members; carry is (state, alive), donated.

    A member whose loss or gradient is not finite keeps its last state and is no longer alive.
    """
    cfg, objective = member.cfg, member.parts["objective"]

    def one(carry, rates, own, shared, batch):
        state, alive = carry
        tx, _ = engine.optimizer(cfg, rates["learning_rate"])
        step = engine.make_step(objective, tx, cfg["accumulate"], rates["seed"])
        new, metrics = step(state, frozen.join(own, shared), batch["own"] | batch["shared"])
        alive = alive & jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        return (jax.tree.map(lambda a, b: jnp.where(alive, a, b), new, state), alive), metrics

    every = jax.vmap(one, in_axes=(0, 0, 0, None, {"own": 0, "shared": None}))
    return jax.jit(every, donate_argnums=0, out_shardings=(shardings, None))


def _place(x, mesh, stacked=True):
    """A tree on the mesh: the leading axis of members over data where it divides them, otherwise whole."""

    def sharding(leaf):
        split = stacked and leaf.shape[0] % mesh.shape["data"] == 0
        return NamedSharding(mesh, P("data") if split else P())

    return jax.tree.map(lambda leaf: jax.device_put(leaf, sharding(leaf)), x)


def _batches(members, first):
    """Batches ``{own: stacked, shared: one for all}`` from step ``first`` on; all is shared if seed and data are."""
    mesh, cfg = members[0].parts["mesh"], members[0].cfg
    orders = {json.dumps([m.cfg["seed"], m.cfg["data"]], sort_keys=True): m for m in members}
    streams = {
        order: pipeline.prefetch(pipeline.batches(m.parts["data"]["train"], cfg["batch_size"], m.cfg["seed"]), first)
        for order, m in orders.items()
    }
    if len(streams) == 1:
        yield from ({"own": {}, "shared": _place(batch, mesh, False)} for batch in next(iter(streams.values())))
    wanted = [json.dumps([m.cfg["seed"], m.cfg["data"]], sort_keys=True) for m in members]
    while True:
        found = {order: next(stream) for order, stream in streams.items()}
        stacked = {k: np.stack([found[order][k] for order in wanted]) for k in found[wanted[0]]}
        yield {"own": _place(stacked, mesh), "shared": {}}


# State: each member's own, padded and stacked


def _padded(x, shape):
    out = np.zeros(shape, x.dtype)
    out[tuple(slice(n) for n in x.shape)] = x
    return out


def _stack(trees, mesh):
    """Trees of one structure as one, every leaf padded with zeros to the largest and stacked."""

    def stack(*leaves):
        shape = tuple(max(sizes) for sizes in zip(*(x.shape for x in leaves), strict=True))
        return np.stack([_padded(np.asarray(x), shape) for x in leaves])

    return _place(jax.tree.map(stack, *trees), mesh)


def _split_frozen(halves, mesh):
    structure = jax.tree.structure(halves[0])
    shared, own = {}, {}
    for i, leaves in enumerate(zip(*map(jax.tree.leaves, halves), strict=True)):
        if all(x is leaves[0] or (x.shape == leaves[0].shape and bool((x == leaves[0]).all())) for x in leaves):
            shared[i] = _place(leaves[0], mesh, False)
        else:
            own[i] = _stack(leaves, mesh)
    return Frozen(mesh, structure, shared, own)


def _start(members, base, first):
    """((state, alive), frozen, rates): fresh, or as the checkpoints of step ``first`` left them."""
    mesh, states, halves = members[0].parts["mesh"], [], []
    for member in members:
        state, frozen = _told(member.name, _restore, member, base, first)
        states.append(state)
        halves.append(frozen)
    if not first:
        members[0].run.need_space(sum(_bytes(s) for s in states) * (members[0].cfg["save"]["keep"] + 1))
    for member in members:
        files.write_json(member.run.path / "population.json", {"members": [m.name for m in members]})
    alive = _place(np.asarray([m.active for m in members]), mesh)
    rates = {"learning_rate": np.asarray([m.cfg["optimizer"]["learning_rate"] for m in members], np.float32),
             "seed": np.asarray([m.cfg["seed"] & 0xFFFFFFFF for m in members], np.uint32)}  # fmt: skip
    return (_stack(states, mesh), alive), _split_frozen(halves, mesh), _place(rates, mesh)


def _bytes(state):
    return sum(x.nbytes for x in jax.tree.leaves((state.trainable, state.trainable, state.opt_state)))


def _restore(member, base, first):
    """(state, frozen) of one member with its own ranks."""
    cfg, run, parts = member.cfg, member.run, member.parts
    run.begin()
    _, params, mask, fingerprint = recipe.build(recipe.of_config(cfg), base)
    trainable, frozen = tree.split(params, mask)
    opt_state = parts["tx"].init(trainable)
    meta = {"recipe": {**recipe.of_config(cfg), "fingerprint": fingerprint}, "best": None, "stale": 0}
    member.step = 0 if member.failed else first if member.active else run.latest("checkpoints")
    if member.step:
        recipe.check_base(cfg["model"]["path"], fingerprint, run.meta("checkpoints")["recipe"]["fingerprint"])
        items, meta = run.restore("checkpoints", {"trainable": trainable, "opt_state": opt_state})
        trainable, opt_state = items["trainable"], items["opt_state"]
    if member.active:
        run.rewind_metrics(member.step)
    member.meta, member.best = meta, engine.Best(cfg["eval"]["metric"], *(meta["best"] or ()))
    return engine.TrainState(jnp.asarray(member.step, jnp.int32), trainable, opt_state), frozen


def _saved_steps(run):
    folder = run.path / "checkpoints"
    return {int(p.name) for p in folder.iterdir() if p.name.isdigit()} if folder.is_dir() else set()


def _resume_at(members):
    """The newest step that all members hold; later checkpoints of a save that was cut short are taken away."""
    for member in members:
        patience = member.cfg["eval"]["patience"]
        stopped = bool(patience and _saved_steps(member.run)) and member.run.meta("checkpoints")["stale"] >= patience
        member.active = not member.failed and not stopped
    active = [m for m in members if m.active]
    if not active:
        return members[0].cfg["steps"]
    held = [_saved_steps(m.run) for m in active]
    first = max(set.intersection(*held), default=0)
    for member, steps in zip(active, held, strict=True):
        member.run.close()  # its manager, if open, still counts what is removed here
        for step in steps:
            if step > first:
                shutil.rmtree(member.run.path / "checkpoints" / str(step))
    return first


def _own(member, i, state):
    """The state of member ``i`` out of the stack (numpy), without padding, as its own run holds it."""
    trainable = tree.split(member.parts["params"], member.parts["mask"])[0]
    shapes = engine.TrainState(None, trainable, jax.eval_shape(member.parts["tx"].init, trainable))
    own = engine.TrainState(None, state.trainable, state.opt_state)
    cut = jax.tree.map(lambda x, s: jnp.asarray(x[i][tuple(slice(n) for n in s.shape)]), own, shapes)
    return cut.replace(step=state.step[i])


# What is written


def _note_failures(members, carry, metrics):
    alive, steps, losses = jax.device_get((carry[1], carry[0].step, metrics["loss"]))
    for i, member in enumerate(members):
        if member.active and not alive[i]:
            _fail(member, int(steps[i]) + 1, losses[i])


def _fail(member, step, loss):
    member.active = False
    message = engine.divergence(step, loss, member.run)
    files.write(member.run.path / "FAILED", (message + "\n").encode())
    print(f"{member.name}: {message}", file=sys.stderr)


def _span(members, values):
    values = [float(v) for v, m in zip(np.asarray(values), members) if m.active]
    return f"{min(values):.4f}–{max(values):.4f}" if values else "none left"


def _log(members, step, metrics):
    found = jax.device_get(metrics)
    for i, member in enumerate(members):
        if member.active:
            row = {f"train/{k}": v[i] for k, v in found.items()}
            member.run.log(step, row | {"lr": member.parts["lr"](step - 1)})


def _evaluate(members, step, state, frozen, evaluate):
    """Evaluates each member on its own validation data; returns those whose patience is at its end."""
    ended = []
    for i, member in enumerate(members):
        if not member.active:
            continue
        trainable, own = jax.tree.map(lambda x, i=i: x[i], (state.trainable, frozen.own))
        held_out = pipeline.eval_batches(member.parts["data"]["validation"], member.cfg["eval"]["batch_size"])
        held = evaluate(trainable, frozen.join(own, frozen.shared), (_place(b, frozen.mesh, False) for b in held_out))
        if not math.isfinite(held["loss"]):
            _fail(member, step, held["loss"])
            continue
        member.run.log(step, {f"validation/{k}": v for k, v in held.items()})
        better = member.best.take(held, step)
        member.meta["stale"] = 0 if better else member.meta["stale"] + 1
        if better:
            kept = {"recipe": member.meta["recipe"], "best": member.meta["best"], "stale": member.meta["stale"]}
            member.run.save("best", step, {"trainable": _own(member, i, state).trainable}, {**kept, "validation": held})
        if 0 < member.cfg["eval"]["patience"] <= member.meta["stale"]:
            ended.append(member)
    return ended


def _save(chosen, members, step, state):
    host = jax.device_get(state)
    for i, member in enumerate(members):
        if member in chosen:
            own = _own(member, i, host)
            member.meta["best"] = [member.best.value, member.best.step] if member.best.step else None
            member.run.save("checkpoints", step, {"trainable": own.trainable, "opt_state": own.opt_state}, member.meta)


def _finish(members, state, clock):
    host, done = jax.device_get(state), {}
    for i, member in enumerate(members):
        if member.failed:
            continue
        summary = engine.summarise(member.run, _own(member, i, host), member.frozen_shapes, member.best, clock)
        rate = summary["steps_per_second"]
        done[member.name] = summary | {"steps_per_second": rate and rate * len(members)}
    for member in members:
        if member.name in done:
            member.run.finish(done[member.name])
            member.run.close()
            _drop_oldest(member)
    return done


def _drop_oldest(member):
    """Leaves as many checkpoints as the config keeps."""
    for step in sorted(_saved_steps(member.run))[: -member.cfg["save"]["keep"]]:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(member.run.path / "checkpoints" / str(step))
