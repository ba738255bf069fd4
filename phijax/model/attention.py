"""The attention layer: projections, rotation, and the backend's kernel."""

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from phijax.model.backend import ATTENTION, Backend
from phijax.model.config import ModelConfig
from phijax.model.rope import apply_rope
from phijax.model.weights import project, project_back, weight
from phijax.parallel import sharding


class Attention(nnx.Module):
    """Causal self-attention with grouped heads: (B, T, D) -> (B, T, D)."""

    def __init__(self, c: ModelConfig):
        rows, kv_rows, std = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.model_dim**-0.5
        self.q = weight((rows, c.model_dim), ("heads", "embed"), std)
        self.k = weight((kv_rows, c.model_dim), ("kv_heads", "embed"), std)
        self.v = weight((kv_rows, c.model_dim), ("kv_heads", "embed"), std)
        self.o = weight((rows, c.model_dim), ("heads", "embed"), c.residual_std(rows))
        self.c = c

    def __call__(
        self, x: jax.Array, rope: tuple[jax.Array, jax.Array], segment_ids: jax.Array, backend: Backend
    ) -> jax.Array:
        c = self.c
        layout = ("act_batch", "act_heads", "act_time", None)
        split = _split_flat if backend.flat_tokens else project
        q = split(x, self.q, heads=c.num_heads)
        k = split(x, self.k, heads=c.num_kv_heads)
        v = split(x, self.v, heads=c.num_kv_heads)
        # The softmax's factor goes in here: part of the rotation's pass, and what is saved is what the kernels read.
        q = apply_rope(q, rope, c, by_matmul=backend.rope_by_matmul) * c.head_dim**-0.5
        k = apply_rope(k, rope, c, by_matmul=backend.rope_by_matmul)
        q, k, v = (
            checkpoint_name(sharding.constrain(a, layout), name) for a, name in ((q, "query"), (k, "key"), (v, "value"))
        )
        out = ATTENTION[backend.attention](q, k, v, segment_ids, window=c.sliding_window)
        out = checkpoint_name(out, "attention")
        return _join_flat(out, self.o) if backend.flat_tokens else project_back(out, self.o, heads=c.num_heads)


def _split_flat(x: jax.Array, w: nnx.Param, *, heads: int) -> jax.Array:
    """`project` into heads for Backend.flat_tokens: (B, T, D) -> (B, N, T, H)."""
    b, t, d = x.shape
    return project(x.reshape(-1, d), w).reshape(b, t, heads, -1).swapaxes(1, 2)


def _join_flat(h: jax.Array, w: nnx.Param) -> jax.Array:
    """`project_back` from heads for Backend.flat_tokens: (B, N, T, H) -> (B, T, D)."""
    b, n, t, size = h.shape
    return project_back(h.swapaxes(1, 2).reshape(-1, n * size), w).reshape(b, t, -1)
