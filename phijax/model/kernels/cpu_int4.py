"""Weights in four or eight bits as the C++ kernel of `cpu_int4.cc` reads them: the format of one CPU.

Activations are rounded to int8, a scale for each row and group; sums inside a group are exact, those over groups
float32. That moves a result by about 1 % of its deviation (tests/model/test_cpu_int4.py). A row's bits do not depend
on other rows.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from phijax.model.kernels import cpu_int4_library
from phijax.model.kernels.decode import Pieces
from phijax.model.mask import Mask, causal_window
from phijax.model.norm import RMSNorm
from phijax.model.quantized import Quantized

TILE = 32  # outputs
LARGEST_GROUP = 128
CHANNEL_GROUP = 32  # of activations, where a weight has one scale for a whole channel

# The functions that the C++ computes around its products: a call is taken only for these.
GATED_WITH = jax.nn.silu
NORMED_WITH = RMSNorm.__call__


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiled:
    """One matrix in tiles of 32 outputs, outputs and inputs padded with zeros to whole tiles and groups.

    data: (O / 32, bytes) uint8. Of each tile first the scales, float16 (I / G, 32), or (1, 32) by channel; then the
      values, (I / 8, 32, 4) for four bits: of output n, byte j of chunk c is input 8 c + j, plus 8, in its low half and
      input 8 c + 4 + j in its high half; (I / 4, 32, 4) for eight: input 4 c + j, plus 128. One array: a step has
      hundreds of arguments, and half a microsecond goes with each.
    shape: (rows, D) of the matrix; `over_rows`: it is used by `project_back`, so its rows are the inputs.
    group: inputs whose activations share a scale, G where weights have groups.
    path: one of cpu_int4_library.PATHS.
    """

    data: jax.Array
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    over_rows: bool = dataclasses.field(metadata={"static": True})
    bits: int = dataclasses.field(metadata={"static": True})
    group: int = dataclasses.field(metadata={"static": True})
    by_channel: bool = dataclasses.field(metadata={"static": True})
    path: str = dataclasses.field(metadata={"static": True})

    @property
    def inputs(self) -> int:
        return self.shape[0 if self.over_rows else 1]

    @property
    def outputs(self) -> int:
        return self.shape[1 if self.over_rows else 0]

    def project(self, x: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
        """(..., D) -> (..., rows) in `dtype`, else as x."""
        assert not self.over_rows
        return products(x, [self], dtype)[0]

    def project_back(self, h: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
        """(..., rows) -> (..., D) in `dtype`, else as h."""
        assert self.over_rows
        return products(h, [self], dtype)[0]

    def lookup(self, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Rows of an embedding: (...) int32 -> (..., D)."""
        assert not self.over_rows
        tile, lane = (tokens // TILE)[..., None], (tokens % TILE)[..., None]
        # Bytes one by one: a slice of the array that rows are then taken from would be a copy of the embedding.
        scales = 2 * (np.arange(self.scale_bytes // (2 * TILE)) * TILE + lane)
        scales = jnp.stack([self.data[tile, scales], self.data[tile, scales + 1]], axis=-1)
        chunk = np.arange((self.data.shape[1] - self.scale_bytes) // (4 * TILE))[:, None] * TILE
        values = self.scale_bytes + 4 * (chunk + lane[..., None]) + np.arange(4)  # (..., chunks, 4)
        return self._scaled(self._integers(self.data[tile[..., None], values]), _halves(scales)).astype(dtype)

    def dequantize(self, dtype: jnp.dtype = jnp.float32) -> jax.Array:
        """(rows, D), exactly what it was made from."""
        tiles = self.data.shape[0]
        scales = _halves(self.data[:, : self.scale_bytes].reshape(tiles, -1, TILE, 2)).swapaxes(1, 2)
        values = self._integers(self.data[:, self.scale_bytes :].reshape(tiles, -1, TILE, 4).swapaxes(1, 2))
        out = self._scaled(values, scales).reshape(-1, values.shape[-1])[: self.outputs, : self.inputs]
        return (out.T if self.over_rows else out).astype(dtype)

    @property
    def scale_bytes(self) -> int:
        """Of a tile."""
        return 2 * TILE * (1 if self.by_channel else -(-self.inputs // self.group))

    def _integers(self, chunks: jax.Array) -> jax.Array:
        """(..., chunks, 4) uint8 -> (..., I) float32."""
        if self.bits == 4:
            parts = jnp.stack([chunks & 15, chunks >> 4], axis=-2)
            return parts.reshape(*chunks.shape[:-2], -1).astype(jnp.float32) - 8
        return chunks.reshape(*chunks.shape[:-2], -1).astype(jnp.float32) - 128

    def _scaled(self, values: jax.Array, scales: jax.Array) -> jax.Array:
        groups = values.reshape(*values.shape[:-1], scales.shape[-1], -1) * scales.astype(jnp.float32)[..., None]
        return groups.reshape(values.shape)[..., : self.inputs]


def _halves(pairs: jax.Array) -> jax.Array:
    """(..., 2) uint8 -> (...) float16."""
    return jax.lax.bitcast_convert_type(pairs, jnp.float16)


@dataclasses.dataclass(frozen=True)
class Norm:
    """The numbers of an RMSNorm before a product."""

    scale: jax.Array  # (I,)
    epsilon: float


def products(
    x: jax.Array,
    weights: Sequence[Tiled],
    dtype: jnp.dtype | None = None,
    *,
    norm: Norm | None = None,
    residual: jax.Array | None = None,
    count: jax.Array | None = None,
) -> list[jax.Array]:
    """(..., I) -> (..., O) for each of several matrices that are `alike`, whose activations are rounded once.

    Args:
      dtype: of the results; None: as x.
      residual: (..., O), is added to the product with the one matrix that there is.
      count: () int32, how many of x's rows count, the others give zeros; None: all.
    """
    first = weights[0]
    assert all(alike(w, first) for w in weights) and (residual is None or len(weights) == 1)
    before = _before(x, norm, residual, count)
    rows = before[0].shape[0]
    results = [jax.ShapeDtypeStruct((rows, w.outputs), jnp.float32) for w in weights]
    outs = jax.ffi.ffi_call(cpu_int4_library.PRODUCT, results)(
        *before, *(w.data for w in weights), **_attributes(norm, **_of(first), path=_number(first.path))
    )
    return [out.reshape(*x.shape[:-1], -1).astype(dtype or x.dtype) for out in outs]


def gated(
    x: jax.Array,
    gate: Tiled,
    up: Tiled,
    down: Tiled,
    *,
    norm: Norm | None = None,
    residual: jax.Array | None = None,
    count: jax.Array | None = None,
) -> jax.Array:
    """residual + down(silu(gate(x)) * up(x)), (..., D) -> (..., D); gate and up `alike`."""
    assert alike(gate, up) and down.path == gate.path and down.over_rows
    before = _before(x, norm, residual, count)
    result = jax.ShapeDtypeStruct((before[0].shape[0], down.outputs), jnp.float32)
    numbers = _of(gate) | {f"down_{name}": number for name, number in _of(down).items()}
    out = jax.ffi.ffi_call(cpu_int4_library.GATED, result)(
        *before,
        *(w.data for w in (gate, up, down)),
        **_attributes(norm, **numbers, hidden=gate.outputs, path=_number(gate.path)),
    )
    return out.reshape(*x.shape[:-1], -1).astype(x.dtype)


def attends(w: Any, dtype: str, cache: Any, scale: float, mask: Mask) -> bool:
    """Whether `attend` is what attention is, for products of this weight in `dtype`: a cache that it reads, its own
    factor on the scores."""
    if not isinstance(w, Tiled) or dtype != "float32" or not mask.causal:
        return False
    keys = cache[0][0]
    return keys.dtype in ("float32", "int8") and scale == keys.shape[-1] ** -0.5


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    cache: Pieces,
    positions: jax.Array,
    count: jax.Array | None,
    *,
    mask: Mask,
    path: str,
) -> tuple[jax.Array, Pieces]:
    """New tokens of rows: rotates q and k, writes k and v into the cache, and attends.

    Args:
      q: (B, T, N H); k, v: (B, T, K H); rope: cos and sin (B, T, R); cache: as in `kernels/decode.py`,
        float32 or in eight bits.
      positions: (B,) int32, the places of the first of the new tokens; the others follow.
      count: () int32, how many rows of the batch count; None: all.
    Returns: (B, T, N H), zeros for rows beyond `count` or the cache's; the cache, in place where it is donated.
    """
    pieces = jax.tree.leaves(cache)
    counted = jnp.zeros(0, jnp.int32) if count is None else jnp.asarray(count, jnp.int32).reshape(1)
    before = [q, k, v, *rope, positions, counted]
    results = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (q, *pieces)]
    aliases = {len(before) + i: i + 1 for i in range(len(pieces))}
    call = jax.ffi.ffi_call(cpu_int4_library.ATTEND, results, input_output_aliases=aliases)
    out, *new = call(*before, *pieces, window=np.int32(causal_window(mask, "int4") or 0), path=np.int32(_number(path)))
    return out, jax.tree.unflatten(jax.tree.structure(cache), new)


def _before(x, norm, residual, count) -> list[jax.Array]:
    """The arguments before the matrices; what is not there is empty."""

    def flat(array: jax.Array) -> jax.Array:
        return array.reshape(-1, array.shape[-1]).astype(jnp.float32)

    nothing = jnp.zeros(0, jnp.float32)
    return [
        flat(x),
        nothing if norm is None else norm.scale.astype(jnp.float32),
        nothing if residual is None else flat(residual),
        jnp.zeros(0, jnp.int32) if count is None else jnp.asarray(count, jnp.int32).reshape(1),
    ]


def _of(w: Tiled) -> dict[str, int]:
    return {"bits": w.bits, "group": w.group, "by_channel": int(w.by_channel)}


def _attributes(norm: Norm | None, **numbers: int) -> dict[str, np.generic]:
    epsilon = np.float32(0.0 if norm is None else norm.epsilon)
    return {name: np.int32(number) for name, number in numbers.items()} | {"epsilon": epsilon}


def _number(path: str) -> int:
    return cpu_int4_library.PATHS.index(path)


def alike(a: Any, b: Any) -> bool:
    """Whether two weights can share the rounding of what they are multiplied with."""
    same = ("inputs", "over_rows", "bits", "group", "by_channel", "path")
    return isinstance(a, Tiled) and isinstance(b, Tiled) and all(getattr(a, name) == getattr(b, name) for name in same)


def fits(w: Quantized) -> bool:
    """Whether the kernel has this matrix's groups."""
    _, group = _summed(w)
    return group is None or (group <= LARGEST_GROUP and group % 8 == 0)


def tiled(w: Quantized, path: str) -> Tiled:
    """A stored matrix, its arrays (of NumPy, or on this CPU) rearranged."""
    axis, by = _summed(w)
    values, scales = np.asarray(w.values).astype(np.int8, copy=False), np.asarray(w.scales)
    bits = 4 if w.values.dtype == jnp.int4 else 8
    group = by or CHANNEL_GROUP
    if axis == 0:
        values, scales = values.T, scales.T
    outputs, inputs = values.shape
    rest = ((0, -outputs % TILE), (0, -inputs % group))
    if any(after for _, after in rest):
        values, scales = np.pad(values, rest), np.pad(scales, (rest[0], (0, 0)))
    tiles = values.shape[0] // TILE
    parts = [
        np.ascontiguousarray(scales.reshape(tiles, TILE, -1).swapaxes(1, 2)).view(np.uint8).reshape(tiles, -1),
        _chunks(values.reshape(tiles, TILE, -1), bits).reshape(tiles, -1),
    ]
    return Tiled(jnp.asarray(np.concatenate(parts, axis=1)), w.shape, axis == 0, bits, group, by is None, path)


def _chunks(values: np.ndarray, bits: int) -> np.ndarray:
    """(tiles, 32, I) int8 -> (tiles, chunks, 32, 4) uint8, as Tiled has them."""
    tiles, _, inputs = values.shape
    if bits == 8:
        parts = values.view(np.uint8).reshape(tiles, TILE, inputs // 4, 4) ^ np.uint8(128)
    else:
        halves = values.view(np.uint8).reshape(tiles, TILE, inputs // 8, 2, 4)
        # In four bits the sum with 8 is the exclusive or with 8.
        parts = ((halves[..., 0, :] & 15) | (halves[..., 1, :] << 4)) ^ np.uint8(0x88)
    return np.ascontiguousarray(parts.swapaxes(1, 2))


def _summed(w: Quantized) -> tuple[int, int | None]:
    """The axis that is summed over, and the group; None by channel."""
    axis = 1 if w.scales.shape[-2] == w.shape[-2] else 0
    groups = w.scales.shape[axis]
    return axis, None if groups == 1 else w.shape[axis] // groups
