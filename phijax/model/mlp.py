"""The gated feed-forward layer."""

from collections.abc import Callable

import jax
from flax import nnx

from phijax.model.config import ModelConfig
from phijax.model.terms import Gated, Product, Term
from phijax.model.weights import normal, weight

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"silu": jax.nn.silu}


class Mlp(nnx.Module):
    """SwiGLU: (..., D) -> (..., D). Shazeer 2020, arXiv:2002.05202."""

    def __init__(self, c: ModelConfig):
        into, back = normal(c.model_dim**-0.5), normal(c.residual_std(c.ffn_dim))
        self.gate = weight((c.ffn_dim, c.model_dim), ("ffn", "embed"), into, kind="gate_up")
        self.up = weight((c.ffn_dim, c.model_dim), ("ffn", "embed"), into, kind="gate_up")
        self.down = weight((c.ffn_dim, c.model_dim), ("ffn", "embed"), back, kind="down", summed="rows")

    def __call__(self, h: Term) -> Product:
        return Product(Gated(ACTIVATIONS["silu"], h, self.gate, self.up), self.down)
