"""A block in training and evaluation: laid out over the mesh, with names for what the backward pass may save."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from phijax.model import int8_products
from phijax.model.attention import Attention
from phijax.model.backend import ATTENTION, Backend
from phijax.model.config import ModelConfig
from phijax.model.mask import Mask
from phijax.model.ops import Ops
from phijax.model.terms import Joined, Product, Term
from phijax.model.weights import contract, plus, project, project_back
from phijax.parallel import sharding

HEADS = ("act_batch", "act_heads", "act_time", None)
RESIDUAL = ("act_batch", "act_time", "act_embed")
LAYOUTS = {"query": HEADS, "key": HEADS, "value": HEADS, "mid": RESIDUAL, "out": RESIDUAL}  # others follow from these


class TrainingOps(Ops):
    """Packed rows (B, T) through the backend's kernel."""

    def __init__(
        self, c: ModelConfig, rope: tuple[jax.Array, jax.Array], segment_ids: jax.Array, backend: Backend
    ) -> None:
        super().__init__(c, rope, rope_by_matmul=backend.rope_by_matmul)
        self.segment_ids, self.backend = segment_ids, backend

    def mark(self, name: str, x: jax.Array) -> jax.Array:
        return checkpoint_name(sharding.constrain(x, LAYOUTS[name]) if name in LAYOUTS else x, name)

    def value(self, term: Term) -> jax.Array:
        match term:
            case Product(Joined(heads), w, bias) if self.backend.flat_tokens:
                return plus(contract(heads.swapaxes(1, 2).reshape(-1, w.shape[0]), w), bias)
            case Product(Joined(heads), w, bias):
                # Split or joined in the contraction, heads are no copy, see `project`.
                return plus(project_back(heads, w, heads=heads.shape[1]), bias)
        return super().value(term)

    def heads(self, h: Term, a: Attention) -> tuple[jax.Array, jax.Array, jax.Array]:
        x = self.value(h)

        def of(w: nnx.Param, bias: nnx.Param | None, heads: int) -> jax.Array:
            if self.backend.flat_tokens:
                flat = plus(contract(x.reshape(-1, x.shape[-1]), w), bias)
                return flat.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)
            return plus(project(x, w, heads=heads), bias, heads=heads)

        n, k = self.c.num_heads, self.c.num_kv_heads
        return of(a.q, a.q_bias, n), of(a.k, a.k_bias, k), of(a.v, a.v_bias, k)

    def products(self, h: Term, weights: Sequence[nnx.Param]) -> Iterator[jax.Array]:
        """Of the feed-forward layer: attention's are split and joined by heads. Each is made when it is asked for."""
        x = self.value(h)
        if self.backend.flat_tokens:
            x = x.reshape(-1, x.shape[-1])
        product = int8_products.contract if self.backend.mlp_products == "int8" else contract
        return (product(x, w) for w in weights)

    def kernel(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, state: Any) -> tuple[jax.Array, Any]:
        return ATTENTION[self.backend.attention](q, k, v, self.segment_ids, mask=mask), state
