"""Skill localisation (arXiv:2302.06600): which few parameters hold what fine-tuning taught, and are they the intruder dimensions?"""

import functools

from experiments.skill_localization import claims, grafts, intruders, multitask, report, sweep
from experiments.skill_localization.settings import SCALES
from experiments.study import Study


def parts(setting):
    """{name: (Context) -> value}: one part a task and method, so that a failure loses little and processes can share them."""
    out = {}
    bench, *others = setting.benches

    def add(name, fn, *args, bench=bench, **more):
        out[name] = functools.partial(_call, fn, bench, args, more)

    for prefix, each in (("", bench), *((f"{b.name}_", b) for b in others)):
        if each.sgd_rates:
            add(f"tune_{each.name}", sweep.tune, each.main, bench=each)
        for task, methods in each.runs.items():
            for method in methods:
                add(f"train_{prefix}{task}_{method}", sweep.runs, task, method, bench=each)
                curve = task == each.main and not method.startswith("lora")
                add(f"graft_{prefix}{task}_{method}", grafts.study, task, method, curve, bench=each)
    main, m = bench.main, setting.multi
    for method in setting.ood["methods"]:
        add(f"ood_{main}_{method}", grafts.other_domains, main, method, setting.ood["targets"])
    add("lottery", grafts.lottery, main, setting.lottery["method"], setting.lottery)
    for method in setting.intruders["methods"]:
        add(f"intruders_{main}_{method}", intruders.study, main, method)
    add("transfer", multitask.transfer, m)
    add("multi_train", multitask.train, m)
    for task in m["tasks"]:
        add(f"multi_region_{task}", multitask.task_region, m, task)
    for name, fn in (("overlap", multitask.overlap), ("union", multitask.union), ("purify", multitask.purify)):
        add(f"multi_{name}", fn, m)
    for a, b in setting.continual["pairs"]:
        add(f"continual_{a}_{b}", multitask.continual, setting.continual, a, b)
    return out


def _call(fn, bench, args, more, context):
    return fn(context, bench, *args, **more)


STUDY = Study(
    name="skill_localization",
    question="How few of the changed parameters hold a skill, where do they lie, and are they the intruder dimensions? (arXiv:2302.06600)",
    scales=SCALES, parts=parts, page=report.build, claims=claims.rows,
)  # fmt: skip
