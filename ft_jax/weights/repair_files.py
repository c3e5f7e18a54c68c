"""Intruder repair of checkpoints on disk: a model folder, or a PEFT adapter, one matrix pair in memory at a time."""

import pathlib

import jax.numpy as jnp
import numpy as np
import tqdm

from ft_jax.analysis import compare
from ft_jax.errors import UserError
from ft_jax.io import files, hf, patch, safetensors, tokenizer
from ft_jax.io.adapted import Adapted
from ft_jax.kernels import LowRank
from ft_jax.weights import repair

MEASURES = ("intruders", "effective_rank", "delta_norm")


def target(tuned, out):
    """What will be written under ``out``: a source that `compare` takes. UserError where it would replace its input."""
    folder, read = pathlib.Path(out) / "repaired", [tuned]
    if isinstance(tuned, Adapted):
        read = [tuned.base, tuned.folder]
    for source in read:
        if folder.resolve() == pathlib.Path(source).resolve():
            raise UserError(f"{folder} is what is to be repaired; choose another --out")
    return Adapted(tuned.base, folder) if isinstance(tuned, Adapted) else folder


def run(base, tuned, summary, out, *, factor=0.7, control="none", which="top", include=None, exclude=compare.EXCLUDE,
        engine="auto", effective_rank=False, progress=True):  # fmt: skip
    """Writes ``out/repaired``, a checkpoint of the kind that ``tuned`` is, and ``out/repair.json``; returns its content.

    summary: what `compare.compare` returned for the same pair and options; its cosines tell the intruders, so the base
    is not factorised again. Every tensor without an intruder is copied byte for byte. The numbers after the repair come
    from the files written. Finished output of the same settings and inputs is not computed again.
    """
    repair.check(factor, control, which)
    mended, out, k = target(tuned, out), pathlib.Path(out), summary["k"]
    settings = {"base": compare.identity(base), "tuned": compare.identity(tuned), "factor": factor, "control": control,
                "which": which, "k": k, "eps": summary["eps"], "include": include, "exclude": exclude}  # fmt: skip
    done = out / "repair.json"
    held = files.read_json(done) if done.is_file() else {}
    if held.get("settings") == settings and held.get("written") == _written(mended):
        return held
    rows = {row["name"]: row for row in summary["matrices"]}
    pairs = [p for p in compare.plan(base, tuned, include, exclude)[0] if any(rows[n]["intruders"] for n in _names(p))]
    done.unlink(missing_ok=True)
    changed = _write(base, tuned, mended, pairs, rows, {"factor": factor, "control": control, "which": which},
                     summary["eps"], progress)  # fmt: skip
    after = compare.stream(base, mended, pairs, out / "repaired.jsonl", k=k, eps=summary["eps"], engine=engine,
                           effective_rank=effective_rank, progress=progress)  # fmt: skip
    after = compare.summarise(base, mended, [after.get(n, row) for n, row in rows.items()], {}, k=k, eps=summary["eps"])
    report = {"settings": settings, "written": _written(mended), **_report(summary, after, changed, tuned, mended, control)}
    files.write_json(done, report)
    return report


def _names(pair):
    return [f"{pair.name}[{i}]" for i in range(pair.shape[0])] if len(pair.shape) == 3 else [pair.name]


def _folder(source):
    return source.folder if isinstance(source, Adapted) else pathlib.Path(source)


def _written(source):
    """The identity of what lies there; None where it is not whole."""
    held = files.entries(_folder(source))
    whole = ("adapter_config.json" if isinstance(source, Adapted) else "config.json") in held
    return compare.identity(source) if whole and any(name.endswith(".safetensors") for name in held) else None


def _sources(tuned):
    """``(the safetensors to copy, the small files that go with them)``."""
    if isinstance(tuned, Adapted):
        names = ("adapter_config.json", *tokenizer.FILES)
        held = [tuned.folder / name for name in names if (tuned.folder / name).is_file()]
        return safetensors.Checkpoint(tuned.folder / "adapter_model.safetensors"), held
    checkpoint, index = safetensors.Checkpoint(tuned), ".safetensors.index.json"
    small = {file for pattern in hf.PATTERNS if pattern != "*.safetensors" for file in pathlib.Path(tuned).glob(pattern)}
    return checkpoint, sorted(file for file in small if not file.name.endswith(index))


def _write(base, tuned, mended, pairs, rows, how, eps, progress):
    """Copies the checkpoint with the matrices of ``pairs`` mended; returns a row for each."""
    changed, (checkpoint, others) = [], _sources(tuned)
    with patch.copied(checkpoint, _folder(mended), others) as write:
        for pair in tqdm.tqdm(pairs, desc="repair", unit="matrix", disable=not progress):
            first, second = safetensors.Checkpoint(base), compare.opened(tuned)  # anew: a memory map keeps what it has read
            flip = (lambda x: x) if pair.in_out else (lambda x: x.swapaxes(-1, -2))
            w0, w = flip(first.read(pair.base_name)), flip(second.read(pair.name))
            cosine = np.array([rows[name]["max_cosine"] for name in _names(pair)])
            found = {"w": repair.of_matrices(w0, w, k=cosine.shape[-1], eps=eps, cosine=cosine.reshape(*w.shape[:-2], -1))}
            exact = repair.apply({"w": w}, found, **how)["w"]
            stored = _store(second, pair.name, w0, exact, found, how, write, flip)
            lost = _share(stored - exact, exact - w0)
            for row in repair.changes(found, **how):
                index = tuple(row.pop("index"))
                changed.append({**row, "path": f"{pair.name}[{index[0]}]" if index else pair.name, "lost": float(lost[index])})
    return changed


def _share(part, whole):
    """‖part‖_F / ‖whole‖_F of each matrix; 0 where there is nothing."""
    part, whole = (np.linalg.norm(x, axis=(-2, -1)) for x in (part, whole))
    return np.where(whole > 0, part / np.where(whole > 0, whole, 1), 0)


def _store(second, name, w0, exact, found, how, write, flip):
    """Writes one tensor of a model, or its factors in an adapter; returns the matrix that this makes, ``[…, in, out]``."""
    keys = second.keys(name) if hasattr(second, "keys") else {"whole": name}
    if "whole" in keys:
        return flip(write(keys["whole"], flip(exact)))
    a, b, scale = second.factors(name)
    kernel = LowRank(jnp.asarray(w0), jnp.asarray(a.T), jnp.asarray(b.T), jnp.float32(scale))
    kernel = repair.apply({"w": kernel}, found, **how)["w"]
    a, b = (write(keys[part], np.asarray(x).T) for part, x in (("A", kernel.a), ("B", kernel.b)))
    return w0 + np.float32(scale) * (b @ a).T


def totals(rows):
    """Intruders and ‖ΔW‖_F over all matrices; mean effective rank of ΔW over those that changed, None where not known."""
    moved = [row["effective_rank"] for row in rows if row["delta_norm"] > 0]
    known = bool(moved) and None not in moved
    return {"intruders": sum(row["intruders"] for row in rows), "with_intruders": sum(row["intruders"] > 0 for row in rows),
            "effective_rank": float(np.mean(moved)) if known else None,
            "delta_norm": float(np.sqrt(sum(row["delta_norm"] ** 2 for row in rows)))}  # fmt: skip


def _notes(rows, control):
    """What a control could not do, in sentences."""
    alone = sum(row["neighbour"] is None for row in rows) if control == "neighbour" else 0
    gone = sum(row.get("shrink") == 0 for row in rows)
    notes = ((alone, "matrices have only intruders among their top directions, so none beside them: they stay as they are"),
             (gone, "matrices are the base's again: their whole ΔW is smaller than the intruder's change"))
    return [f"{count} {text}" for count, text in notes if count]


def _report(before, after, changed, tuned, mended, control):
    sides = {"before": before["matrices"], "after": after["matrices"]}
    by_name = {side: {row["name"]: row for row in rows} for side, rows in sides.items()}
    rows = [{"name": row.pop("path"), **row} for row in changed]
    for row in rows:
        for side, held in by_name.items():
            row[side] = {key: held[row["name"]][key] for key in MEASURES}
    return {
        "kind": "adapter" if isinstance(tuned, Adapted) else "model", "folder": str(_folder(mended)),
        "matrices": len(before["matrices"]), "mended": sum(row["change"] > 0 for row in rows),
        "notes": _notes(rows, control),
        "change": float(np.sqrt(sum(row["change"] ** 2 for row in rows))),
        "lost": max((row["lost"] for row in rows), default=0.0),
        **{side: totals(held) for side, held in sides.items()}, "rows": rows,
    }  # fmt: skip
