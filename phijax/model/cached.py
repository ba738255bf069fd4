"""The decoder over a cache of keys and values: the same blocks as `decoder.py`, for inference.

Weights and cache are plain trees. Where layers are unrolled both are held a layer an array: a slice of a stack is a
copy, and at one token a step the copies are all of the time. Nothing here sets or reads a mesh in context: the weights
lie where they are used (`inference/placement.py`), and XLA carries their cuts through.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from phijax.model import params as model_params
from phijax.model.cached_ops import CachedOps
from phijax.model.config import ModelConfig
from phijax.model.decoder import Decoder
from phijax.model.inference_layout import InferenceLayout
from phijax.model.kernels.decode_tpu import empty
from phijax.model.kernels.integers_tpu import TpuIntegers
from phijax.model.kernels.rows import row_sum
from phijax.model.params import STACKED, Params
from phijax.model.quantized import Quantized
from phijax.model.rope import rope_table
from phijax.model.vocabulary import padded_logits, with_positions
from phijax.model.weights import WeightFormat, lookup

Weights = dict[str, Any]  # as Params, but "blocks" is a tuple of trees where layers are unrolled
HEAD = "head"
Cache = Any  # pieces as in `kernels/decode.py`: a tuple of these, one a layer, or one with L in front; or StackedCache


def laid_out(layout: InferenceLayout, path: str, leaf: Any, num_layers: int) -> Any:
    """A leaf as programs hold it: turned where `layout.transposed` says, a tuple of layers where they are unrolled.

    Args: leaf: as in Params, or a tuple of its layers.
    """

    def turned(one: Any) -> Any:
        return _swapped(one) if layout.transposed and _turns(path) else one

    if not layout.unrolled or not path.startswith(f"{STACKED}/"):
        return turned(leaf)
    layers = leaf if isinstance(leaf, tuple) else [jax.tree.map(lambda a, i=i: a[i], leaf) for i in range(num_layers)]
    return tuple(map(turned, layers))


def assembled(layout: InferenceLayout, leaves: Mapping[str, Any], num_layers: int) -> Weights:
    """Leaves by path, each `laid_out` -> the weights. A tied head is a leaf of its own where it is turned."""
    weights = model_params.nested(leaves)
    if not layout.unrolled:
        return weights

    def layer(i: int) -> Params:
        return jax.tree.map(lambda layers: layers[i], weights[STACKED], is_leaf=lambda leaf: isinstance(leaf, tuple))

    return {**weights, STACKED: tuple(map(layer, range(num_layers)))}


def _turned(blocks: Any) -> Any:
    """A layer's matrices as its modules have them, from as `laid_out` has them."""

    def turn(path, leaf):
        name = "/".join(step.key for step in path if isinstance(step, jax.tree_util.DictKey))
        return _swapped(leaf) if _turns(f"{STACKED}/{name}") else leaf

    return jax.tree_util.tree_map_with_path(turn, blocks, is_leaf=lambda leaf: isinstance(leaf, WeightFormat))


def _turns(path: str) -> bool:
    """Whether a leaf is a matrix that `project` contracts, the head among them."""
    leaf = model_params.any_leaves()[path]
    return path != "embedding" and leaf.kind is not None and leaf.summed == "d"


def _swapped(leaf: jax.Array | WeightFormat) -> jax.Array | WeightFormat:
    if isinstance(leaf, WeightFormat) and not isinstance(leaf, Quantized):
        return leaf  # made for its platform: it lies as it should
    return jax.tree.map(lambda a: jnp.swapaxes(a, -1, -2), leaf)


def empty_cache(c: ModelConfig, layout: InferenceLayout, rows: int, lengths: Sequence[int]) -> Cache:
    """A cache of `rows` rows in pieces of these lengths, all zero."""
    if layout.stacked:
        dtype = layout.dtype if layout.cache_dtype == "auto" else layout.cache_dtype
        return empty(c.num_layers, rows, c.num_kv_heads, sum(lengths), c.head_dim, dtype)

    def pieces(*layers: int):
        def zeros(length: int, width: int, dtype: str):
            shape = (*layers, rows, c.num_kv_heads, length, width)
            return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)

        if layout.cache_dtype == "int8":
            return tuple(zeros(n, c.head_dim, "int8") + zeros(n, 1, "bfloat16") for n in lengths)
        return tuple(zeros(n, c.head_dim, layout.dtype) for n in lengths)

    return tuple(pieces() for _ in range(c.num_layers)) if layout.unrolled else pieces(c.num_layers)


def hidden(
    c: ModelConfig,
    layout: InferenceLayout,
    weights: Weights,
    cache: Cache,
    tokens: jax.Array,
    positions: jax.Array,
    frequencies: jax.Array,
    attention_factor: float,
    count: jax.Array | None = None,
) -> tuple[jax.Array, Cache]:
    """New tokens of the cache's rows through all layers; their keys and values are written first.

    Args:
      tokens, positions: (B, T) int32, positions rising by one; what the cache holds at later places is not seen.
        Rows beyond those of the cache are surplus: computed, and nothing.
      frequencies: (B, R/2) float32, radians per token of each row; with `attention_factor`, as
        `rope.inverse_frequencies` gives them.
      count: how many rows count, each with bits of its own, see `kernels/rows.py`; None: no such promise.
    Returns: (B, T, D) after the final norm, and the cache.
    """
    rope = rope_table(c, positions, frequencies, attention_factor, layout.dtype, by_matmul=layout.rope_by_matmul)
    top = _module(c, layout, weights, _layer(weights, 0))
    x = lookup(top.embedding, tokens, layout.dtype)
    if top.position_embedding is not None:
        x = with_positions(x, top.position_embedding, positions)

    def body(x, layer, cache, number=None):
        ops = CachedOps(c, layout, rope, positions, count, number)
        return _module(c, layout, weights, layer).blocks(x, cache, ops)

    if layout.stacked:
        # Carried, not scanned over: what is scanned over is sliced and put together again, a copy of the cache.
        x, cache = jax.lax.fori_loop(
            0, c.num_layers, lambda i, both: body(both[0], _layer(weights, i), both[1], i), (x, cache)
        )
    elif layout.unrolled:
        new = []
        for layer, layer_cache in zip(weights[STACKED], cache, strict=True):
            x, layer_cache = body(x, layer, layer_cache)
            new.append(layer_cache)
        cache = tuple(new)
    else:
        x, cache = jax.lax.scan(lambda x, both: body(x, *both), x, (weights[STACKED], cache))
    return top.final_norm(x, None if count is None else row_sum), cache


def logits(c: ModelConfig, layout: InferenceLayout, weights: Weights, x: jax.Array) -> jax.Array:
    """(B, D) -> (B, padded V) float32, as `vocabulary.padded_logits`."""
    head = _module(c, layout, weights, _layer(weights, 0)).output
    return padded_logits(x, head, vocab_size=c.vocab_size)


def _layer(weights: Weights, number: int | jax.Array) -> Params:
    """One layer's weights. XLA fuses a slice of a stack into the product that reads it."""
    blocks = weights[STACKED]
    if isinstance(blocks, tuple):
        return blocks[number]

    def of_layer(leaf):
        if isinstance(leaf, TpuIntegers):
            return leaf.of_layer(number)
        return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, number, keepdims=False), leaf)

    return jax.tree.map(of_layer, blocks, is_leaf=lambda leaf: isinstance(leaf, TpuIntegers))


def _module(c: ModelConfig, layout: InferenceLayout, weights: Weights, layer: Params) -> Decoder:
    """A Decoder whose `blocks` are one layer's. XLA reads a transposed leaf where it lies."""
    if layout.transposed:
        weights, layer = {**weights, HEAD: _swapped(weights[HEAD])}, _turned(layer)
        c = dataclasses.replace(c, tied_head=False)
    return model_params.module(c, {**weights, STACKED: layer})
