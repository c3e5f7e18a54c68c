"""Many runs as one program: members that share a base train under one ``vmap``, their ranks padded with zeros.

A zero column of A and the zero row of B that meets it get zero gradients, and every update of `stacking.PADDED` leaves a
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
from tqdm.auto import tqdm

from ft_jax import calibrate, recipe, stacking, tree
from ft_jax import train as engine
from ft_jax.data import pipeline
from ft_jax.errors import Stopped, UserError
from ft_jax.io import files
from ft_jax.io.runs import Run
from ft_jax.kernels import LowRank
from ft_jax.progress import Stop

SMALL_RANK, SPREAD = 64, 8  # ranks up to SMALL_RANK train together; above it the largest is at most SPREAD x the smallest


@dataclasses.dataclass(eq=False)
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

    @functools.cached_property
    def rank(self):
        leaves = jax.tree.leaves(self.parts["params"], is_leaf=lambda x: isinstance(x, LowRank))
        return max((x.a.shape[-1] for x in leaves if isinstance(x, LowRank)), default=0)

    @functools.cached_property
    def shapes(self):
        """((trainable, optimiser state), frozen) as shapes, with the member's own ranks."""
        trainable, frozen = tree.split(self.parts["params"], self.parts["mask"])
        return (trainable, jax.eval_shape(self.parts["tx"].init, trainable)), frozen


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
        Member(name, cfg, run, _told(name, _prepare, cfg, load(_spec(cfg)), run.start))
        for name, (cfg, run) in sorted(todo.items(), key=lambda item: _spec(item[1][0]))
    ]
    programs = {}
    for number, group in enumerate(groups := _groups(members, size)):
        text = f"{label} {number + 1}/{len(groups)}" if len(groups) > 1 else label
        try:
            done |= _train(group, load(_spec(group[0].cfg)), programs, text)
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


def _prepare(cfg, base, start):
    parts = engine.prepare(cfg, base, dry=True, start=start)
    if jax.process_count() > 1 or parts["mesh"].size != parts["mesh"].shape["data"]:
        raise UserError("a population shards its members over mesh.data of one process; set mesh.fsdp and mesh.tensor to 1")
    return parts


# Who trains with whom


def _companions(run):
    file = run.path / "population.json"
    if not file.exists():
        return None
    names = files.read_json(file).get("members")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{file}: does not say with whom this run began; remove it, and the run goes on by itself")
    return names


def _began_with(run, todo):
    """Whether a failed run began in one program with a run that still is to be finished."""
    return bool(set(_companions(run) or ()) & todo.keys())


def _groups(members, size):
    """Lists of members that train as one program: those that began so, then the others by what their program is."""
    begun, fresh, named = {}, {}, {}
    for member in members:
        if not _saved_steps(member.run):  # killed while it told its members one by one that they begin together
            named |= dict.fromkeys(_companions(member.run) or (), _companions(member.run))
    for member in members:
        names = _companions(member.run) or named.get(member.name)
        table, key = (begun, tuple(names)) if member.name in (names or ()) else (fresh, (stacking.program_key(member), max(_saved_steps(member.run), default=0)))
        table.setdefault(key, []).append(member)
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


# One program


def _train(members, base, programs, label):
    """Trains a group to its end; ``{name: summary}`` of those that did not fail."""
    cfg, clock, carry = members[0].cfg, engine.Clock(), None
    while carry is None:
        first = _resume_at(members)
        with contextlib.suppress(Damaged):  # then the newest step that all hold is an earlier one
            carry, frozen, rates = _start(members, base, first)
    step_fn, evaluate = _program(programs, members, frozen, carry)
    batches = _batches(members, first)
    with tqdm(total=cfg["steps"], initial=first, desc=label, unit="step", dynamic_ncols=True) as bar, Stop() as stop:
        for step in range(first + 1, cfg["steps"] + 1):
            if not any(m.active for m in members):
                break
            carry, metrics = step_fn(carry, rates, frozen.own, frozen.shared, next(batches))
            clock.tick(metrics)
            ends = step == cfg["steps"]
            logs, evals, saves = (ends or (every and step % every == 0) for every in
                                  (cfg["log"]["every"], cfg["eval"]["every"], cfg["save"]["every"]))  # fmt: skip
            stops = stop.asked(True) and not ends
            if logs or evals or saves or stops:
                with clock.paused(metrics):
                    _note_failures(members, carry, metrics)
                    if logs:
                        _log(members, step, metrics)
                        bar.set_postfix(loss=_span(members, metrics["loss"]), refresh=False)
                    ended = _evaluate(members, step, carry[0], frozen, evaluate) if evals else []
                    if saves or ended or stops:
                        _save([m for m in members if m.active] if saves or stops else ended, members, step, carry[0])
                    for member in ended:
                        member.active = False
                    carry = carry[0], stacking.place(np.asarray([m.active for m in members]), members[0].parts["mesh"])
            bar.update()
            if stops:
                raise Stopped(f"stopped by SIGTERM after step {step} of {label}, which is saved; the same command goes on from there")
    return _finish(members, carry[0], clock)


def _program(programs, members, frozen, carry):
    """(step, evaluate) of a group; groups of one kind and size share them, and what was compiled."""
    first = members[0]
    key = stacking.program_key(first), len(members), tuple(frozen.own)
    if key not in programs:
        shardings = jax.tree.map(lambda x: x.sharding, carry)
        step = stacking.step_of(first.cfg, first.parts["objective"], frozen.join, shardings)
        programs[key] = step, engine.make_eval(first.parts["objective"])
    return programs[key]


def _batches(members, first):
    """Batches ``{own: stacked, shared: one for all}`` from step ``first`` on; all is shared if seed and data are."""
    mesh, cfg = members[0].parts["mesh"], members[0].cfg
    wanted = [json.dumps([m.cfg["seed"], m.cfg["data"]], sort_keys=True) for m in members]
    streams = {
        order: pipeline.prefetch(pipeline.batches(m.parts["data"]["train"], cfg["batch_size"], m.cfg["seed"]), first)
        for order, m in dict(zip(wanted, members)).items()
    }
    while True:
        found = {order: next(stream) for order, stream in streams.items()}
        if len(found) == 1:
            yield {"own": {}, "shared": stacking.place(found[wanted[0]], mesh, stacked=False)}
        else:
            stacked = {k: np.stack([found[order][k] for order in wanted]) for k in found[wanted[0]]}
            yield {"own": stacking.place(stacked, mesh), "shared": {}}


# State and what is written


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
    alive = np.asarray([m.active for m in members])
    rates = {"learning_rate": np.asarray([m.cfg["optimizer"]["learning_rate"] for m in members], np.float32),
             "seed": np.asarray([m.cfg["seed"] & 0xFFFFFFFF for m in members], np.uint32)}  # fmt: skip
    carry = stacking.stack(states, mesh), stacking.place(alive, mesh)
    return carry, stacking.stack_frozen(halves, mesh), stacking.place(rates, mesh)


def _bytes(state):
    return sum(x.nbytes for x in jax.tree.leaves((state.trainable, state.trainable, state.opt_state)))


class Damaged(Exception):
    """A member's checkpoint of the step that all hold could not be read and was put aside."""


def _restore(member, base, first):
    """(state, frozen) of one member with its own ranks."""
    cfg, run, parts = member.cfg, member.run, member.parts
    _, params, mask, fingerprint = recipe.build(recipe.of_config(cfg), base, start=run.start,
                                             gather=calibrate.of_config(cfg, engine.make_objective))
    run.begin(recipe.started(params, cfg["method"]))
    trainable, frozen = tree.split(recipe.stored(params, mask, cfg["model"]["frozen_dtype"]), mask)
    opt_state = parts["tx"].init(trainable)
    meta = {"recipe": {**recipe.of_config(cfg), "fingerprint": fingerprint}, "best": None, "stale": 0}
    member.step = 0 if member.failed else first if member.active else run.latest("checkpoints")
    if member.step:
        member.step, items, meta = run.restore("checkpoints", {"trainable": trainable, "opt_state": opt_state},
                                               lambda meta: recipe.check_base(cfg["model"]["path"], fingerprint, meta["recipe"]["fingerprint"]))  # fmt: skip
        trainable, opt_state = items["trainable"], items["opt_state"]
        if member.active and member.step != first:
            raise Damaged
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
        _told(member.name, member.run.take)  # before anything of a run is read that another process may still write
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
        member.run.forget()  # its manager, if open, still counts what is removed here
        for step in steps:
            if step > first:
                shutil.rmtree(member.run.path / "checkpoints" / str(step))
    return first


def _own(member, i, state):
    """The state of member ``i`` out of the stack as its own run holds it."""
    trainable, opt_state = stacking.cut((state.trainable, state.opt_state), i, member.shapes[0])
    return engine.TrainState(state.step[i], trainable, opt_state)


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
    ended, host = [], jax.device_get(state)
    for i, member in enumerate(members):
        if not member.active:
            continue
        trainable, own = stacking.take((state.trainable, frozen.own), i)
        held_out = pipeline.eval_batches(member.parts["data"]["validation"], member.cfg["eval"]["batch_size"])
        inputs = (stacking.place(b, member.parts["mesh"], stacked=False) for b in held_out)
        held = evaluate(trainable, frozen.join(own, frozen.shared), inputs)
        if not math.isfinite(held["loss"]):
            _fail(member, step, held["loss"])
            continue
        member.run.log(step, {f"validation/{k}": v for k, v in held.items()})
        better = member.best.take(held, step)
        member.meta["stale"] = 0 if better else member.meta["stale"] + 1
        if better:
            kept = {"recipe": member.meta["recipe"], "best": member.meta["best"], "stale": member.meta["stale"]}
            member.run.save("best", step, {"trainable": _own(member, i, host).trainable}, {**kept, "validation": held})
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
        summary = engine.summarise(member.run, _own(member, i, host), member.shapes[1], member.best, clock)
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
        shutil.rmtree(member.run.path / "checkpoints" / str(step))
