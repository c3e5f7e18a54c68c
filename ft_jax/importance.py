"""Scores of weights, for masks that pick by them: ``python -m ft_jax.importance --kind=fisher --config=… --out=DIR``.

``--kind=gradient`` and ``--kind=fisher`` read ``--examples`` training examples of a config at its starting weights;
``--kind=change`` compares a run (``--run=WORKDIR``) with its start; ``--kind=disagreement`` is of units, not weights. What is scored with ``method=full`` trains with
``method=full+fisher(share=0.005,scores=FOLDER)``.
"""

import dataclasses
import itertools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import config_flags
from tqdm.auto import tqdm

from ft_jax import recipe, taps, train, tree
from ft_jax.allocation import GATED
from ft_jax.data import pipeline
from ft_jax.errors import UserError, cli, one_line
from ft_jax.io import files, runs, safetensors
from ft_jax.models.layers import real_tokens
from ft_jax.objectives import inputs_of
from ft_jax.registry import register

KINDS = ("gradient", "fisher", "change", "disagreement")


def _mean(objective, params, mask, batches, kind):
    trainable, frozen = tree.split(params, mask)

    def loss(t, batch):
        return objective(tree.join(t, frozen), batch, None)

    @jax.jit
    def one(t, batch):
        if kind == "gradient":
            (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(t, batch)
            return jax.tree.map(lambda g: g * metrics["weight"], grads), metrics["weight"]
        rows = {k: v[:, None] for k, v in batch.items()}
        grads = jax.vmap(lambda row: jax.grad(loss, has_aux=True)(t, row)[0])(rows)
        return jax.tree.map(lambda g: jnp.square(g).sum(0), grads), len(next(iter(batch.values())))

    total, weight = jax.tree.map(jnp.zeros_like, trainable), 0.0
    for batch in batches:
        found, units = one(trainable, batch)
        total, weight = jax.tree.map(jnp.add, total, found), weight + float(units)
    if not weight:
        raise UserError("no example to score weights by")
    return {path: np.asarray(x) / np.float32(weight) for path, x in tree.flatten(total).items()}


def gradient(objective, params, mask, batches):
    """``{path: ∂L/∂θ}`` of the leaves that train: the mean over all units (examples or target tokens), no dropout."""
    return _mean(objective, params, mask, batches, "gradient")


def fisher(objective, params, mask, batches):
    """``{path: mean over examples of (∂L_i/∂θ)²}``: the diagonal empirical Fisher information (arXiv:2111.09839)."""
    return _mean(objective, params, mask, batches, "fisher")


def disagreement(model, params, batches, *, rate=0.003, seed=0):
    """``{path of mlp/up and mlp/down: [layers, outputs]}``: ∂KL(p_2‖p_1)/∂gate a token of two passes that dropout sets apart.

    A gate of 1 multiplies each unit of a layer's FFN, hidden and output; p_1 and p_2 are what the model predicts under
    the same gates, and the slope goes through both. A model without dropout of its own drops ``rate`` of the attention's
    weights and of the FFN's outputs. As CoFiTune's published code (arXiv:2404.10306), but for padding, which it counts.
    """
    own = model.config
    if not own.hidden_dropout and not own.attention_dropout:
        own = dataclasses.replace(own, hidden_dropout=rate, attention_dropout=rate)
    model = dataclasses.replace(model, config=own)
    gated = taps.attach(model, params, [("|".join(GATED.values()), "affine")], jax.random.key(0))
    held = gated["layers"]["taps"]

    def far(gates, batch, keys):
        put = {**held, **{site: held[site].replace(scale=gate) for site, gate in gates.items()}}
        put, inputs = {**gated, "layers": {**gated["layers"], "taps": put}}, inputs_of(batch)
        first, second = (jax.nn.log_softmax(model.apply(put, inputs, key).astype(jnp.float32)) for key in keys)
        each = (jnp.exp(second) * (second - first)).sum(-1)
        real = real_tokens(inputs) if each.ndim == 2 else jnp.ones(each.shape)
        return jnp.where(real, each, 0).sum(), real.sum()

    slope, gates = jax.jit(jax.grad(far, has_aux=True)), {site: held[site].scale for site in GATED.values()}
    total, count = jax.tree.map(jnp.zeros_like, gates), 0.0
    for number, batch in enumerate(batches):
        found, units = slope(gates, batch, jax.random.split(jax.random.fold_in(jax.random.key(seed), number)))
        total, count = jax.tree.map(jnp.add, total, found), count + float(units)
    if not count:
        raise UserError("no example to score units by")
    return {path: np.asarray(total[site]) / np.float32(count) for path, site in GATED.items()}


def change(start, end, mask):
    """``{path: |θ_end - θ_start|}`` of the leaves that train."""
    first, last = (tree.flatten(tree.split(params, mask)[0]) for params in (start, end))
    return {path: np.abs(np.asarray(last[path], np.float32) - np.asarray(first[path], np.float32)) for path in first}


def change_of_run(workdir):
    """`change` of a run's last weights against those that it began with."""
    _, end, made = runs.load_run(workdir, "last")
    start = runs.Run(workdir, files.read_json(pathlib.Path(workdir) / "config.json"), tensorboard=False).start
    _, start, mask, _ = recipe.build(made, start=start)
    return change(start, end, mask)


def of_config(cfg, kind, examples):
    """`gradient`, `fisher` or `disagreement` of ``examples`` training examples at the start of a train config."""
    cfg = train.ready(cfg)
    parts, size = train.prepare(cfg), cfg["batch_size"]
    if not 0 < examples <= len(parts["data"]["train"]):
        raise UserError(f"--examples is {examples}; the training data holds {len(parts['data']['train'])}")
    count = -(-examples // size)
    stream = itertools.islice(pipeline.batches(parts["data"]["train"], size, cfg["seed"]), count)
    batches = tqdm(stream, total=count, desc=kind, unit="batch")
    if kind == "disagreement":
        return disagreement(parts["model"], parts["params"], batches, seed=cfg["seed"])
    return _mean(parts["objective"], parts["params"], parts["mask"], batches, kind)


def save(folder, scores, kind):
    """Writes scores where masks find them: a safetensors file that says of what kind they are."""
    safetensors.save(folder, sorted(scores.items()), metadata={"scores": kind})


@register("merge", "lt_sft", paper="arXiv:2110.07560")
def compose(base, tuned):
    """LT-SFT's composition: θ_0 + Σ (θ_i - θ_0), sparse differences of several runs (a language, a task) added up."""
    return jax.tree.map(lambda x, *ends: x + sum(end - x for end in ends), base, *tuned)


@cli
def main(argv=None):
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "Train config: what is scored.", flag_values=values)
    flags.DEFINE_string("kind", None, ", ".join(KINDS), flag_values=values)
    flags.DEFINE_string("run", None, "Folder of a finished run, for --kind=change.", flag_values=values)
    flags.DEFINE_integer("examples", 256, "How many training examples.", flag_values=values)
    flags.DEFINE_string("out", None, "Folder to write the scores to.", flag_values=values)
    try:
        values(sys.argv if argv is None else ["importance", *argv])
    except (flags.Error, KeyError, AttributeError, ValueError, TypeError) as error:
        raise UserError(one_line(error)) from None
    if values.kind not in KINDS or not values.out:
        raise UserError(f"give --kind ({', '.join(KINDS)}) and --out=FOLDER")
    needed = "run" if values.kind == "change" else "config"
    if not values[needed].value:
        raise UserError(f"--kind={values.kind} needs --{needed}")
    if values.kind == "change":
        scores = change_of_run(values.run)
    else:
        scores = of_config(values.config, values.kind, values.examples)
    save(values.out, scores, values.kind)
    counted = "units" if values.kind == "disagreement" else "weights"
    print(f"{values.out}: {values.kind} of {sum(x.size for x in scores.values()):,} {counted}")


if __name__ == "__main__":
    main()
