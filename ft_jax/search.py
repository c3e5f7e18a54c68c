"""Search over configurations for two aims at once, few weights and a good score: AutoPEFT (arXiv:2301.12132).

A *space* is a JSON object of ``parameters`` and ``settings``. A parameter is a list of choices, a range
``{"low": 1, "high": 64, "log": true}`` (of whole numbers if both ends are), or ``{"subset": 6}``, which of six layers get
modules (``0-2-5``, or ``none``). A setting is a key of the train config, ``method`` as in a config string, and its value any
JSON in whose texts ``{name}`` stands for a parameter. Trials lie in Optuna's journal (JSON lines) and each is a run.
"""

import contextlib
import hashlib
import json
import re
import runpy
from pathlib import Path

import optuna
from tqdm.auto import tqdm

from ft_jax import train
from ft_jax.analysis import report
from ft_jax.errors import UserError, nearest, one_line
from ft_jax.io import files
from ft_jax.io.runs import first_difference

STARTUP = 5  # trials drawn at random before TPE has seen enough
SAMPLERS = {
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP, multivariate=True),
    "nsga2": lambda seed: optuna.samplers.NSGAIISampler(seed=seed, population_size=12),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
}
NAME = re.compile(r"\{([a-z_]\w*)\}")


# The space


def distributions(parameters):
    """``{name: Optuna distribution}``; a subset is one yes or no for each of its parts, ``name.0`` and so on."""
    out = {}
    for name, spec in parameters.items():
        keys = set(spec) if isinstance(spec, dict) else None
        if isinstance(spec, list) and spec and all(isinstance(x, (bool, int, float, str)) for x in spec):
            out[name] = optuna.distributions.CategoricalDistribution(spec)
        elif keys == {"subset"} and type(spec["subset"]) is int and spec["subset"] > 0:
            out |= {f"{name}.{i}": optuna.distributions.CategoricalDistribution([False, True]) for i in range(spec["subset"])}
        elif keys and {"low", "high"} <= keys <= {"low", "high", "log"}:
            out[name] = _range(name, **spec)
        else:
            raise UserError(f"space: parameter {name!r} is {spec!r}; it is a list of choices, a range {{low, high, log}} or "
                            "{subset: how many}")
    return out


def _range(name, low, high, log=False):
    whole = type(low) is int and type(high) is int
    kind = optuna.distributions.IntDistribution if whole else optuna.distributions.FloatDistribution
    try:
        return kind(low, high, log=log)
    except (ValueError, TypeError) as error:
        raise UserError(f"space: parameter {name!r} is no range: {error}") from None


def values_of(parameters, drawn):
    """``{name: value}`` of a trial's ``drawn`` parameters: subsets joined to text."""
    out = {}
    for name, spec in parameters.items():
        if name in drawn:
            out[name] = drawn[name]
        else:
            out[name] = "-".join(str(i) for i in range(spec["subset"]) if drawn[f"{name}.{i}"]) or "none"
    return out


def filled(value, values):
    """A setting with every ``{name}`` in its texts replaced; a text that is one name alone takes the value as it is."""
    if isinstance(value, list):
        return [filled(v, values) for v in value]
    if isinstance(value, dict):
        return {k: filled(v, values) for k, v in value.items()}
    if not isinstance(value, str):
        return value
    for name in NAME.findall(value):
        if name not in values:
            raise UserError(f"space: {value!r} names no parameter {name!r}{nearest(name, values)}")
    whole = NAME.fullmatch(value)
    return values[whole.group(1)] if whole else NAME.sub(lambda m: str(values[m.group(1)]), value)


def check(space):
    """``(parameters, settings)`` of a space; UserError for what is none, and for a parameter that no setting names."""
    if odd := [key for key in space if key not in ("parameters", "settings")]:
        raise UserError(f"space: unknown key {odd[0]!r}{nearest(odd[0], ('parameters', 'settings'))}")
    parameters, settings = (space.get(key) for key in ("parameters", "settings"))
    if not (isinstance(parameters, dict) and parameters and isinstance(settings, dict) and settings):
        raise UserError("space: it holds two objects that are not empty, parameters and settings")
    used = set(NAME.findall(json.dumps(settings)))
    if idle := [name for name in parameters if name not in used]:
        raise UserError(f"space: no setting names the parameter {idle[0]!r}{nearest(idle[0], used)}")
    distributions(parameters)
    return parameters, settings


def config_of(config, settings):
    """The train config of a trial: ``config`` is a config file with its options, as ``--config`` takes it."""
    file, _, options = config.partition(":")
    if not Path(file).is_file():
        raise UserError(f"no config file {file!r}{nearest(file, sorted(map(str, Path(file).parent.glob('*.py'))))}")
    if "method" in settings:
        options = ",".join(filter(None, (options, f"method={settings['method']}")))
    cfg = runpy.run_path(file)["get_config"](options).to_dict()
    for key, value in settings.items():
        if key == "method":
            continue
        *groups, last = key.split(".")
        node = cfg
        for group in groups:
            node = node.get(group)
            if not isinstance(node, dict):
                raise UserError(f"space: no config group {group!r} in {key!r}{nearest(group, cfg)}")
        node[last] = value
    return train.complete(cfg)


# Trials


def search(config, space, workdir, *, trials=20, sampler="tpe", seed=0):
    """Runs trials until ``trials`` have ended, writes results.jsonl, pareto.json and index.html; returns the result rows.

    Size is how many weights may move, the score what the config evaluates by. A second call goes on: a run that was cut
    short resumes, a trial that ended is not run again. A trial whose config is at fault or diverges is a row with
    ``failed``. Raises UserError before any run for a wrong space, and when no trial succeeds.
    """
    if sampler not in SAMPLERS:
        raise UserError(f"no sampler called {sampler!r}{nearest(sampler, SAMPLERS)}")
    if trials < 1:
        raise UserError(f"--trials is {trials}; it is at least 1")
    parameters, settings = check(space)
    spread = distributions(parameters)
    first = {name: d.choices[0] if hasattr(d, "choices") else d.low for name, d in spread.items()}
    metric = config_of(config, filled(settings, values_of(parameters, first)))["eval"]["metric"]
    with opened(workdir, {"config": config, "space": space, "sampler": sampler, "seed": seed}) as workdir:
        study = _study(workdir, metric)
        rows = write(study, workdir, metric)
        with tqdm(total=trials, initial=len(rows), desc="search", unit="trial") as bar:
            while len(rows) < trials:
                study.sampler = SAMPLERS[sampler](seed + len(rows))  # after a stop the same trial is drawn again, and resumes
                trial = study.ask(spread)
                _run(study, trial, values_of(parameters, trial.params), settings, config, workdir, metric)
                rows = write(study, workdir, metric)
                bar.update()
    if all("failed" in row for row in rows):
        raise UserError(f"none of {len(rows)} trials succeeded; the first: {rows[0]['failed']}")
    return rows


@contextlib.contextmanager
def opened(workdir, made):
    """The folder of a search that ``made`` describes, for this process alone; UserError when it holds another one, or none."""
    workdir = files.make_folder(workdir)
    file = workdir / "search.json"
    if not file.exists() and files.strangers(workdir):
        raise UserError(f"workdir {workdir} is not empty and holds no search; choose another --workdir")
    held = files.lock(workdir)
    try:
        files.sweep(workdir)
        if not file.exists():
            files.write_json(file, made)
        elif difference := first_difference(files.read_json(file), made, "search"):
            raise UserError(f"workdir {workdir} holds another search: {difference}; choose another --workdir")
        yield workdir
    finally:
        files.unlock(workdir, held)


def _study(workdir, metric):
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = workdir / "journal.jsonl"
    _mend(path)
    better = "maximize" if metric == "accuracy" else "minimize"
    try:
        storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
        study = optuna.create_study(storage=storage, study_name="search", load_if_exists=True, directions=["minimize", better])
        for row in (t.user_attrs["row"] for t in study.trials if "row" in t.user_attrs):
            dict(row["parameters"]), row["settings"], row["run"], row["failed"] if "failed" in row else float(row["size"]) + float(row["score"])
    except Exception as error:  # whatever Optuna happens to meet in lines that it did not write
        raise UserError(f"{path}: cannot be read ({one_line(error) or type(error).__name__}); the runs beside it are whole: with this file "
                        "removed the same command draws the trials anew and takes those runs for them") from None
    for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):  # a stop cut it short
        _tell(study, trial.number, trial.user_attrs.get("row", {"failed": "cut short"}))
    return study


def _mend(journal):
    """Takes away what a killed process left: a last line that is not whole, Optuna's own lock."""
    for left in journal.parent.glob(f"{journal.name}.lock*"):
        left.unlink(missing_ok=True)
    data = journal.read_bytes() if journal.exists() else b""
    if not data.endswith(b"\n") and data:
        files.write(journal, data[: data.rfind(b"\n") + 1])


def folder_of(settings):
    """Where the run of these settings lies in a search's folder."""
    return f"runs/{hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]}"


def _run(study, trial, values, settings, config, workdir, metric):
    chosen = filled(settings, values)
    row = {"parameters": values, "settings": chosen, "run": folder_of(chosen)}
    try:
        summary = train.train(config_of(config, chosen), workdir / row["run"], label=f"trial {trial.number}")
        row |= {"size": summary["moving_parameters"], "score": summary[f"best_{metric}"]}
    except UserError as error:
        row["failed"] = str(error)
    trial.set_user_attr("row", row)
    _tell(study, trial.number, row)


def _tell(study, number, row):
    if "failed" in row:
        study.tell(number, state=optuna.trial.TrialState.FAIL)
    else:
        study.tell(number, [row["size"], row["score"]])


# What is written


def write(study, workdir, metric):
    """results.jsonl, pareto.json and index.html anew from the study; returns the rows, in the order of the trials."""
    rows = [t.user_attrs["row"] for t in study.trials if "row" in t.user_attrs and t.state.is_finished()]
    rows = [{"trial": number, **row} for number, row in enumerate(rows)]
    files.write(workdir / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    best = pareto([row for row in rows if "failed" not in row], 1 if metric == "accuracy" else -1)
    files.write_json(workdir / "pareto.json", {"metric": metric, "trials": best})
    report.write(workdir / "index.html", page(rows, best, metric))
    return rows


def pareto(rows, sign):
    """The rows that no other one beats in size and score (times ``sign``), smallest first; of equals the first."""
    out = []
    for row in sorted(rows, key=lambda r: (r["size"], -sign * r["score"], r["trial"])):
        if not out or sign * row["score"] > sign * out[-1]["score"]:
            out.append(row)
    return out


def page(rows, best, metric):
    """The page: the Pareto table, a scatter plot of size and score, every trial."""
    done, failed = ([r for r in rows if ("failed" in r) == bad] for bad in (False, True))
    names = list(dict.fromkeys(name for row in rows for name in row["parameters"]))
    columns = [("trial", "trial"), ("size", "weights"), ("score", metric), *((n, n) for n in names)]

    def table(chosen, caption):
        return report.table([row | row["parameters"] for row in chosen], columns, caption)

    blocks = [table(best, "Trials that no other one beats in both size and score.")]
    if done:
        fig, ax = report.new_figure(6.2, 3.4)
        ax.scatter([r["size"] for r in done], [r["score"] for r in done], s=14, alpha=0.7)
        ax.step([r["size"] for r in best], [r["score"] for r in best], where="post", color=report.PALETTE[1])
        for row in best:
            ax.annotate(row["trial"], (row["size"], row["score"]), textcoords="offset points", xytext=(4, 4), fontsize=7)
        ax.set(xscale="log", xlabel="weights that may move", ylabel=metric)
        blocks.append(report.figure(fig, "Size and score of every trial; the line joins those of the table, by number."))
    sections = [("Pareto front", blocks), ("All trials", [table(done, f"{len(done)} trials, in order.")])]
    if failed:
        sections.append(("Failed trials", [report.table(failed, [("trial", "trial"), ("failed", "why")])]))
    return report.page("Search over configurations", sections, f"{len(rows)} trials, {len(best)} on the front")
