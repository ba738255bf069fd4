"""A block over a cache of keys and values, for inference; several terms in one call where the weights' format has one.

A call of the int4 kernel is taken for *terms*, never for a configuration: the activation is the function that the
kernel computes, and so is the norm; there is a gate, there is no bias, and the weights are in its form. All other terms
are evaluated one by one: products are still the format's own, attention is XLA's.
"""

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from phijax.model.attention import Attention
from phijax.model.config import ModelConfig
from phijax.model.inference_layout import InferenceLayout
from phijax.model.kernels import cpu_int4
from phijax.model.kernels.decode import attention_cut_by_time, cached_attention, write
from phijax.model.kernels.rows import kept_apart, row_sum
from phijax.model.kernels.stacked import stacked_attention
from phijax.model.mask import Mask
from phijax.model.ops import Ops
from phijax.model.terms import Activated, Normed, Product, Term
from phijax.model.weights import contract


class CachedOps(Ops):
    """New tokens (B, T) of the cache's rows; `state` is a layer's cache, or the stack of all."""

    def __init__(
        self,
        c: ModelConfig,
        layout: InferenceLayout,
        rope: tuple[jax.Array, jax.Array],
        positions: jax.Array,
        count: jax.Array | None,
        layer: jax.Array | None = None,
    ) -> None:
        """positions, count: as `cached.hidden` takes them; layer: () int32, which of a stack this is."""
        super().__init__(c, rope, rope_by_matmul=layout.rope_by_matmul)
        self.layout, self.positions, self.count, self.layer = layout, positions, count, layer
        self.row_sum = None if count is None else row_sum
        # How many rows of (B T, D) count; of a prompt's, whose `count` is of rows of the batch, all do.
        self.tokens = count if positions.shape[1] == 1 else None

    def norm(self, x: jax.Array, norm: nnx.Module) -> jax.Array:
        return norm(x, self.row_sum)

    def products(self, h: Term, weights: Sequence[nnx.Param]) -> list[jax.Array]:
        """A product sees (B T, D): one on every backend, in whatever format; the results are (B, T, rows)."""
        forms = [w.get_value() for w in weights]
        if all(cpu_int4.alike(form, forms[0]) for form in forms):
            x, norm = self._norm_apart(h)
            return cpu_int4.products(x, forms, norm=norm, count=self.tokens)
        x = self.value(h)
        return [contract(x.reshape(-1, x.shape[-1]), w).reshape(*x.shape[:-1], -1) for w in weights]

    def add(self, x: jax.Array, term: Term) -> jax.Array:
        match term:
            case Product(Activated(f, Product(h, up, None), Product(_, gate, None)), down, None) if (
                f is cpu_int4.GATED_WITH and _in_one_call(gate, up, down)
            ):
                h, norm = self._norm_apart(h)
                forms = (w.get_value() for w in (gate, up, down))
                return cpu_int4.gated(h, *forms, norm=norm, residual=x, count=self.tokens)
            case Product(h, w, None) if isinstance(form := w.get_value(), cpu_int4.Tiled):
                return cpu_int4.products(self.value(h), [form], residual=x, count=self.tokens)[0]
        return super().add(x, term)

    def _norm_apart(self, h: Term) -> tuple[jax.Array, cpu_int4.Norm | None]:
        """h as an array and a norm that the int4 kernel makes of it; no norm where that is not the kernel's."""
        match h:
            case Normed(x, norm) if type(norm).__call__ is cpu_int4.NORMED_WITH:
                return x, cpu_int4.Norm(norm.scale[...], norm.eps)
        return self.value(h), None

    def attention(self, h: Term, a: Attention, mask: Mask, state: Any) -> tuple[Term, Any]:
        form, scale = a.q.get_value(), self.c.attention_scale
        if self.layout.cut_by_time is not None or not cpu_int4.attends(form, self.layout.dtype, state, scale, mask):
            return super().attention(h, a, mask, state)
        q, k, v = self.flat_heads(h, a)
        table = tuple(part[:, 0] for part in self.rope)
        places = self.positions[:, 0]
        return cpu_int4.attend(q, k, v, table, state, places, self.count, mask=mask, path=form.path)

    def kernel(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, state: Any) -> tuple[jax.Array, Any]:
        layout = self.layout
        if self.count is not None:
            # Of a rotation that is fused with what comes next the bits depend on the shape.
            q, k = kept_apart((q, k), self.count)
        if layout.stacked:
            return stacked_attention(
                q, k, v, state, self.layer, self.positions, mask=mask, mesh=layout.mesh, interpret=layout.interpret
            )
        state = write(state, k, v, self.positions[:, 0], cut_by_time=layout.cut_by_time is not None)
        if layout.cut_by_time is None:
            return cached_attention(q, state, self.positions, mask=mask, row_sum=self.row_sum), state
        return attention_cut_by_time(q, state, self.positions, mask=mask, mesh=layout.cut_by_time), state


def _in_one_call(gate: nnx.Param, up: nnx.Param, down: nnx.Param) -> bool:
    return cpu_int4.alike(gate.get_value(), up.get_value()) and isinstance(down.get_value(), cpu_int4.Tiled)
