"""A run on disk: ``workdir/{config.json, metrics.jsonl, tensorboard/, checkpoints/, best/, DONE}``.

With methods that start from data or from other runs also ``start.safetensors``: the arrays that they began with. Of several
processes the first one writes what is not a checkpoint; checkpoints are written by all.
"""

import functools
import json
import os
import shutil
import sys
import tempfile
import time
import zlib

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from ft_jax import recipe as recipes
from ft_jax import tree
from ft_jax.errors import UserError, disk_full, one_line
from ft_jax.io import files, safetensors

OVERHEAD = 300_000  # bytes that a checkpoint of the smallest tree takes: metadata, indices, a block for each file


def first_difference(old, new, prefix="config"):
    """``"config.steps is 10 there and 20 here"`` for the first key that differs, else None."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            found = first_difference(old.get(key), new.get(key), f"{prefix}.{key}")
            if found:
                return found
        return None
    return None if old == new else f"{prefix} is {json.dumps(old)} there and {json.dumps(new)} here"


class Run:
    """One training run's folder; opening it with another config than it holds is refused. ``begin`` makes it."""

    def __init__(self, workdir, config, *, keep=2, tensorboard=True):
        self.path = files.local(workdir).resolve()
        self.config = json.loads(json.dumps(config))
        self._keep, self._wants_tensorboard = keep, tensorboard
        self._first = jax.process_index() == 0
        self._check()

    def begin(self, start=None):
        """Makes the folder, takes it and notes the config; nothing is written before, so a config at fault leaves no trace.

        start: what `recipe.started` gave; kept, so that the run can be rebuilt without the data or runs that it came from.
        Raises UserError when another process has the folder.
        """
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"begin {self.path}")  # all have looked at the folder before one writes to it
        if not self._first:
            return
        files.make_folder(self.path)
        self.take()
        # The config first: a folder without one is taken for no run, and a start that is missing is made again.
        if not (self.path / "config.json").exists():
            files.write_json(self.path / "config.json", self.config)
        if start and not self.start:
            safetensors.save(self.path, sorted(start.items()), stem="start")

    def take(self):
        """Locks the folder, if there is one, until `close` or the process's end, and clears what a killed one left half written."""
        if "_lock" in self.__dict__ or not self._first or not self.path.is_dir():
            return
        self._lock = files.lock(self.path)
        files.sweep(self.path)
        for half in self.path.glob("*/*.orbax-checkpoint-tmp*"):
            shutil.rmtree(half, ignore_errors=True)

    @functools.cached_property
    def _managers(self):
        # Not in the background: what fails there is told late, by tracebacks from other threads.
        options = {"create": True, "step_prefix": None, "enable_async_checkpointing": False}
        return {
            name: ocp.CheckpointManager(self.path / name, options=ocp.CheckpointManagerOptions(max_to_keep=n, **options))
            for name, n in (("checkpoints", self._keep), ("best", 1))
        }

    @functools.cached_property
    def _events(self):
        if not self._wants_tensorboard:
            return None
        from ft_jax.io.events import Events

        return Events(files.make_folder(self.path / "tensorboard"))

    def _check(self):
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"workdir {self.path} is a file, not a folder")
        file = self.path / "config.json"
        if not file.exists():
            if self.path.is_dir() and files.strangers(self.path):
                raise UserError(f"workdir {self.path} is not empty and holds no run; choose another --workdir")
            return
        try:
            held = files.read_json(file)
        except UserError as error:
            raise UserError(f"{error}; remove the folder or choose another --workdir") from None
        difference = first_difference(held, self.config)
        if difference:
            raise UserError(f"workdir {self.path} holds a run with another config: {difference}; choose another --workdir")

    @property
    def start(self):
        """``{path: array}``: what kernels and taps began with that started from data or other runs; empty for other methods."""
        file = self.path / "start.safetensors"
        return dict(safetensors.Checkpoint(file).items()) if file.exists() else {}

    @property
    def summary(self):
        """What DONE holds, or None while the run is unfinished."""
        done = self.path / "DONE"
        return files.read_json(done) if done.exists() else None

    def finish(self, summary):
        if self._first:
            files.write_json(self.path / "DONE", summary)

    def forget(self):
        """Closes the checkpoint managers: the next use counts what is there anew."""
        for manager in self.__dict__.pop("_managers", {}).values():
            manager.close()

    def close(self):
        self.forget()
        if events := self.__dict__.pop("_events", None):
            events.close()
        if lock := self.__dict__.pop("_lock", None):
            files.unlock(self.path, lock)

    def need_space(self, num_bytes):
        """UserError when the disk cannot take ``num_bytes`` of checkpoints beside what the run already wrote."""
        held = sum(f.stat().st_size for f in self.path.rglob("*") if f.is_file())
        free = shutil.disk_usage(self.path).free
        if free < num_bytes - held:
            raise UserError(f"no space for this run's checkpoints in {self.path}: they need about "
                            f"{(num_bytes - held) / 1e6:.0f} MB more, {free / 1e6:.0f} MB are free")

    def log(self, step, metrics):
        metrics = {k: float(v) for k, v in metrics.items()}
        if not self._first:
            return
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        if self._events:
            self._events.log(step, metrics)

    def metrics(self):
        file = self.path / "metrics.jsonl"
        try:
            rows = file.read_text("utf-8").splitlines() if file.exists() else []
            found = [json.loads(row) for row in rows if row.endswith("}")]  # the last may be cut short
            if all(type(row.get("step")) is int for row in found):
                return found
            raise ValueError("a row has no step")
        except (ValueError, AttributeError, RecursionError) as error:
            raise UserError(f"{file}: cannot be read ({one_line(error)}); what was trained is in the checkpoints: with this file removed "
                            "the same command goes on") from None

    def rewind_metrics(self, step):
        """Drops the rows after ``step``, which the resumed run writes again; TensorBoard is told to hide its own."""
        if not self._first:
            return
        rows = [row for row in self.metrics() if row["step"] <= step]
        files.write(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
        if step and self._events:
            self._events.restart(step + 1)

    def save(self, name, step, items, meta):
        """Saves ``{item: tree of arrays}`` (flat by path) and JSON-able ``meta`` at a step; one already there is kept."""
        manager = self._managers[name]
        if step in manager.all_steps():
            return
        flat = {item: tree.flatten(value) for item, value in items.items()}
        self._reserve(sum(x.nbytes for x in jax.tree.leaves(flat)))
        held = {"meta": json.loads(json.dumps(meta)), "sums": {item: _sums(value) for item, value in flat.items()}}
        trees = {item: ocp.args.StandardSave(value) for item, value in flat.items()}
        manager.save(step, args=ocp.args.Composite(**trees, meta=ocp.args.JsonSave(held)))

    def _reserve(self, num_bytes):
        """Takes the space of a checkpoint and gives it back: a full disk or a limit is met here, not halfway through."""
        try:
            with tempfile.TemporaryFile(dir=self.path) as file:
                os.posix_fallocate(file.fileno(), 0, int(1.1 * num_bytes) + OVERHEAD)
        except OSError as error:
            if disk_full(error):  # else: a file system that cannot tell
                raise OSError(error.errno, error.strerror, str(self.path)) from None

    def latest(self, name):
        return self._managers[name].latest_step()

    def restore(self, name, templates, check=lambda meta: None):
        """The newest checkpoint under ``name`` that is whole: ``(step, {item: tree like its template, on its shardings}, meta)``.

        One that is damaged is said on stderr and put aside as ``damaged-STEP``. check: called with the meta first, may refuse.
        Raises UserError where there is none, or where all are damaged; those are left as they are.
        """
        manager, damaged = self._managers[name], {}
        for step in sorted(manager.all_steps(), reverse=True):
            try:
                found = self._read(manager, step, templates, check)
            except (UserError, MemoryError):
                raise
            except Exception as error:  # whatever the readers of a damaged file happen to meet
                damaged[step] = one_line(error) or type(error).__name__
                continue
            for bad, why in damaged.items():
                print(f"{self.path / name}: the checkpoint of step {bad} is damaged ({why[:200]}); going on from that of step {step}", file=sys.stderr)
                if self._first:
                    (self.path / name / str(bad)).rename(self.path / f"damaged-{name}-{bad}-{time.time_ns()}")
            if damaged:
                manager.reload()
            return step, *found
        if damaged:
            step, why = next(iter(damaged.items()))
            raise UserError(f"{self.path / name}: no checkpoint can be read; that of step {step}: {why[:300]}")
        raise UserError(f"{self.path / name} holds no checkpoint")

    def _read(self, manager, step, templates, check):
        meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        check(meta["meta"])
        flat = {item: tree.flatten(value) for item, value in templates.items()}
        wanted = {item: ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, value)) for item, value in flat.items()}
        found = manager.restore(step, args=ocp.args.Composite(**wanted))
        for item in templates:
            if odd := [path for path, total in _sums(found[item]).items() if total != meta["sums"][item].get(path, total)]:
                raise ValueError(f"the numbers of {item} {odd[0]} are not those that were saved")
        return {
            item: jax.tree.unflatten(jax.tree.structure(value), [found[item][path] for path in flat[item]])
            for item, value in templates.items()
        }, meta["meta"]

    def meta(self, name):
        """The meta of the newest checkpoint under ``name`` whose meta can be read."""
        manager = self._managers[name]
        for step in sorted(manager.all_steps(), reverse=True):
            try:
                return manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]["meta"]
            except Exception as error:
                failed = one_line(error)
        if manager.all_steps():
            raise UserError(f"{self.path / name}: no checkpoint can be read: {failed[:300]}")
        raise UserError(f"{self.path / name} holds no checkpoint")


def _sums(arrays):
    """``{path: CRC-32 of the numbers}`` of what this process holds whole: nothing of an array that is spread over several."""
    return {path: zlib.crc32(np.ascontiguousarray(x).view(np.uint8).reshape(-1)) for path, x in arrays.items()
            if getattr(x, "is_fully_addressable", True)}  # fmt: skip


def load_run(workdir, which="best", base=None):
    """Rebuilds what a run trained: ``(model, params, recipe)``, params with their kernels and taps.

    which: ``best`` (by the run's evaluation metric; the last checkpoint if it never evaluated) or ``last``;
    base: the `recipe.Base` of the run's ``model``, where it is loaded already.
    Raises UserError when there is no run, no checkpoint, or the base has changed since.
    """
    path = files.local(workdir)
    if not (path / "config.json").exists():
        raise UserError(f"{path} holds no run (no config.json)")
    run = Run(path, files.read_json(path / "config.json"), tensorboard=False)
    try:
        name = "best" if which == "best" and run.latest("best") is not None else "checkpoints"
        recipe = run.meta(name)["recipe"]
        model, params, mask, _ = recipes.build(recipe, base, start=run.start)
        trainable, frozen = tree.split(params, mask)
        _, restored, _ = run.restore(name, {"trainable": trainable})
    finally:
        run.close()
    return model, tree.join(restored["trainable"], frozen), recipe
