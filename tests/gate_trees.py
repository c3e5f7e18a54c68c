"""A tree with the paths of a tiny model, a loss in which every weight has its say, and score files for it."""

import jax
import jax.numpy as jnp
import numpy as np

from ft_jax import importance, tree

LAYERS, WIDTH = 6, 4
KINDS = {"fisher": "fisher", "movement": "gradient", "lt_sft": "change", "k_fpf": "change", "greentrainer": "gradient"}


def make(seed=0):
    rng = np.random.default_rng(seed)

    def array(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    def dense(d_in, d_out):
        return {"kernel": array(LAYERS, d_in, d_out), "bias": array(LAYERS, d_out)}

    def norm():
        return {"scale": array(LAYERS, WIDTH), "bias": array(LAYERS, WIDTH)}

    return {
        "embed": {"tokens": {"embedding": array(5, WIDTH)}},
        "layers": {"attn": {n: dense(WIDTH, WIDTH) for n in ("q", "k", "v", "out")}, "attn_norm": norm(),
                   "mlp": {"gate": dense(WIDTH, 6), "up": dense(WIDTH, 6), "down": dense(6, WIDTH)}, "mlp_norm": norm()},
        "head": {"kernel": array(WIDTH, 2), "bias": array(2)},
    }  # fmt: skip


TARGET = make(seed=1)


def loss(params):
    """Half the squared distance to TARGET: the gradient is the difference."""
    return sum(jnp.sum(jnp.square(x - y)) for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(TARGET))) / 2


def run(tx, steps, params=None, state=None):
    """``steps`` updates in one compiled step: (params before each and after the last, states likewise, compilations)."""
    compiled = []

    @jax.jit
    def step(params, state):
        compiled.append(1)
        moves, state = tx.update(jax.grad(loss)(params), state, params)
        return jax.tree.map(jnp.add, params, moves), state

    params = make() if params is None else params
    state = tx.init(params) if state is None else state
    seen = [(params, state)]
    for _ in range(steps):
        seen.append(step(*seen[-1]))
    return [p for p, _ in seen], [s for _, s in seen], len(compiled)


def write_scores(folder, seed=2):
    """One folder of scores of each kind for the tree: {kind: (path, {weight: scores})}."""
    out = {}
    for i, kind in enumerate(importance.KINDS):
        rng = np.random.default_rng(seed + i)
        scores = {p: rng.standard_normal(x.shape).astype(np.float32) for p, x in tree.flatten(make()).items()}
        scores = scores if kind == "gradient" else {p: np.abs(x) for p, x in scores.items()}
        importance.save(folder / kind, scores, kind)
        out[kind] = folder / kind, scores
    return out
