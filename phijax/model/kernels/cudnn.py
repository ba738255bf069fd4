"""Attention on NVIDIA GPUs: cuDNN's flash kernel through jax.nn."""

from typing import Literal

import jax
import jax.numpy as jnp

from phijax.model.mask import Mask, causal_window, visible


def cudnn_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    *,
    mask: Mask,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """The same function as `dense_attention`: q (B, N, T, H), k and v (B, K, T, H) -> (B, N, T, H).

    cuDNN runs in bfloat16 or float16 only. Causality and window go to the kernel; packing goes in as a mask.
    `implementation="xla"` gives jax.nn the same arguments on any backend, for tests.
    """
    index = jnp.arange(q.shape[2])
    window = causal_window(mask, "cudnn")
    seen = visible(mask, index, index, segment_ids, segment_ids)[:, None]  # (B, 1, T, S)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))  # jax.nn wants (B, T, N, H)
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=seen,
        scale=1.0,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )
    return jnp.swapaxes(out, 1, 2)
