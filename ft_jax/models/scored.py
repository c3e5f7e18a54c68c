"""Cross-entropy over a large vocabulary, a stretch of tokens at a time.

The logits of a batch, [B, T, V] in float32, are the largest arrays of a language model's step, and so is their gradient. Here
each stretch gives its share of the loss and, in the forward pass already, of the gradients, so that no more than a stretch's
logits are held, and no product with the vocabulary is done twice.
"""

import functools

import jax
import jax.numpy as jnp
import optax
from jax.custom_derivatives import SymbolicZero

from ft_jax import parallel

LIMIT = 2**24  # numbers among the logits of one stretch on one device: 64 MiB
LEAST = 256  # tokens of a stretch on one device, however large the vocabulary: a matmul of fewer leaves a chip idle


def stretch(rows, length, vocabulary, ways=1):
    """How many tokens of each row one stretch holds; rows are spread over ``ways`` devices."""
    rows = max(1, rows // ways)
    most = max(LIMIT // (rows * vocabulary), -(-LEAST // rows))
    return -(-length // -(-length // most))


def score(logits, targets, weights):
    """``(Σ w (logsumexp z - z_target), (Σ w [argmax z = target], losses))``; logits [..., V], targets and weights [...]."""
    logits = logits.astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return (losses * weights).sum(), ((likeliest(jax.lax.stop_gradient(logits), targets) * weights).sum(), losses)


def likeliest(logits, targets):
    """bool [...]: whether ``argmax(logits) == targets``, as one reduction to a bool, which XLA vectorises and an argmax it does not."""
    own, places = jnp.take_along_axis(logits, targets[..., None], -1), jnp.arange(logits.shape[-1])
    return ~((logits > own) | ((logits == own) & (places < targets[..., None]))).any(-1)


def sums(logits, targets, weights):
    """`cross_entropy` of logits that are there already."""
    loss, (hits, _) = score(logits, targets, weights)
    return {"loss": loss, "accuracy": hits}


def cross_entropy(logits_of, head, x, targets, weights, vocabulary, mesh=None):
    """Sums of w · (logsumexp z - z_target) and of w · [argmax z = target] over tokens, z = logits_of(head, x).

    Args:
      logits_of: ``(head, x [..., D]) -> logits [..., vocabulary]``; head: its weights, any tree, kernels too.
      x, targets, weights: [B, T, D], int [B, T], float [B, T].
      mesh: what they are laid out over; the head is gathered from its ``fsdp`` shares once, not for each stretch.
    Returns:
      ``{"loss", "accuracy"}``, float32 scalars. Exact; differentiable in reverse mode for head, x and weights by the loss.
    """
    length = stretch(*targets.shape, vocabulary, parallel.ways(mesh))
    if length >= targets.shape[1]:
        return sums(logits_of(head, x), targets, weights)
    pad = -targets.shape[1] % length
    padded = (jnp.pad(a, ((0, 0), (0, pad)) + ((0, 0),) * (a.ndim - 2)) for a in (x, targets, weights))
    cut = (jnp.moveaxis(a.reshape(a.shape[0], -1, length, *a.shape[2:]), 1, 0) for a in padded)
    loss, hits = _sums(logits_of, mesh, head, *cut)
    return {"loss": loss, "accuracy": hits}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sums(logits_of, mesh, head, x, targets, weights):
    head = parallel.gathered(head, mesh)

    def body(sums, one):
        loss, (hits, _) = score(logits_of(head, one[0]), *one[1:])
        return (sums[0] + loss, sums[1] + hits), None

    return jax.lax.scan(body, (jnp.zeros(()), jnp.zeros(())), (x, targets, weights))[0]


def _sums_forward(logits_of, mesh, head, x, targets, weights):
    """The sums, and their gradients for a cotangent of 1; of the head, only for the leaves that are differentiated."""
    leaves, shape = jax.tree.flatten(head)
    wanted = [leaf.perturbed for leaf in leaves]
    leaves = jax.tree.leaves(parallel.gathered(jax.tree.unflatten(shape, [leaf.value for leaf in leaves]), mesh))

    def loss_of(live, x, targets, weights):
        live = iter(live)
        whole = [next(live) if wants else leaf for wants, leaf in zip(wanted, leaves, strict=True)]
        return score(logits_of(jax.tree.unflatten(shape, whole), x), targets, weights)

    def body(sums, one):
        (loss, (hits, losses)), (d_live, d_x) = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)(live, *one)
        d_live = [total + d.astype(jnp.float32) for total, d in zip(sums[2], d_live, strict=True)]
        return (sums[0] + loss, sums[1] + hits, d_live), (d_x, losses)

    live = [leaf for wants, leaf in zip(wanted, leaves, strict=True) if wants]
    begin = jnp.zeros(()), jnp.zeros(()), [jnp.zeros(leaf.shape) for leaf in live]
    (loss, hits, d_live), (d_x, losses) = jax.lax.scan(body, begin, (x.value, targets.value, weights.value))
    d_live = iter([d.astype(leaf.dtype) for d, leaf in zip(d_live, live, strict=True)])
    d_head = jax.tree.unflatten(shape, [next(d_live) if wants else None for wants in wanted])
    return (loss, hits), (d_head, d_x, losses)


def _sums_backward(logits_of, mesh, gradients, cotangent):
    if isinstance(cotangent[0], SymbolicZero):
        return None, None, None, None
    d_head, d_x, losses = jax.tree.map(lambda d: (cotangent[0] * d).astype(d.dtype), gradients)
    return d_head, d_x, None, losses


_sums.defvjp(_sums_forward, _sums_backward, symbolic_zeros=True)
