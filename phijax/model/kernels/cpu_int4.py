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
from phijax.model.quantized import Quantized

TILE = 32  # outputs
LARGEST_GROUP = 128
CHANNEL_GROUP = 64  # of activations, where a weight's scale is for a whole channel


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiled:
    """One matrix in tiles of 32 outputs, outputs and inputs padded with zeros to whole tiles and groups.

    values: (O / 32, I / 8, 32, 4) uint8 for four bits: of output n, byte j is input 8 c + j, plus 8, in its low half
      and input 8 c + 4 + j in its high half. (O / 32, I / 4, 32, 4) for eight: input 4 c + j, plus 128.
    scales: (O / 32, I / G, 32) float16, or (O / 32, 1, 32) by channel.
    shape: (rows, D) of the matrix; `over_rows`: it is used by `project_back`, so its rows are the inputs.
    group: inputs whose activations share a scale, G where weights have groups.
    path: one of cpu_int4_library.PATHS.
    """

    values: jax.Array
    scales: jax.Array
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    over_rows: bool = dataclasses.field(metadata={"static": True})
    bits: int = dataclasses.field(metadata={"static": True})
    group: int = dataclasses.field(metadata={"static": True})
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
        values = self._integers(self.values[tokens // TILE, :, tokens % TILE])  # (..., I)
        return self._scaled(values, self.scales[tokens // TILE, :, tokens % TILE]).astype(dtype)

    def dequantize(self, dtype: jnp.dtype = jnp.float32) -> jax.Array:
        """(rows, D), exactly what it was made from."""
        values = self._integers(self.values.swapaxes(1, 2))  # (O / 32, 32, I)
        out = self._scaled(values, self.scales.swapaxes(1, 2)).reshape(-1, self.inputs)[: self.outputs]
        return (out.T if self.over_rows else out).astype(dtype)

    def _integers(self, chunks: jax.Array) -> jax.Array:
        """(..., chunks, 4) uint8 -> (..., I) float32."""
        if self.bits == 4:
            parts = jnp.stack([chunks & 15, chunks >> 4], axis=-2)
            return parts.reshape(*chunks.shape[:-2], -1).astype(jnp.float32) - 8
        return chunks.reshape(*chunks.shape[:-2], -1).astype(jnp.float32) - 128

    def _scaled(self, values: jax.Array, scales: jax.Array) -> jax.Array:
        groups = values.reshape(*values.shape[:-1], scales.shape[-1], -1) * scales.astype(jnp.float32)[..., None]
        return groups.reshape(values.shape)[..., : self.inputs]


def products(x: jax.Array, weights: Sequence[Tiled], dtype: jnp.dtype | None = None) -> list[jax.Array]:
    """(..., I) -> (..., O) for each of several matrices of one kind, whose activations are rounded once."""
    first = weights[0]
    assert all(alike(w, first) for w in weights)
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    call = jax.ffi.ffi_call(
        cpu_int4_library.TARGET, [jax.ShapeDtypeStruct((rows.shape[0], w.outputs), jnp.float32) for w in weights]
    )
    numbers = {"bits": first.bits, "group": first.group, "path": cpu_int4_library.PATHS.index(first.path)}
    arrays = [array for w in weights for array in (w.values, w.scales)]
    outs = call(rows, *arrays, **{name: np.int32(number) for name, number in numbers.items()})
    return [out.reshape(*x.shape[:-1], -1).astype(dtype or x.dtype) for out in outs]


def alike(a: Any, b: Any) -> bool:
    """Whether two weights can share the rounding of what they are multiplied with."""
    same = ("inputs", "over_rows", "bits", "group", "path")
    by_channel = [isinstance(w, Tiled) and w.scales.shape[1] == 1 for w in (a, b)]
    return (
        isinstance(a, Tiled)
        and isinstance(b, Tiled)
        and by_channel[0] == by_channel[1]
        and all(getattr(a, name) == getattr(b, name) for name in same)
    )


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
    scales = scales.reshape(tiles, TILE, -1).swapaxes(1, 2)
    return Tiled(
        jnp.asarray(_chunks(values.reshape(tiles, TILE, -1), bits)),
        jnp.asarray(np.ascontiguousarray(scales)),
        w.shape,
        axis == 0,
        bits,
        group,
        path,
    )


def _chunks(values: np.ndarray, bits: int) -> np.ndarray:
    """(tiles, 32, I) int8 -> Tiled.values."""
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
