"""The attention layer's weights; what is computed with them stands in `ops.Ops.attention`."""

from flax import nnx

from phijax.model.config import ModelConfig
from phijax.model.weights import bias_of, normal, weight


class Attention(nnx.Module):
    """Self-attention with grouped heads."""

    def __init__(self, c: ModelConfig):
        rows, kv_rows = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        into, back = normal(c.model_dim**-0.5), normal(c.residual_std(rows))
        self.q = weight((rows, c.model_dim), ("heads", "embed"), into, kind="qkv")
        self.k = weight((kv_rows, c.model_dim), ("kv_heads", "embed"), into, kind="qkv")
        self.v = weight((kv_rows, c.model_dim), ("kv_heads", "embed"), into, kind="qkv")
        self.o = weight((rows, c.model_dim), ("heads", "embed"), back, kind="o", summed="rows")
        self.q_bias = bias_of(rows, "heads") if c.bias else None
        self.k_bias = bias_of(kv_rows, "kv_heads") if c.bias else None
        self.v_bias = bias_of(kv_rows, "kv_heads") if c.bias else None
        self.o_bias = bias_of(c.model_dim, "embed") if c.bias else None
