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
        q = project(x, self.q, heads=c.num_heads)
        k = project(x, self.k, heads=c.num_kv_heads)
        v = project(x, self.v, heads=c.num_kv_heads)
        q = apply_rope(q, rope, c, by_matmul=backend.rope_by_matmul)
        k = apply_rope(k, rope, c, by_matmul=backend.rope_by_matmul)
        q, k, v = (
            checkpoint_name(sharding.constrain(a, layout), name) for a, name in ((q, "query"), (k, "key"), (v, "value"))
        )
        out = ATTENTION[backend.attention](q, k, v, segment_ids, window=c.sliding_window)
        return project_back(checkpoint_name(out, "attention"), self.o, heads=c.num_heads)
