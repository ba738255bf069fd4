"""A batch: a dict of global arrays (A, B, T), built from the rows that each process's own devices ask for."""

from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from phijax.data.rows import Row
from phijax.errors import UserError
from phijax.parallel import sharding

DTYPES = {
    "tokens": np.int32,
    "targets": np.int32,
    "segment_ids": np.int32,
    "positions": np.int32,
    "weights": np.float32,
}

Batch = dict[str, jax.Array]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Micro-batches whole, rows over data and fsdp, time over context."""
    return sharding.sharding(mesh, ("micro_batch", "act_batch", "act_time"))


def batch_shape(global_batch_size: int, micro_batches: int, length: int) -> tuple[int, int, int]:
    """(A, B, T). Row i of a step is (a, b) = divmod(i, B): changing A keeps the rows."""
    return micro_batches, global_batch_size // micro_batches, length


def check_batch(
    where: str,
    global_batch_size: int,
    micro_batches: int,
    length: int,
    sizes: Mapping[str, int],
    *,
    size_key: str = "global_batch_size",
) -> None:
    """
    Args:
      where: the config's section, in which `size_key` and `sequence_length` stand.
    Raises: UserError, before memory is taken, for a batch that the mesh cannot share evenly.
    """
    rows = sizes["data"] * sizes["fsdp"]
    unit = micro_batches * rows
    if global_batch_size % unit:
        low, high = global_batch_size // unit * unit, -(-global_batch_size // unit) * unit
        near = f"{low} or {high}" if low else f"{high}"
        raise UserError(
            f"{where}.{size_key}={global_batch_size} cannot be split over {micro_batches} micro-batches x data x "
            f"fsdp = {micro_batches} x {sizes['data']} x {sizes['fsdp']}.\n"
            f"Nearest that can: {near}.  Try --config.{where}.{size_key}={high}"
        )
    if length % sizes["context"]:
        high = -(-length // sizes["context"]) * sizes["context"]
        raise UserError(
            f"{where}.sequence_length={length} cannot be split over mesh.context={sizes['context']}.\n"
            f"Try --config.{where}.sequence_length={high}"
        )


def local_rows(shape: Sequence[int], placed: NamedSharding) -> list[int]:
    """Indices into a step's rows that this process's devices hold any part of, in order."""
    micro, rows, _ = shape
    wanted = set()
    for part in placed.addressable_devices_indices_map(tuple(shape)).values():
        a, b = part[0].indices(micro), part[1].indices(rows)
        wanted |= {i * rows + j for i in range(*a) for j in range(*b)}
    return sorted(wanted)


def assemble(shape: Sequence[int], placed: NamedSharding, rows: Mapping[int, Row]) -> Batch:
    """Global arrays from this process's rows.

    Right also where `context` or `tensor` spans hosts: every device slices its part from whole rows.

    Args:
      rows: index in the step -> arrays (T,), at least those of `local_rows`.
    """
    per_micro = shape[1]

    def part(name: str) -> Callable:
        def values(index) -> np.ndarray:
            a, b, t = (s.indices(n) for s, n in zip(index, shape, strict=True))
            picked = [rows[i * per_micro + j][name][slice(*t)] for i in range(*a) for j in range(*b)]
            return np.stack(picked).reshape(len(range(*a)), len(range(*b)), -1)

        return values

    return {
        name: jax.make_array_from_callback(tuple(shape), placed, part(name), dtype=dtype)
        for name, dtype in DTYPES.items()
    }


def abstract_batch(shape: Sequence[int], placed: NamedSharding) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=placed) for name, dtype in DTYPES.items()}
