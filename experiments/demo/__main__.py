"""``python -m experiments.demo [--model=minilm|smollm2] [--workdir=runs/demo]``: the study, start to report."""

import functools
from pathlib import Path

from experiments import measure as shared
from experiments import study as house
from experiments.demo import analyse, measure, report, sweep
from experiments.demo.settings import SETTINGS, default_workdir, setting
from ft_jax.analysis import report as page
from ft_jax.errors import ArgumentParser, cli
from ft_jax.io import files, hf


def study(s, workdir):
    """Runs what is missing of the study in ``workdir`` and returns its summary."""
    folder = sweep.base(s, workdir)
    runs = sweep.run_all(s, folder, workdir)
    if (workdir / "summary.json").exists():
        return files.read_json(workdir / "summary.json")
    model, base = hf.load(folder)
    data = measure.datasets(s, folder, model.config.vocab_size)
    tuned = {name: shared.tuned(workdir / "runs" / name) for name in runs}
    trees = {"base": base, **tuned}
    clock = {f"train {name}": run["seconds"] for name, run in runs.items()}

    def part(name, make):
        return analyse.once(workdir / "parts" / f"{name}.json", make, clock)

    scores = part("scores", lambda: analyse.all_scores(s, model, folder, trees, data))
    spectra = {n: part(f"spectra_{n}", functools.partial(analyse.spectra, base, p, n)) for n, p in tuned.items()}
    odd = min((r for x in spectra.values() for r in x["rows"]), key=lambda r: r["lowest_cosine"])
    maps = part("similarity", lambda: analyse.heatmaps(base, tuned, odd["path"], odd["layer"]))
    grafted = part("graft", lambda: analyse.grafts(s, model, base, tuned["full"], data))
    forgot = part("forgetting", lambda: analyse.forgotten(s, model, folder, trees))
    made = {
        "command": f"bash scripts/demo.sh --model={s.model}", "seed": s.seed, "machine": house.machine(), "versions": house.versions(),
        "training_memory_gib": max(run["peak_memory_bytes"] for run in runs.values()) / 2**30,
        "seconds": clock, "compute_seconds": sum(clock.values()),
    }  # fmt: skip
    summary = {
        "model_line": s.line, "subtitle": s.subtitle, "steps": s.steps, "batch_size": s.batch_size, "ranks": list(s.ranks),
        "lr_scale": s.lr_scale, "k": analyse.K, "eps": analyse.EPS, "task": analyse.task(s, scores, data),
        "runs": {n: {"learning_rate": s.runs[n][1], **r} for n, r in runs.items()},
        "scores": scores, "spectra": spectra, "similarity": maps, "graft": grafted,
        "forgetting": {**forgot, "why": analyse.WHY[s.objective]}, "made": made,
    }  # fmt: skip
    files.write_json(workdir / "summary.json", summary)
    return summary


def main(argv=None):
    parser = ArgumentParser(prog="demo", description=__doc__)
    parser.add_argument("--model", default="minilm", help=f"one of {', '.join(SETTINGS)}")
    parser.add_argument("--workdir", type=Path, help="default: runs/demo, for another model runs/demo-MODEL")
    args = parser.parse_args(argv)
    house.quiet()
    s = setting(args.model)
    workdir = args.workdir or default_workdir(args.model)
    files.make_folder(workdir)
    summary = study(s, workdir)
    page.write(workdir / "report.html", report.build(summary))
    with files.replacing(workdir / "intruders.png") as temporary:
        report.sweep_figure(summary).savefig(temporary, format="png", dpi=160, facecolor="white")
    print(f"{workdir}/report.html and {workdir}/summary.json are ready")


if __name__ == "__main__":
    cli(main)()
