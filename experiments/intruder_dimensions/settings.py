"""What the study trains, as data: a grid of variants for an encoder and one for a decoder, at every scale.

How runs are measured is set in `measuring.py`: this file decides what is trained, and a folder refuses another setting.
"""

import dataclasses

from experiments.demo.settings import LAYERS, LINEAR

SEEDS = (0, 1, 2)
KERNELS = {"": "full", "lora": "LoRA", "rslora": "rsLoRA", "lora_b": "B alone", "pissa": "PiSSA", "lora_plus": "LoRA+"}
LINES = {  # what the report says of a model
    "minilm": "all-MiniLM-L6-v2 (22.7 M parameters, 36 matrices)",
    "smollm2": "SmolLM2-135M-Instruct (134.5 M parameters, 210 matrices; weights that carry 4-bit rounding)",
    "hf:FacebookAI/roberta-base": "RoBERTa-base (125 M parameters, 72 matrices)",
    "hf:meta-llama/Llama-2-7b-hf": "Llama-2-7B (6.7 B parameters, 224 matrices)",
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to fine-tune; ``kernel`` is empty for full fine-tuning of the layers.

    rate multiplies the learning rate of the grid, share its steps and its training examples. With ``lora_plus`` B learns
    16 times as fast as A, their geometric mean being the rate of LoRA.
    """

    kernel: str = ""
    rank: int = 0
    alpha: float = 0.0
    update: str = "adamw"
    rate: float = 1.0
    share: float = 1.0

    @property
    def method(self):
        if not self.kernel:
            return {"name": "full", "trainable": (LAYERS,)}
        rule = f"{self.kernel}(rank={self.rank}, alpha={self.alpha:g})"
        return {"name": rule, "kernels": ((LINEAR, rule),), "trainable": ((f"{LINEAR}/[ab]", True),)}

    @property
    def learning_rate(self):
        """The paper's: 1e-5 for full fine-tuning, α · lr = 2.4e-3 for every kernel, times ``rate``."""
        rate = self.rate * (2.4e-3 / self.alpha if self.kernel else 1e-5)
        return rate / PLUS_RATIO**0.5 if self.update == "lora_plus" else rate

    @property
    def label(self):
        """The variant in the report's words."""
        name = KERNELS["lora_plus" if self.update == "lora_plus" else self.kernel]
        alpha = f", α = {self.alpha:g}" if self.kernel and self.alpha != 2 * self.rank else ""
        swept = [f"{mark} × {x:g}" for mark, x in (("lr", self.rate), ("data", self.share)) if x != 1]
        return ", ".join([name + (f" r = {self.rank}{alpha}" if self.kernel else ""), *swept])


PLUS_RATIO = 16.0  # of LoRA+'s learning rates, its paper's own


@dataclasses.dataclass(frozen=True)
class Group:
    """Variants that are one part of the study, each with every seed."""

    variants: dict[str, Variant]
    seeds: tuple[int, ...] = SEEDS


@dataclasses.dataclass(frozen=True)
class Grid:
    """One model and task. ``lr_scale`` multiplies the paper's learning rates, which are meant for 100 times as many steps."""

    model: str
    objective: str
    data: dict
    steps: int
    batch_size: int
    lr_scale: float
    groups: dict[str, Group]
    eval_batch: int = 50

    @property
    def variants(self):
        return {name: v for group in self.groups.values() for name, v in group.variants.items()}

    @property
    def runs(self):
        """``{run: (variant's name, seed)}`` of all groups."""
        return {f"{name}-s{seed}": (name, seed) for g in self.groups.values() for name in g.variants for seed in g.seeds}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One scale of the study; a grid that is None is left out."""

    name: str
    encoder: Grid | None
    decoder: Grid | None


def full():
    return Variant()


def lora(rank, **changes):
    """LoRA with α = 2r."""
    return Variant(**{"kernel": "lora", "rank": rank, "alpha": 2.0 * rank, **changes})


def _times(variants, field, factors, mark):
    """Each variant with ``field`` set to each factor."""
    return {f"{name}_{mark}{x:g}": dataclasses.replace(v, **{field: x}) for name, v in variants.items() for x in factors}


def _others(ranks=(1, 8), stable=(8, 64)):
    return {
        # The scale is α/√r where LoRA's is α/r: with α · lr the same, a step is √r times LoRA's.
        "rslora": Group({f"rslora{r}": lora(r, kernel="rslora", alpha=8.0) for r in stable}),
        "b_only": Group({f"b{r}": lora(r, kernel="lora_b") for r in ranks}),
        "pissa": Group({f"pissa{r}": lora(r, kernel="pissa") for r in ranks}),
        "plus": Group({f"plus{r}": lora(r, update="lora_plus") for r in ranks}),
    }


def grid(width, *, low=(1, 2, 4, 8, 16), high=(64,), swept=(1, 8), rates=(0.25, 0.5, 2.0), shares=(0.25, 0.5, 2.0)):
    """The groups of a whole study of a model of that width."""
    sweep = {"full": full(), **{f"r{r}": lora(r) for r in swept}}
    return {
        "full": Group({"full": full()}),
        "low": Group({f"r{r}": lora(r) for r in low}),
        "high": Group({f"r{r}": lora(r) for r in high} | {f"r{r}_a8": lora(r, alpha=8.0) for r in high}),
        "width": Group({f"r{width}": lora(width), f"r{width}_a8": lora(width, alpha=8.0)}),
        "alpha8": Group({f"r{r}_a8": lora(r, alpha=8.0) for r in low if r != 4}),
        **_others(),
        "full_rates": Group(_times({"full": full()}, "rate", (*rates, 4.0), "lr")),
        "lora_rates": Group(_times({f"r{r}": lora(r) for r in swept}, "rate", rates, "lr")
                            | _times({f"r{max(swept)}": lora(max(swept))}, "rate", (4.0,), "lr")),
        **{f"data_{x:g}": Group(_times(sweep, "share", (x,), "data")) for x in shares},
    }  # fmt: skip


FEW = {"full": Group({"full": full()}, (0,)), "low": Group({"r1": lora(1), "r8": lora(8)}, (0,))}
REVIEWS = {"source": "rotten_tomatoes", "max_length": 32, "num_labels": 2, "limit": 576, "eval_limit": 50}
SENTENCES = {"source": "winogrande", "max_length": 64, "packing": True, "limit": 2400, "eval_limit": 20, "append_eos": False}
MINILM = Grid(
    model="minilm", objective="classification", data=REVIEWS,
    steps=72, batch_size=8, lr_scale=8.0, groups=grid(384),
)  # fmt: skip
SMOLLM2 = Grid(
    model="smollm2", objective="causal_lm", data=SENTENCES, steps=40, batch_size=4, lr_scale=8.0, eval_batch=4,
    groups={"full": Group({"full": full()}), "low": Group({"r1": lora(1), "r8": lora(8)}), "high": Group({"r64": lora(64)})},
)  # fmt: skip

# The paper's tasks that a package index or TFDS reaches (FEVER is in neither), as RoBERTa-base reads them.
TASKS = {
    "mnli": {"source": "tfds:glue/mnli", "text_field": "premise", "pair_field": "hypothesis", "num_labels": 3,
             "splits": {"validation": "validation_matched", "test": "validation_mismatched"}},
    "sst2": {"source": "tfds:glue/sst2", "text_field": "sentence", "num_labels": 2, "splits": {"test": "validation"}},
    "qqp": {"source": "tfds:glue/qqp", "text_field": "question1", "pair_field": "question2", "num_labels": 2,
            "splits": {"test": "validation"}},
    "winogrande": {"source": "winogrande", "template": "{sentence} {option1} or {option2}?", "num_labels": 2,
                   "splits": {"test": "validation"}},
}  # fmt: skip


def _roberta(task):
    return Grid(
        model="hf:FacebookAI/roberta-base", objective="classification",
        data={**TASKS[task], "max_length": 256, "limit": 100_000, "eval_limit": 2000}, steps=25_000, batch_size=16, lr_scale=1.0,
        groups=grid(768), eval_batch=64)  # fmt: skip


LLAMA = Grid(
    model="hf:meta-llama/Llama-2-7b-hf", objective="causal_lm",
    data={**SENTENCES, "max_length": 1024, "limit": 0, "eval_limit": 500}, steps=5000, batch_size=32, lr_scale=1.0, eval_batch=8,
    groups={"full": Group({"full": full()}, (0,)), "low": Group({f"r{r}": lora(r) for r in (1, 8, 16)}, (0,)),
            "high": Group({f"r{r}": lora(r) for r in (64, 256)}, (0,))})  # fmt: skip

SCALES = {
    "smoke": Setting(
        "smoke", dataclasses.replace(MINILM, steps=8, groups=FEW, data={**REVIEWS, "limit": 64, "eval_limit": 20}), None),
    "cpu": Setting("cpu", MINILM, SMOLLM2),
    "full": Setting("full", _roberta("mnli"), None),
    **{f"full_{task}": Setting(f"full_{task}", _roberta(task), None) for task in TASKS if task != "mnli"},
    "full_llama": Setting("full_llama", None, LLAMA),
}  # fmt: skip
