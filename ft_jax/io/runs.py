"""A run on disk: ``workdir/{config.json, metrics.jsonl, tensorboard/, checkpoints/, best/, DONE}``."""

import json
import os
import shutil
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from tensorboardX import SummaryWriter

from ft_jax import recipe as recipes
from ft_jax import tree
from ft_jax.errors import UserError


def write_atomic(path, text):
    """Writes text beside ``path`` and renames it into place: a reader sees the old file or the new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
    """One training run's folder; opening it with another config than it holds is refused."""

    def __init__(self, workdir, config, *, keep=2, tensorboard=True):
        self.path = Path(workdir).resolve()
        self.config = json.loads(json.dumps(config))
        self._check()
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / "config.json").exists():
            write_atomic(self.path / "config.json", json.dumps(self.config, indent=1))
        self._managers = {
            name: ocp.CheckpointManager(
                self.path / name, options=ocp.CheckpointManagerOptions(max_to_keep=n, create=True, step_prefix=None)
            )
            for name, n in (("checkpoints", keep), ("best", 1))
        }
        self._tensorboard = SummaryWriter(str(self.path / "tensorboard")) if tensorboard else None

    def _check(self):
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"workdir {self.path} is a file, not a folder")
        file = self.path / "config.json"
        if not file.exists():
            if self.path.is_dir() and any(self.path.iterdir()):
                raise UserError(f"workdir {self.path} is not empty and holds no run; choose another --workdir")
            return
        try:
            held = json.loads(file.read_text())
        except json.JSONDecodeError as error:
            raise UserError(f"{file} is not valid JSON ({error}); remove the folder or choose another --workdir") from None
        difference = first_difference(held, self.config)
        if difference:
            raise UserError(f"workdir {self.path} holds a run with another config: {difference}; choose another --workdir")

    @property
    def summary(self):
        """What DONE holds, or None while the run is unfinished."""
        done = self.path / "DONE"
        return json.loads(done.read_text()) if done.exists() else None

    def finish(self, summary):
        for manager in self._managers.values():
            manager.wait_until_finished()
        write_atomic(self.path / "DONE", json.dumps(summary, indent=1))

    def close(self):
        for manager in self._managers.values():
            manager.close()
        if self._tensorboard:
            self._tensorboard.close()

    def need_space(self, num_bytes):
        free = shutil.disk_usage(self.path).free
        if free < num_bytes:
            raise UserError(f"no space for this run's checkpoints in {self.path}: they need about {num_bytes / 1e6:.0f} MB, "
                            f"{free / 1e6:.0f} MB are free")

    def log(self, step, metrics):
        row = {"step": step, **{k: float(v) for k, v in metrics.items()}}
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        if self._tensorboard:
            for key, value in metrics.items():
                self._tensorboard.add_scalar(key, float(value), step)

    def metrics(self):
        file = self.path / "metrics.jsonl"
        rows = file.read_text().splitlines() if file.exists() else []
        return [json.loads(row) for row in rows if row.endswith("}")]

    def rewind_metrics(self, step):
        """Drops the rows after ``step``, which the resumed run writes again."""
        rows = [row for row in self.metrics() if row["step"] <= step]
        write_atomic(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def save(self, name, step, items, meta):
        """Saves ``{item: tree of arrays}`` (flat by path) and JSON-able ``meta`` at a step; one already there is kept."""
        manager = self._managers[name]
        if step in manager.all_steps():
            return
        trees = {item: ocp.args.StandardSave(tree.flatten(value)) for item, value in items.items()}
        manager.save(step, args=ocp.args.Composite(**trees, meta=ocp.args.JsonSave(json.loads(json.dumps(meta)))))

    def latest(self, name):
        return self._managers[name].latest_step()

    def restore(self, name, templates):
        """({item: tree like its template, on its shardings}, meta) of the newest step saved under ``name``."""
        manager = self._managers[name]
        step = manager.latest_step()
        if step is None:
            raise UserError(f"{self.path / name} holds no checkpoint")
        flat = {item: tree.flatten(value) for item, value in templates.items()}
        wanted = {
            item: ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, value))
            for item, value in flat.items()
        }
        found = manager.restore(step, args=ocp.args.Composite(**wanted, meta=ocp.args.JsonRestore()))
        restored = {
            item: jax.tree.unflatten(jax.tree.structure(value), [found[item][path] for path in flat[item]])
            for item, value in templates.items()
        }
        return restored, found["meta"]

    def meta(self, name):
        manager = self._managers[name]
        if manager.latest_step() is None:
            raise UserError(f"{self.path / name} holds no checkpoint")
        return manager.restore(manager.latest_step(), args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]


def load_run(workdir, which="best"):
    """Rebuilds what a run trained: ``(model, params, recipe)``, params with their kernels and taps.

    which: ``best`` (by the run's evaluation metric; the last checkpoint if it never evaluated) or ``last``.
    Raises UserError when there is no run, no checkpoint, or the base has changed since.
    """
    path = Path(workdir)
    if not (path / "config.json").exists():
        raise UserError(f"{path} holds no run (no config.json)")
    run = Run(path, json.loads((path / "config.json").read_text()), tensorboard=False)
    try:
        name = "best" if which == "best" and run.latest("best") is not None else "checkpoints"
        recipe = recipes.of_config(run.config)
        recipe["fingerprint"] = run.meta(name)["fingerprint"]
        model, params, mask, _ = recipes.build(recipe)
        trainable, frozen = tree.split(params, mask)
        restored, _ = run.restore(name, {"trainable": trainable})
    finally:
        run.close()
    return model, tree.join(restored["trainable"], frozen), recipe
