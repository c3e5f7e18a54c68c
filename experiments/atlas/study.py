"""Every way to adapt a network, on the same base, data and compute: a part for each method on each task."""

import functools

from experiments.atlas import report, running
from experiments.atlas.settings import METHODS, SCALES
from experiments.study import Study
from ft_jax.errors import UserError


def part(task, method):
    """Name of the part that holds a method's runs."""
    kept = "".join(c if c.isalnum() else "_" for c in method.replace("²", "2").replace("³", "3"))
    return f"{task}_{'_'.join(filter(None, kept.split('_')))}"


def parts(setting):
    out = {}
    for name, task in setting.tasks.items():
        out[f"{name}_base"] = functools.partial(_call, running.reference, task)
        if any("scores=" in METHODS[m][1] for m in task.rows):
            out[f"{name}_scores"] = functools.partial(_call, running.scores, task)
        for method in task.rows:
            out[part(name, method)] = functools.partial(_method, name, task, method)
    # Apart, as they want a machine to themselves: --only='.*_cost'
    for name in setting.tasks:
        for method in setting.tasks[name].rows if costed(setting, name) == name else ():
            out[f"{part(name, method)}_cost"] = functools.partial(_cost, name, setting.tasks[name], method)
    return out


def costed(setting, name):
    """The task whose steps stand for this one's: the first on the same base model with the same rows."""
    mine = setting.tasks[name]
    return next(n for n, t in setting.tasks.items() if (t.model, t.rows, t.batch_size) == (mine.model, mine.rows, mine.batch_size))


def _call(fn, task, context):
    return fn(context, task)


def _method(name, task, method, context):
    if "scores=" in METHODS[method][1]:
        context.value(f"{name}_scores")
    return running.method(context, name, task, method)


def _cost(name, task, method, context):
    if "scores=" in METHODS[method][1]:
        context.value(f"{name}_scores")
    return running.cost(context, task, method)


def found(context):
    """``{task: {method: value}}`` of the parts that are done; UserError for one that was made by another text than its row's."""
    out = {}
    for name, task in context.setting.tasks.items():
        out[name] = {m: value | {"cost": context.get(f"{part(costed(context.setting, name), m)}_cost")} for m in task.rows if (value := context.get(part(name, m)))}
        for method, value in out[name].items():
            if value["method"] != METHODS[method][1]:
                raise UserError(f"the part {part(name, method)} was made by {value['method']!r}, and its row says {METHODS[method][1]!r} now: "
                                "remove the part, or give the row another name")  # fmt: skip
    return out


STUDY = Study(
    name="atlas",
    question="What does each way to adapt a network reach, forget, cost and leave in the weights, all measured alike?",
    scales=SCALES, parts=parts, page=lambda context: report.build(context, found(context), {name: costed(context.setting, name) for name in context.setting.tasks}),
)  # fmt: skip
