"""What the atlas trains, as data: every method by name, the tasks, and what all methods are given alike."""

import dataclasses

from ft_jax.data import tasks

# What every method tries: the same number of rates, six-fold apart. A best one at an end is marked in the table.
RATES = (5e-5, 3e-4, 1.8e-3, 1.1e-2)
# Rows whose rates are so many times as large: SGD does not divide by the gradient's size; C3A divides its change by the
# width, and PEFT's documentation starts it at 0.1; FourierFT's authors train GLUE at 0.05 to 0.12.
FASTER = {"full, SGD": 100.0, "LoRA, DP-SGD": 100.0, "C3A": 36.0, "FourierFT": 6.0}

# name in the table -> (family, the method as configs/train.py reads it). One row a registered method, at LoRA's r = 8 where
# a paper's own sizes are meant for wider layers. FISHER, GRADIENT and CHANGE stand for the task's scores (`scores.py`).
METHODS = {
    "full": ("full", "layers"),
    "LoRA r=1": ("low rank", "lora(rank=1, alpha=2)"),
    "LoRA r=8": ("low rank", "lora(rank=8, alpha=16)"),
    "LoRA r=64": ("low rank", "lora(rank=64, alpha=128)"),
    "rsLoRA": ("low rank", "rslora(rank=8, alpha=16)"),
    "LoRA-FA": ("low rank", "lora_fa(rank=8, alpha=16)"),
    "LoRA, B alone": ("low rank", "lora_b(rank=8, alpha=16)"),
    "PiSSA": ("low rank", "pissa(rank=8, alpha=8)"),
    "OLoRA": ("low rank", "olora(rank=8, alpha=8)"),
    "DoRA": ("low rank", "dora(rank=8, alpha=16)"),
    "AdaLoRA": ("low rank", "adalora(rank=8, alpha=16)"),
    "PELA": ("low rank", "pela(share=0.9)"),
    "CorDA": ("low rank", "corda(rank=8, alpha=8)"),
    "EVA": ("low rank", "eva(rank=8, alpha=16)"),
    "LoRA-GA": ("low rank", "lora_ga(rank=8, alpha=16)"),
    "DeLoRA": ("low rank", "delora(rank=8, bound=0.5)"),  # the first step changes W by the bound; the default 15 ends at chance
    "GraLoRA": ("low rank", "gralora(rank=8, alpha=16)"),
    "DEFT": ("low rank", "deft(rank=8)"),
    "PaRa": ("low rank", "para(rank=8)"),
    "PEANuT": ("low rank", "peanut(rank=8)"),
    "HiRA": ("product", "hira(rank=8)"),
    "GLoRA": ("product", "glora(rank=8)"),
    "FourierFT": ("transform", "fourierft(count=1000)"),
    "WaveFT": ("transform", "waveft(count=1000)"),
    "C3A": ("transform", "c3a(block=128)"),
    "HRA": ("orthogonal", "hra(rank=8)"),
    "RoAd": ("orthogonal", "road(group=64)"),
    "PSOFT": ("orthogonal", "psoft(rank=32)"),
    "LoHa": ("product", "loha(rank=4, alpha=8)"),
    "LoKr": ("product", "lokr(rank=8, alpha=8)"),
    "VeRA": ("product", "vera(rank=64)"),
    "RandLoRA": ("product", "randlora(rank=32, alpha=64)"),
    "OFT": ("orthogonal", "oft(block=16)"),
    "BOFT": ("orthogonal", "boft(block=8, factors=2)"),
    "MiSS": ("block", "miss(rank=8)"),
    "Bone": ("block", "bone(rank=8)"),
    "(IA)³": ("scale", "ia3"),
    "SSF": ("scale", "ssf"),
    "sparse delta": ("sparse", "sparse(share=0.01)"),
    "SHiRA": ("sparse", "shira(rank=8)"),
    "SaRA": ("sparse", "sara(share=0.05)"),
    "Supra": ("sparse", "supra(share=0.01, rank=8, alpha=16)"),
    "DSEE": ("sparse", "dsee(rank=8, alpha=16)"),
    "S²FT": ("sparse", "s2ft(share=0.05)"),
    "DID": ("subspace", "did(dimension=256)"),
    "SAID": ("subspace", "said(dimension=256)"),
    "SST": ("subspace", "sst(rank=8)"),
    "QLoRA (NF4)": ("quantised", "lora(rank=8, alpha=16) @ nf4(block=64)"),
    "LoRA on NF3": ("quantised", "lora(rank=8, alpha=16) @ nf(bits=3)"),
    "LoRA on int8": ("quantised", "lora(rank=8, alpha=16) @ int8(block=64)"),
    "LQ-LoRA": ("quantised", "lqlora(rank=8)"),
    "LoftQ": ("quantised", "loftq(rank=8)"),
    "LoRAMoE": ("mixture", "loramoe(rank=2, alpha=4)"),
    "Houlsby": ("adapter", "houlsby(size=16)"),
    "Pfeiffer": ("adapter", "pfeiffer(size=16)"),
    "parallel adapter": ("adapter", "parallel_adapter(size=16)"),
    "scaled parallel adapter": ("adapter", "adapter(form=parallel, size=16, scale=4, learnt=true)"),
    "mix-and-match": ("adapter", "mam_adapter(size=16)+prefix_tuning(length=10)"),
    "Compacter": ("adapter", "compacter(size=24)"),
    "Polyhistor": ("adapter", "polyhistor"),
    "prompt tuning": ("prompt", "prompt_tuning(length=10)"),
    "P-tuning": ("prompt", "p_tuning(length=10)"),
    "P-tuning v2": ("prompt", "p_tuning_v2(length=10)"),
    "prefix tuning": ("prompt", "prefix_tuning(length=10)"),
    "DePT": ("prompt", "dept(length=10)"),
    "EPT": ("prompt", "ept(length=10)"),
    "L2M": ("prompt", "l2m(pool=8)"),
    "LoFiT, scales": ("scale", "lofit_scale"),
    "UniPT": ("side", "unipt(size=64)"),
    "ladder side network": ("side", "lst"),
    "QST": ("side", "nf4+qst"),
    "LEVI": ("side", "levi"),
    "BitFit": ("mask", "bitfit"),
    "LN tuning": ("mask", "ln_tuning"),
    "HFT": ("mask", "layers+hft(period=20)"),
    "LISA": ("mask", "layers+lisa(n=2, period=5)"),
    "random mask": ("mask", "layers+random(share=0.01)"),
    "magnitude mask": ("mask", "layers+magnitude(share=0.01)"),
    "FISH mask": ("mask", "layers+fisher(share=0.01, scores=FISHER)"),
    "movement mask": ("mask", "layers+movement(share=0.01, scores=GRADIENT)"),
    "LT-SFT": ("mask", "layers+lt_sft(share=0.01, scores=CHANGE)"),
    "k-FPF": ("mask", "layers+k_fpf(modules=4, scores=CHANGE)"),
    "CoFiTune": ("mask", "layers+cofitune"),
    "GreenTrainer": ("mask", "layers+greentrainer(budget=0.5, scores=GRADIENT)"),
    "full, SGD": ("update", "layers+sgd"),
    "full, Lion": ("update", "layers+lion"),
    "full, Adafactor": ("update", "layers+adafactor"),
    "full, 8-bit AdamW": ("update", "layers+adamw_8bit"),
    "full, L1 pull": ("update", "layers+adamw_l1"),
    "full, layer-wise decay": ("update", "layers+layerwise_decay"),
    "full, SAM": ("update", "layers+sam"),
    "full, MIGU": ("update", "layers+migu"),
    "AdaLoRA, allocated": ("update", "adalora(rank=12, alpha=16)+adalora_adamw(target=8)"),
    "LoRA+": ("update", "lora(rank=8, alpha=16)+lora_plus"),
    "ALLoRA": ("update", "lora(rank=8, alpha=16)+allora"),
    "LoRA, DP-Adam": ("update", "lora(rank=8, alpha=16)+dp_adamw"),
    "LoRA, DP-SGD": ("update", "lora(rank=8, alpha=16)+dp_sgd"),
    "LoRA in two layers": ("joined", "lora(rank=8, alpha=16)+lisa(n=2, period=5)"),
}
# What is registered and has no row: why.
LEFT_OUT = {
    ("kernel", "bank"): "serves adapters that were trained elsewhere",
    ("kernel", "mhr"): "needs several tasks in one run",
    ("kernel", "polytropon"): "needs several tasks in one run",
    ("kernel", "mhr_z"): "starts from skills of several tasks",
    ("kernel", "mhr_mu"): "starts from skills of several tasks",
    ("kernel", "meteora"): "mixes adapters that other runs trained",
    ("kernel", "sltrain"): "trains from scratch",
    ("mask", "only_layers"): "is a place, not a method: the search over configurations uses it",
    ("tap", "lofit"): "needs the heads that a first run chose",
    ("tap", "mixda"): "mixes domain adapters that other runs trained",
    ("tap", "mixda_domain"): "is the first stage of mixda, on texts of a domain and on others",
    ("tap", "sciprompt"): "needs label words, and these tasks have a prototype head",
    ("update", "cofitune_soft"): "needs the scores of what the base model knew",
    ("mask", "declared"): "is what every kernel has without it",
    ("mask", "rules"): "is how full fine-tuning says what trains",
    ("tap", "affine"): "is SSF's shift, which the layers' biases hold already",
    ("update", "adamw"): "is what every row has that names no other",
    ("update", "drift"): "needs the weights of a prior fine-tuning",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """One base model and data set, and what all methods are given alike: steps, batch, examples, seeds."""

    model: str
    objective: str
    data: dict
    steps: int
    batch_size: int
    seeds: tuple[int, ...]  # the first one tries the rates
    line: str
    methods: tuple[str, ...] = ()  # names of METHODS; none: all of them, so that a new row is a new part of a finished atlas
    test: tuple[str, int] = ("test", 400)  # split and number of examples
    forgetting: dict = dataclasses.field(default_factory=dict)  # what the base model was trained for, on other texts
    eval_batch: int = 50
    scored: int = 128  # training examples that masks' scores are taken from
    rates: tuple[float, ...] = RATES

    @property
    def rows(self):
        return self.methods or tuple(METHODS)


@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
    tasks: dict[str, Task]


IMDB = {"source": "imdb", "max_length": 24, "truncation_side": "left", "num_labels": 2, "limit": 1200, "eval_limit": 120}
SUBJECTS = {**tasks.settings("subjects"), "max_length": 16, "limit": 1200, "eval_limit": 120}
SENTENCES = {"source": "winogrande", "max_length": 64, "packing": True, "limit": 1200, "eval_limit": 40, "append_eos": False}
HALVES = {"source": "lambada", "texts": 96, "words": 36, "batch": 48, "length": 20}
PASSAGES = {"source": "lambada", "max_length": 72, "eval_limit": 36, "append_eos": False}
_MINILM = {"model": "minilm", "objective": "classification", "steps": 48, "batch_size": 8,
           "seeds": (0, 1, 2), "test": ("test", 320), "eval_batch": 40, "forgetting": HALVES}  # fmt: skip
SUBSET = ("full", "LoRA r=1", "LoRA r=8", "DoRA", "PiSSA", "(IA)³", "QLoRA (NF4)", "LN tuning", "LISA")  # no BitFit: a Llama has no biases
SCALES = {
    "smoke": Setting({"imdb": Task(**_MINILM | {
        "data": IMDB | {"limit": 64, "eval_limit": 20, "max_length": 16}, "methods": ("full", "LoRA r=8", "(IA)³", "FISH mask", "full, SGD"),
        "steps": 4, "seeds": (0,), "test": ("test", 40), "forgetting": HALVES | {"texts": 24, "batch": 24}, "scored": 16,
        "rates": (4e-4, 3e-3), "line": "MiniLM on a few film reviews"})}),
    "cpu": Setting({
        "imdb": Task(**_MINILM, data=IMDB, line="all-MiniLM-L6-v2 on the ends of film reviews (IMDB, two classes)"),
        "subjects": Task(**_MINILM, data=SUBJECTS, line="all-MiniLM-L6-v2 on the area of exam questions (MMLU's, four classes)"),
        "sentences": Task(model="smollm2", objective="causal_lm", data=SENTENCES, methods=SUBSET, steps=24, batch_size=4, seeds=(0, 1),
                          test=("validation", 60), forgetting=PASSAGES, eval_batch=4, scored=32, rates=RATES[:3],
                          line="SmolLM2-135M-Instruct on WinoGrande as text"),
    }),
    "full": Setting({
        "mnli": Task(model="hf:FacebookAI/roberta-base", objective="classification",
                     data={"source": "tfds:glue/mnli", "text_field": "premise", "pair_field": "hypothesis", "num_labels": 3, "max_length": 256,
                           "splits": {"validation": "validation_matched", "test": "validation_mismatched"}, "limit": 100_000, "eval_limit": 2000},
                     steps=5000, batch_size=32, seeds=(0, 1, 2), test=("test", 5000), forgetting=HALVES,
                     eval_batch=64, scored=1024, line="RoBERTa-base on MNLI"),
        "sentences": Task(model="hf:meta-llama/Llama-3.2-1B", objective="causal_lm", data=SENTENCES | {"max_length": 512, "limit": 0, "eval_limit": 500},
                          steps=1000, batch_size=16, seeds=(0, 1, 2), test=("validation", 500),
                          forgetting=PASSAGES | {"max_length": 256, "eval_limit": 1000}, eval_batch=16, scored=512,
                          line="Llama-3.2-1B on WinoGrande as text"),
    }),
}  # fmt: skip
