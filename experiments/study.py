"""What every study shares: parts that are computed once and kept, one failure that loses nothing else, the page, the claims.

A study is a table of parts. A part is a function ``(Context) -> JSON-able value``; its value lies in
``workdir/parts/NAME.json`` and is never computed twice. Parts run in order and may read the values of earlier ones.
"""

import dataclasses
import importlib.metadata
import json
import logging
import os
import platform
import re
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

from ft_jax.analysis import report as page
from ft_jax.errors import ArgumentParser, UserError, nearest, one_line
from ft_jax.io import files

RESULTS_LIMIT = 2_000_000  # bytes of results that are kept beside a study


class Missing(UserError):
    """A part needs another one that failed or was left out."""


@dataclasses.dataclass(frozen=True)
class Context:
    """What a part sees: the setting of the scale that runs, its folder, and what earlier parts found."""

    setting: Any
    workdir: Path

    def value(self, part):
        """The value of a finished part; `Missing` otherwise."""
        found = held(self.workdir / "parts" / f"{part}.json")
        if found is None:
            raise Missing(f"needs the part {part!r}, which is not done")
        return found["value"]

    def get(self, part, default=None):
        """The value of a part, or ``default`` where it is not done: for pages that show what there is."""
        found = held(self.workdir / "parts" / f"{part}.json")
        return default if found is None else found["value"]


@dataclasses.dataclass(frozen=True)
class Study:
    """A study as data.

    scales: ``{smoke, cpu, full: setting}``. parts: ``setting -> {name: (Context) -> value}``, in order.
    page: ``Context -> (title, subtitle, sections)`` for `ft_jax.analysis.report.page`, drawn from parts alone.
    claims: ``Context -> rows {claim, paper, ours, verdict, why}``.
    """

    name: str
    question: str
    scales: dict[str, Any]
    parts: Callable[[Any], dict[str, Callable[[Context], Any]]]
    page: Callable[[Context], tuple]
    claims: Callable[[Context], list] = lambda context: []

    def setting(self, scale):
        if scale not in self.scales:
            raise UserError(f"{self.name} has no scale {scale!r}{nearest(scale, self.scales)}")
        return self.scales[scale]


def held(path):
    """What a part's file holds, ``{seconds, value}``, or None while there is none."""
    return files.read_json(path) if path.exists() else None


def once(path, make):
    """The value kept in the JSON at ``path``; made and written whole if it is not there yet."""
    if not path.exists():
        started = time.perf_counter()
        value = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = {"seconds": time.perf_counter() - started, "machine": machine(), "value": value}
        files.write(path, json.dumps(kept, indent=None, separators=(",", ":")).encode())
    return held(path)["value"]


def default_workdir(study, scale):
    return Path("runs") / study.name / scale


def status(study, scale, workdir=None):
    """``{part: "done" | "failed" | "to do"}``."""
    folder = Path(workdir or default_workdir(study, scale)) / "parts"
    return {
        name: "done" if (folder / f"{name}.json").exists() else "failed" if (folder / f"{name}.failed").exists() else "to do"
        for name in study.parts(study.setting(scale))
    }


def run(study, scale="cpu", workdir=None, only=".*"):
    """Computes the parts that are missing (``only``: regex on their names), then writes summary.json and report.html.

    A part that fails leaves ``parts/NAME.failed`` (its traceback) and the others go on; parts that need it fail too.
    Returns the names of the parts that failed.
    """
    setting = study.setting(scale)
    workdir = Path(workdir or default_workdir(study, scale))
    _same_setting(workdir, setting)
    context, failed = Context(setting, workdir), []
    parts = study.parts(setting)
    if not any(re.fullmatch(only, name) for name in parts):
        raise UserError(f"--only={only!r} matches no part of {study.name}{nearest(only, parts)}")
    todo = [n for n in parts if re.fullmatch(only, n) and not (workdir / "parts" / f"{n}.json").exists()]
    for name in (bar := tqdm(todo, desc=study.name, unit="part", disable=not todo)):
        bar.set_postfix_str(name)
        mark = workdir / "parts" / f"{name}.failed"
        try:
            once(workdir / "parts" / f"{name}.json", lambda make=parts[name]: make(context))
            mark.unlink(missing_ok=True)
        except Exception as error:
            failed.append(name)
            files.write(mark, traceback.format_exc().encode())
            print(f"\n{study.name}: {name} failed: {one_line(error) or type(error).__name__} (see {mark})", file=sys.stderr)
    write_pages(study, scale, context)
    return failed


def _same_setting(workdir, setting):
    """Refuses to mix the parts of two settings in one folder."""
    files.make_folder(workdir / "parts")
    path, ours = workdir / "setting.json", json.loads(json.dumps(dataclasses.asdict(setting), default=str))
    if not path.exists():
        files.write_json(path, ours)
    elif (theirs := files.read_json(path)) != ours:
        odd = sorted(k for k in {**ours, **theirs} if ours.get(k) != theirs.get(k))
        raise UserError(f"{workdir} holds this study with another setting of {', '.join(odd)}; choose another --workdir")


def write_pages(study, scale, context):
    """summary.json (every number) and report.html from the parts that are done."""
    done = {n: held(context.workdir / "parts" / f"{n}.json") for n in study.parts(context.setting)}
    done = {n: x for n, x in done.items() if x is not None}
    missing = [n for n, s in status(study, scale, context.workdir).items() if s != "done"]
    try:
        claims = study.claims(context)
    except Missing as error:  # a claim's part is not done: the page says so instead of a table with holes
        claims, missing = [], [*missing, f"the claims ({error})"]
    made = {"command": f"python -m experiments.run {study.name} --scale={scale}", "versions": versions(),
            "machine": sorted({x["machine"] for x in done.values()}), "seconds": {n: x["seconds"] for n, x in done.items()},
            "missing": missing}  # fmt: skip
    setting = json.loads((context.workdir / "setting.json").read_text())
    summary = {"study": study.name, "scale": scale, "setting": setting, "made": made, "claims": claims,
               "parts": {n: x["value"] for n, x in done.items()}}  # fmt: skip
    files.write(context.workdir / "summary.json", json.dumps(summary, separators=(",", ":")).encode())
    title, subtitle, sections = study.page(context)
    sections = [*([("Claims", [claims_table(claims)])] if claims else []), *sections, ("How this was made", _made(made))]
    page.write(context.workdir / "report.html", page.page(title, sections, subtitle))


def _made(made):
    total = sum(made["seconds"].values())
    lines = [f"{made['command']} on {' and '.join(made['machine']) or machine()}; {total / 60:.0f} minutes of computation in all parts. "
             f"{made['versions']}."]  # fmt: skip
    if made["missing"]:
        lines.append(f"Not done: {', '.join(made['missing'])}.")
    return lines


def claims_table(rows):
    """``claim — paper's figure — ours — holds or not, and why``."""
    columns = [("claim", "Claim"), ("paper", "Paper"), ("ours", "Here"), ("verdict", "Verdict"), ("why", "Why, or how it was measured")]
    return page.table(rows, columns)


def publish(study, scale, workdir=None):
    """Copies summary.json and report.html, which name the parts that are missing, beside the study if they are small enough."""
    workdir = Path(workdir or default_workdir(study, scale))
    if not (workdir / "summary.json").exists():
        raise UserError(f"{workdir} holds no results of {study.name}; run it first")
    target = files.make_folder(Path(__file__).parent / study.name / "results" / scale)
    held = {name: (workdir / name).read_bytes() for name in ("summary.json", "report.html")}
    if (size := sum(map(len, held.values()))) > RESULTS_LIMIT:
        raise UserError(f"the results of {study.name} take {size / 1e6:.1f} MB; at most {RESULTS_LIMIT / 1e6:g} MB are kept beside it")
    for name, data in held.items():
        files.write(target / name, data)
    return target


def restore(study, scale, workdir=None):
    """Puts the parts of the results beside the study into a folder that lacks them, so that only the others are computed.

    Refuses results of another setting. Returns the names of the parts.
    """
    setting, workdir = study.setting(scale), Path(workdir or default_workdir(study, scale))
    held = files.read_json(Path(__file__).parent / study.name / "results" / scale / "summary.json")
    _same_setting(workdir, setting)
    if held["setting"] != json.loads((workdir / "setting.json").read_text()):
        raise UserError(f"the results of {study.name} at scale {scale} were made with another setting")
    wanted = [n for n in study.parts(setting) if n in held["parts"] and not (workdir / "parts" / f"{n}.json").exists()]
    for name in wanted:
        kept = {"seconds": held["made"]["seconds"][name], "machine": " and ".join(held["made"]["machine"]), "value": held["parts"][name]}
        files.write(workdir / "parts" / f"{name}.json", json.dumps(kept, separators=(",", ":")).encode())
    return wanted


def machine():
    device = jax.devices()[0]
    return f"{os.cpu_count()} CPU cores ({platform.machine()})" if device.platform == "cpu" else f"{jax.device_count()} × {device.device_kind}"


def versions():
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "optax", "numpy"))


def band(ax, x, ys, *, label=None, color=None, marker="o", **options):
    """A line through the means of ``ys [seeds][len(x)]`` with a band from the least to the largest; NaN where unknown."""
    ys = np.asarray(ys, float)
    (line,) = ax.plot(x, np.nanmean(ys, 0), marker=marker, label=label, color=color, **options)
    if len(ys) > 1:
        ax.fill_between(x, np.nanmin(ys, 0), np.nanmax(ys, 0), color=line.get_color(), alpha=0.18, linewidth=0)
    return line


def spread(values, spec=".3f"):
    """``"0.742 ± 0.011"``: mean and standard deviation over seeds; one value alone has none."""
    values = [v for v in values if v is not None]
    if not values:
        return "–"
    mean = format(float(np.mean(values)), spec)
    return f"{mean} ± {format(float(np.std(values, ddof=1)), spec)}" if len(values) > 1 else mean


def quiet():
    logging.getLogger("absl").setLevel(logging.WARNING)


def arguments(prog, description, argv):
    parser = ArgumentParser(prog=prog, description=description)
    parser.add_argument("study", nargs="?", help="name of a study; without one, --list")
    parser.add_argument("--list", action="store_true", help="all studies, and what of each is done")
    parser.add_argument("--scale", default="cpu", help="smoke (a minute), cpu (the committed results) or full (an accelerator)")
    parser.add_argument("--workdir", type=Path, help="default: runs/STUDY/SCALE")
    parser.add_argument("--only", default=".*", help="regex of parts: only these; two processes may take different ones")
    parser.add_argument("--publish", action="store_true", help="copy the finished results beside the study")
    parser.add_argument("--restore", action="store_true", help="start from the results beside the study: only what they lack is computed")
    return parser.parse_args(argv)
