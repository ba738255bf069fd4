"""The decoder over a cache of keys and values: the same blocks as `decoder.py`, for inference.

Weights and cache are plain trees. Where layers are unrolled both are held a layer an array: a slice of a stack is a
copy, and at one token a step the copies are all of the time. Nothing here sets or reads a mesh in context: the weights
lie where they are used (`inference/placement.py`), and XLA carries their cuts through.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from phijax.model import joined
from phijax.model import params as model_params
from phijax.model.config import ModelConfig
from phijax.model.decoder import Block, Decoder
from phijax.model.kernels.decode import attention_cut_by_time, cached_attention, write
from phijax.model.kernels.decode_tpu import empty
from phijax.model.kernels.integers_tpu import TpuIntegers
from phijax.model.kernels.rows import kept_apart, row_sum
from phijax.model.kernels.stacked import stacked_attention
from phijax.model.params import STACKED, Params
from phijax.model.quantized import Quantized
from phijax.model.rope import apply_rope
from phijax.model.weights import WeightFormat, lookup

Weights = dict[str, Any]  # as Params, but "blocks" is a tuple of trees where layers are unrolled
HEAD = "head"
PROJECTED = frozenset({"q", "k", "v", "gate", "up"})
Cache = Any  # pieces as in `kernels/decode.py`: a tuple of these, one a layer, or one with L in front; or StackedCache


@dataclasses.dataclass(frozen=True)
class Path:
    """Static choices of an inference program.

    transposed: matrices that `project` contracts lie as [D, rows], the head too. On CPU the product with few rows is
      then 1.3 to 2 times as fast as over [rows, D], and, for two rows or more, the bits of a row depend neither on
      how many there are nor on its place (tests/inference/test_batches.py): a batch of one is computed as two.
    cut_by_time: the mesh over whose axis `tensor` the cache is cut by time.
    stacked: the cache is one stack, which the TPU's kernels read where it lies; needs layers that are scanned.
    cache_dtype: "int8", or "auto": that of computation.
    least_rows: what products are given, filled up with surplus rows. With one row XLA:CPU makes a loop that copies the
      matrix first; with fewer than eight the TPU leaves its matrix unit alone, and the vector unit takes ten times as
      long.
    mesh: of more than one chip, for kernels, which XLA does not cut.
    interpret: the kernels' bodies on any backend, for tests.
    """

    unrolled: bool
    transposed: bool = False
    dtype: str = "float32"
    rope_by_matmul: bool = False
    cut_by_time: Mesh | None = None
    stacked: bool = False
    cache_dtype: str = "auto"
    least_rows: int = 2
    mesh: Mesh | None = None
    interpret: bool = False


def layered(weights: Params, num_layers: int) -> Weights:
    """Stacked blocks -> a tuple of `num_layers` trees. Copies stacks that are arrays; takes a tuple's items."""
    blocks = weights[STACKED]

    def layer(i: int) -> Params:
        return jax.tree.map(lambda a: a[i], blocks, is_leaf=lambda leaf: isinstance(leaf, tuple))

    return {**weights, STACKED: tuple(map(layer, range(num_layers)))}


def transposed(weights: Weights) -> Weights:
    """As `Path.transposed` wants them; a tied head gets a matrix of its own. Its own inverse but for that head."""
    head = weights.get(HEAD, weights["embedding"])
    return {**weights, HEAD: _swapped(head), STACKED: _turned(weights[STACKED])}


def _turned(blocks: Any) -> Any:
    """Matrices that `project` contracts, from [rows, D] to [D, rows] or back."""

    def turn(path, leaf):
        return _swapped(leaf) if path[-1].key in PROJECTED else leaf

    return jax.tree_util.tree_map_with_path(turn, blocks, is_leaf=lambda leaf: isinstance(leaf, WeightFormat))


def _swapped(leaf: jax.Array | WeightFormat) -> jax.Array | WeightFormat:
    if isinstance(leaf, WeightFormat) and not isinstance(leaf, Quantized):
        return leaf  # made for its platform: it lies as it should
    return jax.tree.map(lambda a: jnp.swapaxes(a, -1, -2), leaf)


def empty_cache(c: ModelConfig, path: Path, rows: int, lengths: Sequence[int]) -> Cache:
    """A cache of `rows` rows in pieces of these lengths, all zero."""
    if path.stacked:
        dtype = path.dtype if path.cache_dtype == "auto" else path.cache_dtype
        return empty(c.num_layers, rows, c.num_kv_heads, sum(lengths), c.head_dim, dtype)

    def pieces(*layers: int):
        def zeros(length: int, width: int, dtype: str):
            shape = (*layers, rows, c.num_kv_heads, length, width)
            return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)

        if path.cache_dtype == "int8":
            return tuple(zeros(n, c.head_dim, "int8") + zeros(n, 1, "bfloat16") for n in lengths)
        return tuple(zeros(n, c.head_dim, path.dtype) for n in lengths)

    return tuple(pieces() for _ in range(c.num_layers)) if path.unrolled else pieces(c.num_layers)


def hidden(
    c: ModelConfig,
    path: Path,
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
    rope = _rope_table(c, path, positions, frequencies, attention_factor)
    top = _module(c, path, weights, _layer(weights, 0))
    x = lookup(top.embedding, tokens, path.dtype)

    def body(x, layer, cache, number=None):
        block = _module(c, path, weights, layer).blocks
        return _block(c, path, block, x, rope, cache, positions, count, number)

    if path.stacked:
        # Carried, not scanned over: what is scanned over is sliced and put together again, a copy of the cache.
        x, cache = jax.lax.fori_loop(
            0, c.num_layers, lambda i, both: body(both[0], _layer(weights, i), both[1], i), (x, cache)
        )
    elif path.unrolled:
        new = []
        for layer, layer_cache in zip(weights[STACKED], cache, strict=True):
            x, layer_cache = body(x, layer, layer_cache)
            new.append(layer_cache)
        cache = tuple(new)
    else:
        x, cache = jax.lax.scan(lambda x, both: body(x, *both), x, (weights[STACKED], cache))
    return top.final_norm(x, None if count is None else row_sum), cache


def logits(c: ModelConfig, path: Path, weights: Weights, x: jax.Array) -> jax.Array:
    """(B, D) -> (B, padded V) float32, -inf where the vocabulary is padded. (Cutting the padding off is a copy.)"""
    module = _module(c, path, weights, _layer(weights, 0))
    head = (module.embedding if module.head is None else module.head).get_value()
    if isinstance(head, WeightFormat):
        values = head.project(x, jnp.float32)
    else:
        head = module.head_rows().astype(x.dtype)
        values = jnp.einsum("bd,vd->bv", x, head, preferred_element_type=jnp.float32)
    return jnp.where(jnp.arange(head.shape[0]) < c.vocab_size, values, -jnp.inf)


def _block(c, path, block: Block, x, rope, cache, positions, count, number):
    """One layer, the residual block of decoder.Block: x (B, T, D), cache (k, v) -> both anew.

    Products give a row its own bits anyway, see `Path.transposed`.
    """
    a = block.attention
    sums = None if count is None else row_sum

    def split(h: jax.Array, heads: int) -> jax.Array:
        return h.reshape(*h.shape[:2], heads, -1).swapaxes(1, 2)

    q, k, v = joined.normed_products(x, block.attention_norm, (a.q, a.k, a.v), sums, count)
    if path.cut_by_time is None and joined.attends_in_one_call(a.q, x, cache):
        out, cache = joined.attend((q, k, v), rope, cache, positions, count, c.sliding_window, a.q)
    else:
        q, k, v = split(q, c.num_heads), split(k, c.num_kv_heads), split(v, c.num_kv_heads)
        q, k = (apply_rope(y, rope, c, by_matmul=path.rope_by_matmul) for y in (q, k))
        if count is not None:
            q, k = kept_apart((q, k), count)  # of a rotation fused with what comes next the bits depend on the shape
        out, cache = _attention(c, path, q, k, v, cache, positions, sums, number)
        out = out.swapaxes(1, 2).reshape(*x.shape[:2], -1)
    x = joined.plus_product(x, out, a.o, count)
    return joined.plus_mlp(x, block.mlp_norm, block.mlp, sums, count), cache


def _attention(c, path, q, k, v, cache, positions, sums, number):
    """q (B, N, T, H) over the layer's cache with k and v (B, K, T, H) in it -> (B, N, T, H), cache."""
    window = c.sliding_window
    if path.stacked:
        return stacked_attention(
            q, k, v, cache, number, positions, window=window, mesh=path.mesh, interpret=path.interpret
        )
    cache = write(cache, k, v, positions[:, 0], cut_by_time=path.cut_by_time is not None)
    if path.cut_by_time is None:
        return cached_attention(q, cache, positions, window=window, row_sum=sums), cache
    return attention_cut_by_time(q, cache, positions, window=window, mesh=path.cut_by_time), cache


def _rope_table(c, path, positions, frequencies, factor) -> tuple[jax.Array, jax.Array]:
    """rope.rope_table with frequencies that may differ by row."""
    angles = positions[:, None, :, None].astype(jnp.float32) * frequencies[:, None, None]  # (B, 1, T, R/2)
    angles = jnp.concatenate([angles, angles], axis=-1)
    cos, sin = jnp.cos(angles) * np.float32(factor), jnp.sin(angles) * np.float32(factor)
    if path.rope_by_matmul and c.rotary_dim < c.head_dim:
        rest = [(0, 0)] * 3 + [(0, c.head_dim - c.rotary_dim)]
        cos, sin = jnp.pad(cos, rest, constant_values=1.0), jnp.pad(sin, rest)
    return cos.astype(path.dtype), sin.astype(path.dtype)


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


def _module(c: ModelConfig, path: Path, weights: Weights, layer: Params) -> Decoder:
    """A Decoder whose `blocks` are one layer's. XLA reads a transposed leaf where it lies."""
    if path.transposed:
        weights, layer = {**weights, HEAD: _swapped(weights[HEAD])}, _turned(layer)
        c = dataclasses.replace(c, tied_head=False)
    return model_params.module(c, {**weights, STACKED: layer})
