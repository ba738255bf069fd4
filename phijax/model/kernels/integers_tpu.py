"""Products with weights in few bits, for TPU: `Quantized` weights in the order in which a kernel reads them.

The integers go from HBM into VMEM as they are. A group's partial product is made of the bare integers on the matrix
unit, then multiplied by the group's scales and added up in float32, so scales cost nothing by weight and no weight is
rounded. Weights that are scaled before the product instead would be a copy of the matrix in bfloat16. With one scale
for each channel XLA reads integers as they lie too, but spends twice the vector unit's time on widening them.

A stack of matrices is handed to the kernel whole, with the number of the layer: a custom call's operand is never part
of a fusion, so a slice of the stack would be a copy of the matrix, as long as reading it.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec

from phijax.model.quantized import Quantized

LANES = 128  # width of a vector register and of the matrix unit
SUBLANES = 8
BLOCK_BYTES = 2**20  # of integers in VMEM, twice: one is read while the other is used
ACCUMULATORS = 32  # of 64 vector registers
MOST_ROWS = 256  # of x at once; for more of them the weights are read again
PIECES = (512, 384, 256, LANES)  # inputs in one product, the first that divides a group


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TpuIntegers:
    """A matrix [rows, D], or a stack of them with L in front of which `layer` says one.

    values: (..., rows, D) int4 or int8.
    scales: the bits of float16 as int16 (Mosaic has no float16), (..., D / G, rows), turned so that rows lie along
      lanes as they do in the product; with `back` (..., rows / G, D). One group over the axis: a scale a channel.
    layer: () int32; None for a matrix alone, or a stack that is not yet looked at.
    back: it is summed over rows (`project_back`), else over D.
    mesh: of more than one chip, since XLA cuts no kernel; cut: over its axis `tensor` by rows, else each has them all.
    interpret: the kernel's body on any backend, for tests.
    """

    values: jax.Array
    scales: jax.Array
    layer: jax.Array | None = None
    back: bool = dataclasses.field(default=False, metadata={"static": True})
    mesh: Mesh | None = dataclasses.field(default=None, metadata={"static": True})
    cut: bool = dataclasses.field(default=False, metadata={"static": True})
    interpret: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape if self.layer is None else self.values.shape[1:]

    @property
    def group(self) -> int:
        return self.values.shape[-2 if self.back else -1] // self.scales.shape[-2]

    def of_layer(self, number: jax.Array) -> "TpuIntegers":
        """One matrix of the stack. Nothing is copied."""
        return dataclasses.replace(self, layer=jnp.asarray(number, jnp.int32))

    def project(self, x: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
        """(..., D) -> (..., rows), summed in float32; in `dtype`, else as x."""
        assert not self.back
        return self._product(x, dtype or x.dtype)

    def project_back(self, h: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
        """(..., rows) -> (..., D), summed in float32; in `dtype`, else as h."""
        assert self.back
        return self._product(h, dtype or h.dtype)

    def lookup(self, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Rows of an embedding: (...) int32 -> (..., D). Only the rows that are asked for are widened."""
        assert not self.back and self.values.ndim == 2
        scales = jnp.moveaxis(jnp.take(self.scales, tokens, axis=1), 0, -1)  # (..., D / G)
        return Quantized(jnp.take(self.values, tokens, axis=0), _float16(scales)).dequantize(dtype)

    def dequantize(self, dtype: jnp.dtype = jnp.float32) -> jax.Array:
        """(..., rows, D)."""
        values, scales = self.values, _float16(self.scales)
        if self.layer is not None:
            values, scales = values[self.layer], scales[self.layer]
        return Quantized(values, scales if self.back else jnp.swapaxes(scales, -1, -2)).dequantize(dtype)

    def _product(self, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
        alone = self.values.ndim == 2
        values, scales = (a[None] if alone else a for a in (self.values, self.scales))
        layer = jnp.zeros(1, jnp.int32) if alone else self.layer.reshape(1)
        call = functools.partial(integer_product, back=self.back, dtype=dtype, interpret=self.interpret)
        if self.mesh is not None:
            shared = self.back and scales.shape[1] == 1
            call = _on_each_chip(self.mesh, call, self.cut, self.back, shared, dtype)
        return call(x.reshape(-1, x.shape[-1]), values, scales, layer).reshape(*x.shape[:-1], -1)


def fits(w: Quantized, parts: int = 1) -> bool:
    """Whether the kernel takes this weight, its rows cut into `parts`: matrix and groups fill whole registers."""
    *_, rows, width = w.shape
    if rows % (parts * LANES) or width % LANES:
        return False
    back = _summed_over_rows(w)
    summed, groups = (rows, w.scales.shape[-2]) if back else (width, w.scales.shape[-1])
    group = summed // groups
    here = summed // parts if back else summed
    return groups == 1 or (here % max(group, LANES) == 0 and max(group, LANES) % min(group, LANES) == 0)


def from_quantized(
    w: Quantized, mesh: Mesh | None = None, *, cut: bool = False, interpret: bool = False
) -> TpuIntegers:
    """The same numbers in the kernel's order; mesh, cut, interpret: as TpuIntegers's. `w` must be one that `fits`."""
    back = _summed_over_rows(w)
    bits = jax.lax.bitcast_convert_type(w.scales, jnp.int16)
    scales = bits if back else jnp.swapaxes(bits, -1, -2)
    return TpuIntegers(w.values, scales, back=back, mesh=mesh, cut=cut, interpret=interpret)


def _summed_over_rows(w: Quantized) -> bool:
    return w.scales.shape[-1] == w.shape[-1]


def integer_product(
    x: jax.Array,
    values: jax.Array,
    scales: jax.Array,
    layer: jax.Array,
    *,
    back: bool,
    dtype: jnp.dtype,
    interpret: bool = False,
) -> jax.Array:
    """Sums over groups of (x over a group) times (values over it) times (its scales), of matrix `layer` of a stack.

    Args:
      x: (M, D), or (M, rows) with `back`; bfloat16, or float32, which is then the precision of the products too.
      values: (L, rows, D) int4 or int8.
      scales: (L, D / G, rows), or (L, rows / G, D) with `back`; int16, float16's bits.
      layer: (1,) int32.
    Returns: (M, rows), or (M, D) with `back`, in dtype, summed in float32.
    """
    summed, outputs = values.shape[1:] if back else values.shape[:0:-1]
    group = summed // scales.shape[1]
    chunk = max(group, LANES)
    count = x.shape[0]
    step = min(MOST_ROWS, -(-count // SUBLANES) * SUBLANES)
    x = jnp.pad(x, ((0, -count % step), (0, 0)))
    copies = chunk // group
    width = _outputs_in_a_block(outputs, summed * (1 if values.dtype == jnp.int8 else 0.5), step * copies)
    matrix_block = (1, summed, width) if back else (1, width, summed)

    def matrix_at(i, j, layer):
        return (layer[0], 0, j) if back else (layer[0], j, 0)

    out = pl.pallas_call(
        functools.partial(_kernel, group=group, back=back),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(x.shape[0] // step, outputs // width),
            in_specs=[
                pl.BlockSpec((1, copies * step, summed), lambda i, j, layer: (i, 0, 0)),
                pl.BlockSpec(matrix_block, matrix_at),
                pl.BlockSpec((1, scales.shape[1], width), lambda i, j, layer: (layer[0], 0, j)),
            ],
            out_specs=pl.BlockSpec((step, width), lambda i, j, layer: (i, j)),
        ),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], outputs), dtype),
        interpret=interpret,
        name="integers_back" if back else "integers",
    )(layer, _for_each_group(x.reshape(-1, step, summed), group, copies), values, scales)
    return out[:count]


def _kernel(layer, x, values, scales, out, *, group: int, back: bool):
    """A block of outputs, over the whole axis that is summed, chunk by chunk: a group, or LANES where that is more.

    Of groups shorter than LANES several share a chunk: x then holds as many copies, each zero outside of its group, and
    one pass of the chunk's weights through the matrix unit gives the partial products of all.
    """
    del layer  # the blocks were chosen by it
    rows = out.shape[0]
    copies = x.shape[1] // rows
    chunk = group * copies
    piece = next(n for n in PIECES if chunk % n == 0)
    factors = _float32(scales[0])
    total = jnp.zeros(out.shape, jnp.float32)
    for number in range(x.shape[2] // chunk):
        partial = None
        for start in range(number * chunk, (number + 1) * chunk, piece):
            at = slice(start, start + piece)
            product = jax.lax.dot_general(
                x[0, :, at],
                (values[0, at, :] if back else values[0, :, at]).astype(x.dtype),
                (((1,), (0 if back else 1,)), ((), ())),
                precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
                preferred_element_type=jnp.float32,
            )
            partial = product if partial is None else partial + product
        for copy in range(copies):
            total += partial[copy * rows : (copy + 1) * rows] * factors[number * copies + copy][None]
    out[...] = total.astype(out.dtype)


def _for_each_group(x: jax.Array, group: int, copies: int) -> jax.Array:
    """(I, M, S) -> (I, copies M, S): copy c keeps the groups c, c + copies, ... and is zero elsewhere."""
    if copies == 1:
        return x
    turn = jnp.arange(x.shape[-1]) // group % copies
    kept = turn == jnp.arange(copies)[:, None, None]  # (copies, 1, S)
    return jnp.where(kept, x[:, None], 0).reshape(x.shape[0], -1, x.shape[-1])


def _outputs_in_a_block(outputs: int, bytes_each: float, rows: int) -> int:
    """As many as accumulators and VMEM allow, in whole registers, and dividing `outputs`."""
    most = min(4, ACCUMULATORS * SUBLANES // rows, int(BLOCK_BYTES // (bytes_each * LANES)))
    return next(n for n in range(max(most, 1), 0, -1) if outputs % (n * LANES) == 0) * LANES


def _float32(bits: jax.Array) -> jax.Array:
    """float16's bits -> float32. Subnormal ones are made of integers: the chip takes subnormal floats for zero."""
    bits = bits.astype(jnp.int32)
    sign, rest = (bits & 0x8000) << 16, bits & 0x7FFF
    normal = pltpu.bitcast((rest << 13) + (112 << 23), jnp.float32)
    magnitude = jnp.where(rest < 0x0400, rest.astype(jnp.float32) * 2.0**-24, normal)
    return pltpu.bitcast(pltpu.bitcast(magnitude, jnp.int32) | sign, jnp.float32)


def _float16(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float16)


def _on_each_chip(mesh: Mesh, call: Callable, cut: bool, back: bool, shared: bool, dtype: jnp.dtype) -> Callable:
    """`call` where each chip of `tensor` has its rows: of what is summed over them each adds its part.

    Args: shared: rows that are cut have the same scales.
    """
    whole = PartitionSpec()
    rows, last = PartitionSpec(None, "tensor", None), PartitionSpec(None, None, "tensor")
    outputs = PartitionSpec(None, "tensor")

    def add_up(x, values, scales, layer):
        return jax.lax.psum(call(x, values, scales, layer, dtype=jnp.float32), "tensor").astype(dtype)

    if not cut:
        local, specs, result = call, (whole, whole, whole, whole), whole
    elif back:
        local, specs, result = add_up, (outputs, rows, whole if shared else rows, whole), whole
    else:
        local, specs, result = call, (whole, rows, last, whole), outputs
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=result, check_vma=False)
