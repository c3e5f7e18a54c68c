"""What training sees of kernels beside an objective: the terms that they add to its loss, and the outputs of matrices.

A loss has ``weight · penalty`` by name, the mean over the matrices that have it.

A kernel class gives ``term``, the name, and its kernels a field ``weight [...]``, None where none is asked for. What it
gives is ``penalty()``, a number for each matrix of a stack; with ``reads`` it is ``penalty(x, real, tasks)`` of one matrix
and of what goes into it, which a tap has seen; with ``learns_from`` the model with the matrices of that field is a teacher.
A tap gives a term alike, of the activations that it ``sees``. Evaluation (no rng) takes no terms.
"""

import jax
import jax.numpy as jnp

from ft_jax import tree
from ft_jax.errors import UserError
from ft_jax.kernels import dot, is_kernel
from ft_jax.models.layers import real_tokens
from ft_jax.objectives import inputs_of
from ft_jax.taps import Tap

# Where the input of a layer's matrix is seen.
SITES = {"attn/q": "attn_in", "attn/k": "attn_in", "attn/v": "attn_in", "attn/out": "heads",
         "mlp/gate": "ffn_in", "mlp/up": "ffn_in", "mlp/down": "ffn_hidden"}  # fmt: skip


def _typed(x):
    return is_kernel(x) or isinstance(x, Tap)


def declared(params):
    """``{path: kernel or tap}`` of those that add a term, kernels inside others too."""
    found, nodes = {}, list(tree.flatten(params, is_leaf=_typed).items())
    while nodes:
        path, node = nodes.pop(0)
        if _typed(node):
            if node.term and node.weight is not None:
                found[path] = node
            nodes += [(f"{path}/{name}", value) for name, value in vars(node).items()]
    return found


def check(params, tasks):
    """UserError, by path, where a term goes by the tasks of rows and the data have another number of ``tasks``."""
    for path, node in declared(params).items():
        try:
            node.check_tasks(tasks)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None


def site_of(path):
    """The tap that sees what goes into the matrix at ``path``; UserError for one that none sees."""
    inner = path.removeprefix("layers/").removesuffix("/kernel")
    if inner not in SITES or not path.startswith("layers/"):
        raise UserError(f"{path}: the loss term of this kernel looks at the input of a layer's matrix, and no tap sees this one's")
    return SITES[inner]


def outputs(model, params, inputs, rng=None):
    """``{path: Σ |x W + b| over real tokens, [layers, d_out]}`` of every matrix of the layers, in float32."""
    _, seen = model.apply(params, inputs, rng, capture=tuple(sorted(set(SITES.values()))))
    real, out = real_tokens(inputs)[..., None], {}
    for path, kernel in tree.flatten(params, is_leaf=is_kernel).items():
        if not path.startswith("layers/") or path.removeprefix("layers/").removesuffix("/kernel") not in SITES:
            continue
        bias = params["layers"][path.split("/")[1]][path.split("/")[2]].get("bias")
        bias = jnp.zeros(kernel.shape[:1] + kernel.shape[-1:]) if bias is None else bias

        def one(kernel, bias, x):
            return (jnp.abs(dot(kernel, x).astype(jnp.float32) + bias) * real).sum((0, 1))

        out[path] = jax.vmap(one)(kernel, bias, seen[site_of(path)][-kernel.shape[0] :])
    return out


def _joined(values):
    """``{name: the mean over all matrices}`` of ``[(name, [...])]``."""
    names = dict.fromkeys(name for name, _ in values)
    return {n: jnp.concatenate([jnp.ravel(v) for name, v in values if name == n]).mean() for n in names}


def _read(readers, seen, inputs):
    """The terms of kernels that look at their inputs, and of taps; ``seen {site: [layers, B, T, d]}``."""
    real, tasks, out = real_tokens(inputs), inputs.get("tasks"), []
    for path, node in readers.items():
        # Below a split stack's live layers nothing trains, so nothing is pulled on there.
        xs = [seen[site][-node.weight.shape[0] :].astype(jnp.float32) for site in _sites(path, node)]
        out.append((node.term, node.weight * jax.vmap(lambda k, *xs: k.penalty(*xs, real, tasks))(node, *xs)))
    return _joined(out)


def _sites(path, node):
    return node.sees if isinstance(node, Tap) else (site_of(path),)


def _distilled(model, params, pupils, out, inputs):
    """The mean over layers, real tokens and features of (``out`` - the teacher's block outputs)², times the mean weight."""
    teachers = {path[: path.index("/kernel") + len("/kernel")]: getattr(k, k.learns_from) for path, k in pupils.items()}
    teacher = tree.map_with_path(lambda path, x: teachers.get(path, x), params, is_leaf=is_kernel)
    _, aim = model.apply(jax.lax.stop_gradient(teacher), inputs, capture=("block_out",))
    real = real_tokens(inputs)[..., None]
    far = jnp.square(out - aim["block_out"]).astype(jnp.float32) * real
    weight = jnp.concatenate([jnp.ravel(k.weight) for k in pupils.values()]).mean()
    return {next(iter(pupils.values())).term: weight * far.sum() / (jnp.maximum(real.sum(), 1) * out.shape[0] * out.shape[-1])}


def added(fn, model, dropout):
    """``(params, batch, rng) -> (loss, metrics)`` of an objective on a model; with an rng the kernels' terms come on top.

    ``metrics["loss"]`` stays the objective's own, each term stands beside it. Raises UserError as `site_of` does.
    """

    def objective(params, batch, rng):
        found, taken = declared(params), []
        domains = {node.domain for node in found.values() if isinstance(node, Tap)} - {None}
        if "tasks" in batch and domains:
            counts = batch.get("weight", jnp.ones(batch["tasks"].shape))
            batch = {**batch, "weight": counts * (batch["tasks"] == min(domains))}
        found = found if rng is not None else {}
        readers = {path: node for path, node in found.items() if isinstance(node, Tap) or node.reads}
        pupils = {path: node for path, node in found.items() if path not in readers and node.learns_from}
        sites = {site for path, node in readers.items() for site in _sites(path, node)} | ({"block_out"} if pupils else set())
        sites = tuple(sorted(sites))

        def apply(params, inputs, rng, targets=None):
            out = model.apply(params, inputs, rng if dropout else None, sites, targets)
            if not sites:
                return out
            taken.append(_read(readers, out[1], inputs))
            if pupils:
                taken.append(_distilled(model, params, pupils, out[1]["block_out"], inputs))
            return out[0]

        loss, metrics = fn(apply, params, batch, rng)
        held = [kernel for path, kernel in found.items() if path not in readers and path not in pupils]
        terms = _joined([(kernel.term, kernel.weight * kernel.penalty()) for kernel in held])
        terms |= _joined([item for one in taken for item in one.items()])
        return loss + sum(terms.values()) if terms else loss, metrics | terms

    # What an update may ask for beside the gradient: the step hands it on, and nothing of it is traced where none does.
    objective.outputs = lambda params, batch, rng: outputs(model, params, inputs_of(batch), rng if dropout else None)
    return objective
