"""Statistics of a model on a few training examples, from which kernels start: covariances of inputs, gradients.

Einsum letters: l layer, t token, i and j features.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from ft_jax import tree
from ft_jax.data import pipeline
from ft_jax.errors import UserError
from ft_jax.io import hf, tokenizer
from ft_jax.models.layers import real_tokens
from ft_jax.objectives import data_of

SITE_OF = {  # which tap site is the input of a matrix
    "attn/q": "attn_in", "attn/k": "attn_in", "attn/v": "attn_in", "attn/out": "heads",
    "mlp/gate": "ffn_in", "mlp/up": "ffn_in", "mlp/down": "ffn_hidden",
}  # fmt: skip
SHAPES = {  # of a matrix's data, from the matrix's own
    "covariance": lambda shape: (*shape[:-1], shape[-2]),
    "mean": lambda shape: shape[:-1],
    "gradient": lambda shape: shape,
}


def shapes(wanted, params):
    """``{need: {path: ShapeDtypeStruct}}`` of what `gather` gives."""
    leaves = tree.flatten(params)
    return {need: {p: jax.ShapeDtypeStruct(SHAPES[need](leaves[p].shape), jnp.float32) for p, n in wanted.items() if need in n}
            for need in set().union(*wanted.values())}  # fmt: skip


def gather(wanted, model, params, objective, batches):
    """``{need: {path: float32 array}}`` for ``wanted``, ``{path: needs}`` of `kernels.needs`, over ``batches``, read once.

    covariance: E[x xᵀ] ``[layers, d, d]`` of the real tokens x that a matrix multiplies, mean: E[x] ``[layers, d]``, one
    d x d sum a site and layer in memory; gradient: that of ``objective``, as large as the matrices. UserError for a
    matrix outside the layers, and for statistics that are not finite or zero.
    """
    inputs = {p for p, needs in wanted.items() if needs & {"covariance", "mean"}}
    slopes = [p for p, needs in wanted.items() if "gradient" in needs]
    for path in inputs:
        if _matrix(path) not in SITE_OF:
            raise UserError(f"{path}: the inputs of this matrix are not gathered; those of the layers' {', '.join(SITE_OF)} are")
    batches = list(batches) if slopes else batches  # the gradient is a second pass over the same examples
    out = {need: {} for need in set().union(*wanted.values())}
    if inputs:
        found = moments(model, params, batches, sorted({SITE_OF[_matrix(p)] for p in inputs}))
        for path in inputs:
            count = tree.flatten(params)[path].shape[0]
            part = slice(count) if path.startswith("frozen_layers/") else slice(-count, None)
            for need in wanted[path]:
                out[need][path] = found[SITE_OF[_matrix(path)]][need][part]
    if slopes:
        out["gradient"] = _gradients(objective, params, slopes, batches)
    for need, arrays in out.items():
        for path, array in arrays.items():
            if not np.isfinite(array).all() or not np.asarray(array).any():
                raise UserError(f"{path}: its {need} over the training data is zero or not finite, so no kernel can start from it")
    return out


def _matrix(path):
    parts = path.split("/")
    return "/".join(parts[1:3]) if parts[0] in ("layers", "frozen_layers") else path


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sums(model, sites, params, batch):
    """Σ x xᵀ and Σ x of a batch's real tokens for each site, and how many they are."""
    _, seen = model.apply(params, batch, capture=sites)
    real = real_tokens(batch).astype(jnp.float32)

    def of(x):
        flat = (x.astype(jnp.float32) * real[..., None]).reshape(x.shape[0], -1, x.shape[-1])
        return {"covariance": jnp.einsum("lti,ltj->lij", flat, flat, precision="highest"), "mean": flat.sum(1)}

    return {site: of(seen[site]) for site in sites}, real.sum()


def moments(model, params, batches, sites):
    """``{site: {"covariance": E[x xᵀ] [layers, d, d], "mean": E[x] [layers, d]}}`` over the real tokens of all batches."""
    total, tokens = None, 0.0
    for batch in batches:
        found, count = _sums(model, tuple(sites), params, batch)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
        tokens += float(count)
    if not tokens:
        raise UserError("no token of training data to gather statistics over")
    return jax.tree.map(lambda x: x / tokens, total)


def _gradients(objective, params, paths, batches):
    from ft_jax import importance  # which needs the engine, and the engine this module

    mask = tree.map_with_path(lambda p, _: p in paths, params)
    return importance.gradient(objective, params, mask, batches)


def of_config(cfg, make_objective):
    """The ``gather`` of `recipe.build` for a train config: as few training batches as hold ``method.start_examples``, no dropout."""

    def of_examples(needs, model, params):
        tok = tokenizer.load(hf.resolve(cfg["model"]["path"]))
        data = pipeline.build(cfg["data"], "train", tok, data_of(cfg["objective"]), model.config.vocab_size)
        size = cfg["eval"]["batch_size"]
        number = -(-min(cfg["method"]["start_examples"], len(data)) // size)
        batches = itertools.islice(pipeline.batches(data, size, cfg["seed"]), number)
        return gather(needs, model, params, make_objective(cfg, model, tok), batches)

    return of_examples
