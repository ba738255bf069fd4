"""Attention written out in full: the reference every other path is tested against."""

import jax
import jax.numpy as jnp

# A finite stand-in for -inf: a row of -inf alone would make the softmax NaN.
MASKED = -1e30


def visible(
    query_index: jax.Array, key_index: jax.Array, query_segments: jax.Array, key_segments: jax.Array, window: int | None
) -> jax.Array:
    """Which keys a query sees: its own segment, not the future, at most `window` keys, itself included.

    Args:
      query_index, key_index: (T,) and (S,) int32, places in the row.
      query_segments, key_segments: (B, T) and (B, S) int32.
    Returns: (B, T, S) bool. A query always sees itself, so no row is empty, padding (segment 0) included.
    """
    distance = query_index[:, None] - key_index[None, :]
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    return seen[None] & (query_segments[:, :, None] == key_segments[:, None, :])


def dense_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, *, window: int | None
) -> jax.Array:
    """softmax(q k^T) v over the visible keys; scores and softmax in float32. The factor 1/sqrt(H) is in q already.

    Vaswani et al. 2017, arXiv:1706.03762, eq. 1; grouped heads: Ainslie et al. 2023, arXiv:2305.13245.

    Args:
      q: (B, N, T, H), scaled; k, v: (B, K, T, H), N a multiple of K.
      segment_ids: (B, T) int32.
    Returns: (B, N, T, H) in q.dtype.
    """
    b, n, t, h = q.shape
    kv_heads = k.shape[1]
    index = jnp.arange(t)
    mask = visible(index, index, segment_ids, segment_ids, window)[:, None, None]  # (B, 1, 1, T, S)
    grouped = q.reshape(b, kv_heads, n // kv_heads, t, h)
    scores = jnp.einsum("bkgth,bksh->bkgts", grouped, k, preferred_element_type=jnp.float32)
    probabilities = jax.nn.softmax(jnp.where(mask, scores, MASKED), axis=-1)
    out = jnp.einsum("bkgts,bksh->bkgth", probabilities.astype(v.dtype), v)
    return out.reshape(b, n, t, h)
