"""Eight LoRA runs as one program against the same eight one after the other.

python scripts/benches/population.py [--shape=minilm --members=8 --steps=20 --rounds=2]
"""

import pathlib
import statistics
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax

from ft_jax import errors, models, population, train
from ft_jax.io import hf

LINEAR = r"layers/(attn|mlp)/\w+/kernel"
_BERT = {"model_type": "bert", "vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2,
         "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "pad_token_id": 0}  # fmt: skip
# name -> (sizes of BERT-mini and of MiniLM, batch size, tokens a text)
SHAPES = {
    "bert-mini": ({"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}, 16, 32),
    "minilm": ({"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}, 16, 64),
}  # fmt: skip


def _folder(path, sizes):
    """A random encoder of these sizes with MiniLM's tokenizer."""
    model = models.Model(models.config_from_hf({**_BERT, **sizes}, head="none"))
    hf.save(path, model, model.init(jax.random.key(0)), hf.resolve("minilm"))
    return path


def configs(folder, members, steps, batch_size, length):
    """LoRA of rank 1 to ``members``, a seed each."""
    return {
        f"r{rank}": {
            "seed": rank, "steps": steps, "batch_size": batch_size,
            "model": {"path": str(folder), "head": "classification", "dropout": False},
            "data": {"source": "rotten_tomatoes", "num_labels": 2, "max_length": length, "limit": 1000, "eval_limit": 64},
            "method": {"name": "lora", "kernels": ((LINEAR, f"lora(rank={rank}, alpha={2 * rank})"),)},
            "optimizer": {"learning_rate": 1e-3}, "eval": {"every": 0, "batch_size": 32},
            "save": {"every": steps, "keep": 1}, "log": {"every": steps, "tensorboard": False}, "mesh": {"data": 1},
        }
        for rank in range(1, members + 1)
    }  # fmt: skip


def _timed(fn):
    jax.clear_caches()  # neither side finds the other's programs
    started = time.perf_counter()
    found = fn()
    return time.perf_counter() - started, found


def rows(shape="minilm", members=8, steps=20, rounds=2, batch_size=None, length=None):
    """Seconds of the population and of the single runs, in turn within each round; medians over the rounds.

    Returns two rows {what, shape, ours, peer, ratio, unit, samples}: a step of all members once compiled, and the whole
    of the runs with loading, compilation, validation and checkpoints. ratio = ours / peer; samples are those of each round.
    """
    if shape not in SHAPES:
        raise errors.UserError(f"no shape called {shape!r}{errors.nearest(shape, SHAPES)}")
    if members < 1 or steps < 2 or rounds < 1:
        raise errors.UserError(f"needs members >= 1, steps >= 2, rounds >= 1, not {members}, {steps}, {rounds}")
    cache = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)  # both sides compile
    sizes, own_batch, own_length = SHAPES[shape]
    batch_size, length = batch_size or own_batch, length or own_length
    whole, step = {"ours": [], "peer": []}, {"ours": [], "peer": []}
    try:
        with tempfile.TemporaryDirectory() as home:
            home = pathlib.Path(home)
            chosen = configs(_folder(home / "base", sizes), members, steps, batch_size, length)
            _prepare(chosen)
            for i in range(rounds):
                seconds, one = _timed(lambda i=i: population.train(chosen, home / f"population{i}", size=members))
                whole["ours"].append(seconds)
                step["ours"].append(members / next(iter(one.values()))["steps_per_second"])
                seconds, many = _timed(lambda i=i: {n: train.train(c, home / f"single{i}" / n, label=n) for n, c in chosen.items()})
                whole["peer"].append(seconds)
                step["peer"].append(sum(1 / s["steps_per_second"] for s in many.values()))
    finally:
        jax.config.update("jax_enable_compilation_cache", cache)
    text = f"{shape}, {members} x LoRA r 1..{members}, batch {batch_size}x{length}"
    return [_row(f"{members} adapters, a step of all", text, step), _row(f"{members} adapters, {steps} steps, whole", text, whole)]


def _prepare(chosen):
    """Tokenises once, so that neither side pays for it."""
    train.prepare(train.open_run(next(iter(chosen.values())), "never-made")[0])


def _row(what, shape, seconds):
    ours, peer = (statistics.median(seconds[side]) for side in ("ours", "peer"))
    return {"what": what, "shape": shape, "ours": ours, "peer": peer, "ratio": ours / peer, "unit": "s",
            "samples": seconds}  # fmt: skip


@errors.cli
def main(argv=None):
    parser = errors.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="minilm", help=", ".join(SHAPES))
    for name, value in (("members", 8), ("steps", 20), ("rounds", 2), ("batch_size", 0), ("length", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    for row in rows(**vars(parser.parse_args(argv))):
        print(f"{row['what']}: ours {row['ours']:.2f} s, one after the other {row['peer']:.2f} s, ratio {row['ratio']:.2f} ({row['shape']})")


if __name__ == "__main__":
    main()
