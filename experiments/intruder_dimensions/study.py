"""The study's table of parts, its page and its claims."""

from experiments.intruder_dimensions import analyse, claims, continual, editing, measuring, report, settings, sweep
from experiments.study import Study


def parts(setting):
    """Training, then what is measured, edited and compared, a part for each group of runs; then the sequence of tasks."""
    out = dict(sweep.parts(setting))
    for which in sweep.grids(setting):
        out |= _of_grid(setting, which)
    out["sanity"] = lambda context: analyse.sanity()
    return out | (continual.parts(setting) if claims.continued(setting) else {})


def _of_grid(setting, which):
    grid, out = getattr(setting, which), {}
    if measuring.how(setting, which).pseudo:
        out[f"{which}_head"] = lambda context: measuring.fit_head(context, which)
    out[f"{which}_base"] = lambda context: measuring.base_scores(context, which)
    for group in grid.groups:
        out[f"{which}_measure_{group}"] = lambda context, g=group: measuring.measured(context, which, g)
    for variant in editing.variants(setting, which):
        out[f"{which}_edit_{variant}"] = lambda context, v=variant: editing.edited(context, which, v)
    for name, make in (("maps", analyse.maps), ("angles", analyse.angles), ("correlations", analyse.correlations)):
        out[f"{which}_{name}"] = lambda context, f=make: f(context, which)
    return out


STUDY = Study(
    name="intruder_dimensions",
    question="Do LoRA and full fine-tuning reach the same accuracy with the same weights, and what do the new directions cost?",
    scales=settings.SCALES, parts=parts, page=report.pages, claims=claims.claims,
)  # fmt: skip
