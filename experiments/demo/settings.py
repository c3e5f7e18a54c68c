"""What the demo runs, as data: one row a model."""

import dataclasses
from pathlib import Path

from ft_jax.errors import UserError, nearest

LINEAR = r"layers/(attn|mlp)/\w+/kernel"
LAYERS = ("layers/.*", True)  # weights, biases and norms of every layer; embeddings and head stay frozen


@dataclasses.dataclass(frozen=True)
class Setting:
    """One model's study. ``lr_scale`` multiplies the paper's learning rates, which are meant for 10 to 100 times
    as many steps; the ratio between the runs (α · lr constant) stays the paper's."""

    model: str
    objective: str
    data: dict
    ood: dict | None
    choice: dict | None
    splits: tuple[str, str]  # what masks are selected on, what scores are reported on
    steps: int
    batch_size: int
    lr_scale: float
    eval_batch: int
    test_limit: int
    forgetting: dict
    graft: dict
    line: str
    subtitle: str
    words: dict
    ranks: tuple[int, ...] = (1, 8, 64)
    seed: int = 0

    @property
    def runs(self):
        """{name: (method group, learning rate)}: full at 1e-5, LoRA with α = 2r and α · lr = 2.4e-3, times lr_scale."""
        out = {"full": ({"name": "full", "trainable": (LAYERS,)}, 1e-5 * self.lr_scale)}
        for r in self.ranks:
            method = {"name": f"lora r={r}", "kernels": ((LINEAR, f"lora(rank={r}, alpha={2 * r})"),)}
            out[f"lora_r{r}"] = ({**method, "trainable": ((f"{LINEAR}/[ab]", True),)}, 2.4e-3 / (2 * r) * self.lr_scale)
        return out


SETTINGS = {
    "minilm": Setting(
        model="minilm", objective="classification",
        data={"source": "imdb", "max_length": 64, "num_labels": 2, "limit": 2400, "eval_limit": 200},
        ood={"source": "rotten_tomatoes", "max_length": 48, "num_labels": 2, "eval_limit": 400}, choice=None,
        splits=("validation", "test"), steps=90, batch_size=16, lr_scale=8.0, eval_batch=50, test_limit=500,
        forgetting={"source": "imdb", "texts": 256, "batch": 64, "words": 64, "max_length": 48},
        graft={"sparsities": (1e-4, 1e-3, 1e-2, 1e-1), "random": (1e-2, 1e-1), "learned": (1e-3, 1e-2), "steps": 4,
               "examples": 96, "micro": 32, "learning_rate": 3e10},
        line="all-MiniLM-L6-v2 (22.7 M parameters)",
        subtitle="MiniLM on film reviews: full fine-tuning and LoRA from the same start",
        words={"metric": "accuracy", "unit": "reviews", "batch": "reviews", "test_name": "held-out IMDB reviews (64 tokens each)",
               "ood_name": "400 Rotten Tomatoes snippets"},
    ),
    "smollm2": Setting(
        model="smollm2", objective="causal_lm",
        data={"source": "winogrande", "max_length": 128, "packing": True, "limit": 2400, "eval_limit": 60, "append_eos": False},
        ood=None, choice={"source": "winogrande", "split": "validation", "limit": 160, "batch": 20, "length": 40},
        splits=("train", "validation"), steps=100, batch_size=4, lr_scale=6.0, eval_batch=4, test_limit=200,
        forgetting={"books": {"source": "lambada", "max_length": 96, "eval_limit": 100, "append_eos": False},
                    "choice": {"source": "arc_challenge", "split": "test", "limit": 80, "batch": 5, "length": 80}},
        graft={"sparsities": (1e-4, 1e-3, 1e-2, 1e-1), "random": (1e-1,), "learned": (1e-3,), "steps": 4,
               "examples": 16, "micro": 4, "learning_rate": 1e11},
        line="SmolLM2-135M-Instruct (134.5 M parameters, weights that carry 4-bit rounding)",
        subtitle="SmolLM2 on WinoGrande as text: full fine-tuning and LoRA from the same start",
        words={"metric": "next-token accuracy", "unit": "tokens", "batch": "packed rows of 128 tokens", "test_name": "held-out WinoGrande sentences"},
    ),
}  # fmt: skip


def setting(name):
    if name not in SETTINGS:
        raise UserError(f"the demo has no setting for model {name!r}{nearest(name, SETTINGS)}")
    return SETTINGS[name]


def default_workdir(model):
    return Path("runs/demo" if model == "minilm" else f"runs/demo-{model}")
