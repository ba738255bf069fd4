"""How a block's terms are evaluated: plainly, term by term. The others override what they compute in another way."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from phijax.model.attention import Attention
from phijax.model.config import ModelConfig
from phijax.model.kernels.dense import dense_attention
from phijax.model.mask import Mask
from phijax.model.rope import apply_rope
from phijax.model.terms import Activated, Joined, Normed, Product, Term
from phijax.model.weights import contract, plus


class Ops:
    """The reference: whole rows of one document each, no cache (state None), attention written out in full."""

    def __init__(self, c: ModelConfig, rope: tuple[jax.Array, jax.Array], *, rope_by_matmul: bool = False):
        """rope: cos and sin, as `rope.rope_table` gives them."""
        self.c, self.rope, self.rope_by_matmul = c, rope, rope_by_matmul

    def attention(self, h: Term, a: Attention, mask: Mask, state: Any) -> tuple[Term, Any]:
        """softmax(q k^T scale) v of h (B, T, D): what o is multiplied with, and the state anew.

        Rotation and the softmax's factor stand here, once. The factor goes into the queries: part of the rotation's
        pass, and what is saved for the backward pass is what the kernels read.
        """
        q, k, v = self.heads(h, a)
        q = apply_rope(q, self.rope, self.c, by_matmul=self.rope_by_matmul) * self.c.attention_scale
        k = apply_rope(k, self.rope, self.c, by_matmul=self.rope_by_matmul)
        q, k, v = self.mark("query", q), self.mark("key", k), self.mark("value", v)
        out, state = self.kernel(q, k, v, mask, state)
        return Joined(self.mark("attention", out)), state

    def add(self, x: jax.Array, term: Term) -> jax.Array:
        """The residual stream x (B, T, D) and what a layer writes into it."""
        return x + self.value(term).reshape(x.shape)

    def value(self, term: Term) -> jax.Array:
        match term:
            case Normed(x, norm):
                return self.norm(x, norm)
            case Joined(heads):
                return heads.swapaxes(1, 2).reshape(heads.shape[0], heads.shape[2], -1)
            case Product(h, w, bias):
                (out,) = self.products(h, (w,))
                return plus(out, bias)
            case Activated(f, up, None):
                return self.mark("activation", f(self.mark("up", self.value(up))))
            case Activated(f, up, gate):
                both = zip(("gate", "up"), (gate, up), self.products(up.h, (gate.weight, up.weight)), strict=True)
                gate, up = (self.mark(name, plus(x, product.bias)) for name, product, x in both)
                return self.mark("activation", f(gate) * up)
        return term

    # What others compute in another way.

    def mark(self, name: str, x: jax.Array) -> jax.Array:
        """x under a name that training may save it by, laid out over the mesh."""
        del name
        return x

    def norm(self, x: jax.Array, norm: nnx.Module) -> jax.Array:
        return norm(x)

    def products(self, h: Term, weights: Sequence[nnx.Param]) -> Iterable[jax.Array]:
        """h by each of several weights that are given the same; biases are not in it."""
        x = self.value(h)
        return [contract(x, w) for w in weights]

    def heads(self, h: Term, a: Attention) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q (B, N, T, H), k and v (B, K, T, H)."""
        q, k, v = self.flat_heads(h, a)
        return split(q, self.c.num_heads), split(k, self.c.num_kv_heads), split(v, self.c.num_kv_heads)

    def flat_heads(self, h: Term, a: Attention) -> tuple[jax.Array, ...]:
        """q (B, T, N H), k and v (B, T, K H)."""
        products = self.products(h, (a.q, a.k, a.v))
        return tuple(plus(x, bias) for x, bias in zip(products, (a.q_bias, a.k_bias, a.v_bias), strict=True))

    def kernel(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, state: Any) -> tuple[jax.Array, Any]:
        """Attention of rotated heads, q scaled: (B, N, T, H), and the state anew."""
        one_document = jnp.ones((q.shape[0], q.shape[2]), jnp.int32)
        return dense_attention(q, k, v, one_document, mask=mask), state


def split(x: jax.Array, heads: int) -> jax.Array:
    """(B, T, N H) -> (B, N, T, H)."""
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)
