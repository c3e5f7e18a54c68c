"""What fine-tuning does to a capability that is known exactly: procedural tasks (arXiv:2311.12786) and in-context regression (arXiv:2309.10105)."""

import functools

from experiments.mechanisms import claims, finetune, implicit, report, views
from experiments.mechanisms.settings import CONTROL, SCALES
from experiments.study import Study


def parts(setting):
    """{name: (Context) -> value}, in order; models lie in ``workdir/models`` and later parts read them."""
    out = {}

    def add(name, fn, *args):
        out[name] = functools.partial(_call, fn, args)

    priors = {prior: prior.replace(" ", "_") for prior in (*setting.counting.priors, CONTROL)}
    for prior, name in priors.items():
        add(f"pretrain_{name}", finetune.pretrain, prior)
    add("icl_pretrain", implicit.pretrain)
    add("icl_tune", implicit.tune)
    add("icl_near", implicit.near)
    add("icl_conjugate", implicit.conjugate)
    for prior, name in priors.items():
        if prior != CONTROL:
            add(f"tune_{name}", finetune.tune, prior)
            add(f"unlearn_{name}", finetune.unlearn, prior)
    for prior, name in priors.items():
        add(f"probe_{name}", finetune.probes, prior)
        add(f"revert_{name}", finetune.revert, prior)
        if prior != CONTROL:
            add(f"prune_{name}", finetune.pruning, prior)
            add(f"graft_{name}", views.counting_grafts, prior)
    add("spectra", views.counting_spectra, next(iter(setting.counting.priors)))
    add("icl_spectra", views.icl_spectra)
    add("icl_graft", views.icl_grafts)
    return out


def _call(fn, args, context):
    return fn(context, *args)


STUDY = Study(
    name="mechanisms",
    question="Does fine-tuning erase a capability or wrap it, and what brings it back? (arXiv:2311.12786, arXiv:2309.10105)",
    scales=SCALES, parts=parts, page=report.build, claims=claims.rows,
)  # fmt: skip
