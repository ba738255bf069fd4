"""The feed-forward layer."""

import functools
from collections.abc import Callable

import jax
from flax import nnx

from phijax.model.config import Activation, ModelConfig
from phijax.model.terms import Activated, Product, Term
from phijax.model.weights import bias_of, normal, weight

ACTIVATIONS: dict[Activation, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),  # Hendrycks and Gimpel 2016, arXiv:1606.08415
}


class Mlp(nnx.Module):
    """f(x gate) * (x up) down, with silu SwiGLU (Shazeer 2020, arXiv:2002.05202); without a gate f(x up) down.

    (..., D) -> (..., D). Only what is multiplied with a gate is proportional to `up`, so that down's inputs are.
    """

    def __init__(self, c: ModelConfig):
        into, back = normal(c.model_dim**-0.5), normal(c.residual_std(c.ffn_dim))
        shape, axes, feeds = (c.ffn_dim, c.model_dim), ("ffn", "embed"), "down" if c.gated else None
        self.gate = weight(shape, axes, into, kind="gate_up") if c.gated else None
        self.up = weight(shape, axes, into, kind="gate_up", feeds=feeds)
        self.down = weight(shape, axes, back, kind="down", summed="rows")
        self.gate_bias = bias_of(c.ffn_dim, "ffn") if c.gated and c.bias else None
        self.up_bias = bias_of(c.ffn_dim, "ffn", feeds=feeds) if c.bias else None
        self.down_bias = bias_of(c.model_dim, "embed") if c.bias else None
        self.activation = c.activation

    def __call__(self, h: Term) -> Product:
        gate = None if self.gate is None else Product(h, self.gate, self.gate_bias)
        activated = Activated(ACTIVATIONS[self.activation], Product(h, self.up, self.up_bias), gate)
        return Product(activated, self.down, self.down_bias)
