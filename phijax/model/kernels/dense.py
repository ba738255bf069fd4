"""Attention written out in full: the reference every other path is tested against."""

import jax
import jax.numpy as jnp

from phijax.model.mask import Mask, visible

# A finite stand-in for -inf: a row of -inf alone would make the softmax NaN.
MASKED = -1e30


def dense_attention(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, *, mask: Mask) -> jax.Array:
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
    seen = visible(mask, index, index, segment_ids, segment_ids)[:, None, None]  # (B, 1, 1, T, S)
    grouped = q.reshape(b, kv_heads, n // kv_heads, t, h)
    scores = jnp.einsum("bkgth,bksh->bkgts", grouped, k, preferred_element_type=jnp.float32)
    probabilities = jax.nn.softmax(jnp.where(seen, scores, MASKED), axis=-1)
    out = jnp.einsum("bkgts,bksh->bkgth", probabilities.astype(v.dtype), v)
    return out.reshape(b, n, t, h)
