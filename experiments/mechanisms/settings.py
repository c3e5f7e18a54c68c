"""What the study runs, as data: a counting world, a regression world, and their sizes at each scale."""

import dataclasses

from ft_jax.data.procedural import FAMILIES

CONTROL = "tuned only"  # the prior of the model that has never counted O_PT: Scr. + FT
LABELS = {"low": "low prior of b", "medium": "medium prior of b", "high": "high prior of b", CONTROL: "never counted a"}


@dataclasses.dataclass(frozen=True)
class Counting:
    """arXiv:2311.12786. priors: how often pretraining asks for a, b, c; rates: η_M and η_S; correlations: C_Tr by rate.

    The paper's η_M and η_S are a hundredth and a thousandth of ``rate`` over 10 K steps; in runs that are 50 times shorter
    they would move nothing. revert: reverse fine-tuning, at a rate no larger than η_S. prune: numbers of neurons.
    """

    length: int = 16
    width: int = 48
    layers: int = 3
    heads: int = 4
    families: tuple[str, ...] = ("count", "recount", "token")
    priors: dict = dataclasses.field(default_factory=lambda: {"low": (0.999, 0.001, 0.0), "high": (0.5, 0.3, 0.2)})
    seeds: tuple[int, ...] = (0, 1, 2)
    batch: int = 64
    steps: int = 700
    rate: float = 4e-3
    tune_steps: int = 200
    tune_marks: tuple[int, ...] = (20, 50, 100, 200)
    rates: dict = dataclasses.field(default_factory=lambda: {"medium": 3e-4, "small": 1e-4})
    correlations: dict = dataclasses.field(default_factory=lambda: {"medium": (0.0, 0.8, 1.0), "small": (0.0, 1.0)})
    revert_steps: int = 120
    revert_marks: tuple[int, ...] = (0, 10, 20, 30, 40, 60, 80, 100, 120)
    revert_rate: float = 1e-4
    test_rows: int = 256
    probe_rows: tuple[int, int] = (600, 300)
    prune: tuple[int, ...] = (1, 2, 5, 10, 15, 20, 30)
    shares: tuple[float, ...] = (0.001, 0.01, 0.03, 0.1, 0.3)
    ranks: tuple[int, ...] = (1, 16)
    lora_correlations: tuple[float, ...] = (1.0,)
    lora_rate: float = 3e-3


@dataclasses.dataclass(frozen=True)
class Regression:
    """arXiv:2309.10105. share: α of the pretraining mixture; factors: γ of conjugate prompting.

    bins: of continuous tasks by their distance from the nearest discrete one.
    """

    dimension: int = 3
    pairs: int = 10
    tasks: int = 4
    noise: float = 0.5
    share: float = 0.5
    width: int = 48
    layers: int = 3
    heads: int = 4
    seeds: tuple[int, ...] = (0, 1, 2)
    batch: int = 64
    steps: int = 1500
    rate: float = 3e-3
    tune_steps: int = 200
    tune_marks: tuple[int, ...] = (0, 10, 20, 50, 100, 200)
    tune_rate: float = 1e-3
    factors: tuple[float, ...] = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
    bins: int = 6
    test_rows: int = 500
    shares: tuple[float, ...] = (0.001, 0.01, 0.03, 0.1, 0.3)
    ranks: tuple[int, ...] = (1, 16)
    lora_rate: float = 3e-3


@dataclasses.dataclass(frozen=True)
class Setting:
    counting: Counting
    regression: Regression


SCALES = {
    "smoke": Setting(
        Counting(length=8, width=32, layers=2, seeds=(0,), batch=32, steps=60, tune_steps=20, tune_marks=(10, 20), revert_steps=20,
                 revert_marks=(0, 10, 20), correlations={"medium": (0.0, 1.0), "small": (1.0,)}, test_rows=64, probe_rows=(100, 50),
                 prune=(1, 5), shares=(0.01, 0.1), ranks=(1,)),
        Regression(dimension=2, pairs=6, tasks=4, width=32, layers=2, seeds=(0,), batch=32, steps=100, tune_steps=20,
                   tune_marks=(0, 10, 20), factors=(1.0, 2.0), bins=3, test_rows=100, shares=(0.01, 0.1), ranks=(1,)),
    ),
    "cpu": Setting(Counting(), Regression()),
    "full": Setting(
        Counting(length=40, width=192, layers=6, heads=6, families=FAMILIES, seeds=(0, 1, 2, 3, 4), batch=96, steps=50_000, rate=1e-3,
                 priors={"low": (0.999, 0.001, 0.0), "medium": (0.9, 0.1, 0.0), "high": (0.5, 0.3, 0.2)}, tune_steps=10_000,
                 tune_marks=(100, 300, 1000, 2500, 5000, 10_000), rates={"medium": 1e-5, "small": 1e-6},
                 correlations={"medium": (0.0, 0.5, 0.8, 1.0), "small": (0.0, 0.5, 0.8, 1.0)}, revert_steps=10_000,
                 revert_marks=(0, 100, 200, 500, 1000, 2000, 5000, 10_000), revert_rate=5e-6, test_rows=2000, probe_rows=(8000, 2000),
                 lora_rate=3e-4, ranks=(1, 4, 16, 64), lora_correlations=(0.0, 1.0)),
        Regression(dimension=20, pairs=40, tasks=64, noise=1.0, share=0.2, width=256, layers=12, heads=8, seeds=(0, 1, 2), steps=50_000,
                   rate=1e-4, tune_steps=5000, tune_marks=(0, 100, 500, 1000, 2000, 5000), tune_rate=1e-5, test_rows=2000, lora_rate=1e-4,
                   ranks=(1, 4, 16, 64)),
    ),
}  # fmt: skip
