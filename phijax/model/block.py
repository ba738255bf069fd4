"""What a block computes: said once, for training, inference and calibration.

No backend, cache, loop or format of weights stands here. `ops` evaluates the terms: `ops.py` plainly, `training_ops.py`
and `cached_ops.py` in their ways. Whoever calls a block loops over the layers.
"""

from typing import Any

import jax
from flax import nnx

from phijax.model.attention import Attention
from phijax.model.config import ModelConfig
from phijax.model.mlp import Mlp
from phijax.model.norm import make_norm
from phijax.model.ops import Ops
from phijax.model.terms import Normed, Product


class Block(nnx.Module):
    """Pre-norm residual block: (B, T, D) -> (B, T, D)."""

    def __init__(self, c: ModelConfig):
        self.attention_norm = make_norm(c, feeds="qkv")
        self.attention = Attention(c)
        self.mlp_norm = make_norm(c, feeds="gate_up")
        self.mlp = Mlp(c)
        self.mask = c.mask

    def __call__(self, x: jax.Array, state: Any, ops: Ops) -> tuple[jax.Array, Any]:
        """state: what attention reads and gives anew, a layer's cache; None without one."""
        out, state = ops.attention(Normed(x, self.attention_norm), self.attention, self.mask, state)
        x = ops.mark("mid", ops.add(x, Product(out, self.attention.o, self.attention.o_bias)))
        x = ops.mark("out", ops.add(x, self.mlp(Normed(x, self.mlp_norm))))
        return x, state
