"""The gated feed-forward layer."""

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from phijax.model import int8_products
from phijax.model.config import ModelConfig
from phijax.model.weights import project, project_back, weight


class Mlp(nnx.Module):
    """SwiGLU: (..., D) -> (..., D). Shazeer 2020, arXiv:2002.05202."""

    def __init__(self, c: ModelConfig):
        into, back = c.model_dim**-0.5, c.residual_std(c.ffn_dim)
        self.gate = weight((c.ffn_dim, c.model_dim), ("ffn", "embed"), std=into)
        self.up = weight((c.ffn_dim, c.model_dim), ("ffn", "embed"), std=into)
        self.down = weight((c.ffn_dim, c.model_dim), ("ffn", "embed"), std=back)

    def __call__(self, x: jax.Array, *, int8: bool = False) -> jax.Array:
        """int8: products of rounded factors, see `int8_products.py`."""
        into, back = (int8_products.project, int8_products.project_back) if int8 else (project, project_back)
        gate = checkpoint_name(into(x, self.gate), "gate")
        up = checkpoint_name(into(x, self.up), "up")
        return back(checkpoint_name(jax.nn.silu(gate) * up, "activation"), self.down)
