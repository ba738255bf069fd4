"""Attention in blocks of query rows with its own gradient: what is fast on CPU.

A block of rows needs no key after its end and none before its window, so half the square is never computed; a row is
whole, so no running softmax is needed; the backward pass recomputes scores from the log-sum-exp. Measured at 512
tokens: forward and backward 102 ms a layer against 211 ms for the dense form.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from phijax.model.kernels.dense import MASKED
from phijax.model.mask import Mask, causal_window, visible

BLOCK = 64


def blocked_attention(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, *, mask: Mask) -> jax.Array:
    """The same function as `dense_attention`: q (B, N, T, H), k and v (B, K, T, H) -> (B, N, T, H)."""
    b, n, t, h = q.shape
    kv_heads = k.shape[1]
    grouped = q.reshape(b, kv_heads, n // kv_heads, t, h)
    return _attend(grouped, k, v, segment_ids, mask).reshape(b, n, t, h)


def _blocks(length: int, mask: Mask) -> list[tuple[slice, slice]]:
    """(rows, keys) of each block: the keys that at least one of its rows may see."""
    blocks, window = [], causal_window(mask, "blocked")
    for start in range(0, length, BLOCK):
        end = min(start + BLOCK, length)
        first = 0 if window is None else max(0, start - window + 1)
        blocks.append((slice(start, end), slice(first, end)))
    return blocks


def _seen(mask: Mask, rows: slice, keys: slice, segment_ids: jax.Array) -> jax.Array:
    """(B, 1, 1, rows, keys)."""
    row_index, key_index = np.arange(rows.start, rows.stop), np.arange(keys.start, keys.stop)
    return visible(mask, row_index, key_index, segment_ids[:, rows], segment_ids[:, keys])[:, None, None]


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    return jnp.einsum("bkgth,bksh->bkgts", q, k, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, segment_ids, mask):
    return _forward(q, k, v, segment_ids, mask)[0]


def _forward(q, k, v, segment_ids, mask):
    """q: (B, K, G, T, H); k, v: (B, K, T, H)."""
    outs, logsumexps = [], []
    for rows, keys in _blocks(q.shape[3], mask):
        seen = _seen(mask, rows, keys, segment_ids)
        scores = jnp.where(seen, _scores(q[:, :, :, rows], k[:, :, keys]), MASKED)
        highest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - highest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out = jnp.einsum("bkgts,bksh->bkgth", weights.astype(v.dtype), v[:, :, keys])
        outs.append((out / total).astype(q.dtype))
        logsumexps.append(highest + jnp.log(total))
    out = jnp.concatenate(outs, axis=3)
    return out, (q, k, v, segment_ids, out, jnp.concatenate(logsumexps, axis=3))


def _backward(mask, saved, d_out):
    q, k, v, segment_ids, out, logsumexp = saved
    delta = jnp.sum((d_out * out).astype(jnp.float32), axis=-1, keepdims=True)  # (B, K, G, T, 1)
    d_q, d_k, d_v = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for rows, keys in _blocks(q.shape[3], mask):
        q_rows, d_rows = q[:, :, :, rows], d_out[:, :, :, rows]
        seen = _seen(mask, rows, keys, segment_ids)
        p = jnp.where(seen, jnp.exp(_scores(q_rows, k[:, :, keys]) - logsumexp[:, :, :, rows]), 0.0)
        d_p = jnp.einsum("bkgth,bksh->bkgts", d_rows, v[:, :, keys], preferred_element_type=jnp.float32)
        d_s = (p * (d_p - delta[:, :, :, rows])).astype(q.dtype)
        d_q.append(jnp.einsum("bkgts,bksh->bkgth", d_s, k[:, :, keys]))
        d_k = d_k.at[:, :, keys].add(jnp.einsum("bkgts,bkgth->bksh", d_s, q_rows, preferred_element_type=jnp.float32))
        d_v = d_v.at[:, :, keys].add(
            jnp.einsum("bkgts,bkgth->bksh", p.astype(q.dtype), d_rows, preferred_element_type=jnp.float32)
        )
    no_gradient = np.zeros(segment_ids.shape, jax.dtypes.float0)
    return jnp.concatenate(d_q, axis=3), d_k.astype(k.dtype), d_v.astype(v.dtype), no_gradient


_attend.defvjp(_forward, _backward)
