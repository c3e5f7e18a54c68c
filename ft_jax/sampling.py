"""What a language model says: tokens drawn one after the other, with a cache of keys and values, as one compiled program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ft_jax.errors import UserError
from ft_jax.models import DTYPES, layers


def empty(model, rows, size):
    """A cache for ``size`` tokens of each row: keys, values [layers, B, size, kv heads, head dim], which are real, how many there are."""
    c = model.config
    shape = (c.num_layers, rows, size, c.num_kv_heads, c.head_dim)
    return {"k": jnp.zeros(shape, DTYPES[model.dtype]), "v": jnp.zeros(shape, DTYPES[model.dtype]),
            "real": jnp.zeros((rows, size), bool), "at": jnp.zeros((), jnp.int32)}  # fmt: skip


def narrowed(logits, top_k=0, top_p=1.0):
    """Logits [B,V] with -inf for what is not drawn: all but the ``top_k`` largest (0: none is left out), then all but the fewest
    tokens whose probabilities sum to ``top_p`` (nucleus sampling, arXiv:1904.09751)."""
    if top_k:
        least = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p < 1.0:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(ordered), axis=-1) - jax.nn.softmax(ordered)
        least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


@functools.partial(jax.jit, static_argnames=("model", "new", "ends", "temperature", "top_k", "top_p"))
def _generate(model, params, ids, mask, key, extra, *, new, ends, temperature, top_k, top_p):
    rows, length = ids.shape
    real = mask > 0
    inputs = {"input_ids": ids, "attention_mask": mask, "positions": jnp.maximum(jnp.cumsum(mask, 1) - 1, 0), **extra}
    logits, cache = model.follow(params, inputs, empty(model, rows, length + new))

    def draw(logits, step):
        if not temperature:
            return logits.argmax(-1).astype(jnp.int32)
        return jax.random.categorical(jax.random.fold_in(key, step), narrowed(logits / temperature, top_k, top_p)).astype(jnp.int32)

    def noted(step, logits, out, done):
        token = jnp.where(done, 0, draw(logits, step))
        done |= jnp.isin(token, jnp.asarray(ends, jnp.int32)) if ends else False
        return step + 1, token, out.at[:, step].set(token), done

    def body(carry):
        step, token, out, done, cache = carry
        inputs = {"input_ids": token[:, None], "positions": (real.sum(1) + step - 1)[:, None], **extra}
        logits, cache = model.follow(params, inputs, cache)
        return *noted(step, logits, out, done), cache

    params = _in_pieces(params)
    start = *noted(jnp.zeros((), jnp.int32), logits, jnp.zeros((rows, new), jnp.int32), jnp.zeros(rows, bool)), cache
    step, _, out, _, _ = jax.lax.while_loop(lambda c: (c[0] < new) & ~c[3].all(), body, start)
    return out, step


def _in_pieces(params):
    """``params`` as the loop over tokens reads them fastest: on a CPU layers `apart`, which costs the memory of another copy."""
    return layers.apart(params) if jax.default_backend() == "cpu" and "taps" not in params else params


def generate(model, params, prompts, *, max_new_tokens, ends=(), temperature=0.0, top_k=0, top_p=1.0, seed=0, tasks=None):
    """Continues each of ``prompts`` (lists of token ids) by up to ``max_new_tokens`` tokens; returns a list of lists of ids.

    A row ends after a token of ``ends``, which it keeps. temperature 0 takes the likeliest token, else tokens are drawn from
    softmax(logits / temperature), cut to ``top_k`` and ``top_p``. Any kernels and layer taps; one program for each shape
    (prompts are padded on the left to a multiple of 16).
    Raises UserError for empty prompts, for more positions than the model has, and for settings out of range.
    """
    longest = max(map(len, prompts), default=0)
    if not longest or min(map(len, prompts)) == 0:
        raise UserError("generation needs at least one token in each prompt")
    if max_new_tokens < 1 or temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise UserError(f"generation takes max_new_tokens >= 1, temperature >= 0, top_k >= 0 and 0 < top_p <= 1, not {max_new_tokens}, "
                        f"{temperature}, {top_k}, {top_p}")  # fmt: skip
    if longest + max_new_tokens > model.config.positions:
        raise UserError(f"{longest} tokens of prompt and {max_new_tokens} new ones are more than the {model.config.positions} positions of this model")
    length = -(-longest // 16) * 16
    ids, mask = np.zeros((2, len(prompts), length), np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :], mask[row, length - len(prompt) :] = prompt, 1
    extra = {} if tasks is None else {"tasks": jnp.asarray(tasks, jnp.int32)}
    out, step = _generate(model, params, ids, mask, jax.random.key(seed), extra, new=max_new_tokens, ends=tuple(ends), temperature=float(temperature),
                          top_k=int(top_k), top_p=float(top_p))  # fmt: skip
    rows = []
    for row in np.asarray(out)[:, : int(step)].tolist():
        end = next((i for i, token in enumerate(row) if token in ends), len(row) - 1)
        rows.append(row[: end + 1])
    return rows
