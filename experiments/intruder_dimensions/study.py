"""The study's table of parts, its page and its claims."""

from experiments.intruder_dimensions import settings, sweep
from experiments.study import Study
from ft_jax.analysis import report as page


def parts(setting):
    return sweep.parts(setting)


def pages(context):
    rows = []
    for which, grid in sweep.grids(context.setting).items():
        for group in grid.groups:
            for run, summary in context.get(sweep.part(which, group), {}).items():
                variant, seed = grid.runs[run]
                rows.append({"which": which, "run": grid.variants[variant].label, "seed": seed, **summary.get("validation", {})})
    columns = [("which", "model"), ("run", "run"), ("seed", "seed"), ("loss", "validation loss"), ("accuracy", "validation accuracy", ".1%")]
    return "Intruder dimensions", "LoRA against full fine-tuning", [("Runs", [page.table(rows, columns)])]


STUDY = Study(
    name="intruder_dimensions",
    question="Do LoRA and full fine-tuning reach the same accuracy with the same weights, and what do the new directions cost?",
    scales=settings.SCALES, parts=parts, page=pages,
)  # fmt: skip
