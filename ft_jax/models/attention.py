"""softmax(q kᵀ / sqrt(h)) v, with a gradient rule of its own where the compiler orders products badly.

Letters: b batch, q query position, s key position, k key/value head, g query heads per key/value head, h head dim.
"""

import jax
import jax.numpy as jnp

from ft_jax.models.layers import dropout, kept_inputs

SCORES = 2**27  # attention scores held at once on a device
LEAST = -0.7 * float(jnp.finfo(jnp.float32).max)  # score of a pair that is not allowed: finite, so that a row of them has a softmax


def query_blocks(queries, per_query):
    """The least number of equal blocks of queries whose scores, ``per_query`` each, stay below SCORES."""
    least = -(-queries * per_query // SCORES)
    return next(n for n in range(max(1, least), queries + 1) if queries % n == 0) if least <= queries else queries


def attend(q, k, v, allowed, rate=0.0, rng=None, mesh=None):
    """softmax(q kᵀ / sqrt(h)) v over allowed pairs; q [b,q,heads,h], k/v [b,s,kv heads,h], allowed bool [b,1,q,s].

    Long sequences go by blocks of queries whose scores the backward pass computes again; mesh: of the devices that the scores are over.
    Queries for which nothing is allowed get the mean of v.
    """
    if rng is None or rate == 0.0:
        blocks = query_blocks(q.shape[1], q.shape[0] * q.shape[2] * k.shape[1] // (mesh.size if mesh else 1))
        if blocks == 1:
            return _attention(q, k, v, allowed, mesh)
        # Every blocks-th query is one block's, so that each device has its part of all blocks where tokens are spread.
        cut = (jnp.moveaxis(x.reshape(*x.shape[:i], -1, blocks, *x.shape[i + 1 :]), i + 1, 0) for i, x in ((1, q), (2, allowed)))
        block = jax.checkpoint(lambda part: _attention(part[0], k, v, part[1], mesh))
        y = jax.lax.map(block, tuple(cut))
        return jnp.moveaxis(y, 0, 2).reshape(q.shape)
    b, n_q, heads, h = q.shape
    kv = k.shape[2]
    scores = jnp.einsum("bqkgh,bskh->bkgqs", q.reshape(b, n_q, kv, heads // kv, h), k).astype(jnp.float32) * h**-0.5
    scores = jnp.where(allowed[:, :, None], scores, jnp.finfo(jnp.float32).min)
    probs = dropout(jax.nn.softmax(scores, axis=-1).astype(q.dtype), rate, rng)
    return jnp.einsum("bkgqs,bskh->bqkgh", probs, v).reshape(b, n_q, heads, h)


def _attention(q, k, v, allowed, mesh):
    """`attend` at once, of which the backward pass keeps no scores."""
    if (mesh.devices.flat[0].platform if mesh else jax.default_backend()) == "cpu":
        return _ordered(q, k, v, allowed)
    return kept_inputs(lambda *qkv: jax.nn.dot_product_attention(*qkv, mask=allowed), q, k, v)


@jax.custom_vjp
def _ordered(q, k, v, allowed):
    """The same with operands laid out once, [b,k,g,q,h] and [b,k,s,h], for products that XLA on CPU then runs as they are."""
    return _ordered_forward(q, k, v, allowed)[0]


def _product(x, y, axes, others):
    """Of float32 sums, over ``axes`` of x and ``others`` of y, for each b and k."""
    return jax.lax.dot_general(x, y, ((axes, others), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)


def _by_head(x, kv):
    """[b,q,k g,h] -> [b,k,g,q,h]."""
    return x.reshape(*x.shape[:2], kv, x.shape[2] // kv, x.shape[3]).transpose(0, 2, 3, 1, 4)


def _by_token(x):
    """[b,k,g,q,h] -> [b,q,k g,h]."""
    return x.transpose(0, 3, 1, 2, 4).reshape(x.shape[0], x.shape[3], -1, x.shape[4])


def _laid_out(q, k, v):
    return _by_head(q, k.shape[2]) * jnp.asarray(q.shape[-1] ** -0.5, q.dtype), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)


def _scores(q, k, allowed):
    """[b,k,g,q,s] in float32."""
    return jnp.where(allowed[:, :, None], _product(q, k, (4,), (3,)), LEAST)


def _ordered_forward(q, k, v, allowed):
    q_, k_, v_ = _laid_out(q, k, v)
    s = _scores(q_, k_, allowed)
    most = s.max(-1, keepdims=True)
    p = jnp.exp(s - most)
    total = p.sum(-1, keepdims=True)
    y = _by_token(_product(p.astype(v.dtype), v_, (4,), (2,)) / total).astype(q.dtype)
    return y, (q_, k_, v_, allowed, most, total)


def _ordered_backward(kept, dy):
    """With P = softmax(S) made again: dV = Pᵀ dY, dS = P (dP - sum(P dP)), dP = dY Vᵀ, dQ = dS K, dK = dSᵀ Q."""
    q, k, v, allowed, most, total = kept
    # What divides each row divides dY, which is narrower than the scores.
    dy = (_by_head(dy, k.shape[1]) / total).astype(v.dtype)
    p, dp = jnp.exp(_scores(q, k, allowed) - most), _product(dy, v, (4,), (3,))
    ds = jnp.where(most > LEAST, p * (dp - (p * dp).sum(-1, keepdims=True) / total), 0).astype(q.dtype)  # 0: a row's scores are all LEAST
    dq = _by_token(_product(ds, k, (4,), (2,)) * q.shape[-1] ** -0.5).astype(q.dtype)
    # [b,k,h,s]: XLA writes an operand that is contracted over rows turned, so the narrow one comes first.
    dk, dv = _product(q, ds, (2, 3), (2, 3)), _product(dy, p.astype(v.dtype), (2, 3), (2, 3))
    return dq, *(d.transpose(0, 3, 1, 2).astype(k.dtype) for d in (dk, dv)), None


_ordered.defvjp(_ordered_forward, _ordered_backward)
