"""A batch: a dict of global arrays (A, B, T, ...), built from the rows that each process's own devices ask for.

Which arrays there are, an objective declares (training/objectives.py): one `BatchKey` a name.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from phijax.data.row_source import Row
from phijax.errors import UserError
from phijax.parallel import sharding

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class BatchKey:
    """One array of a batch: (A, B, T, *axes); of a row (T, *axes).

    Micro-batches, rows and time are laid over the mesh as those of every other key; `axes` are whole on each device.
    padding: its value in rows that only fill a batch; they must count for nothing.
    """

    dtype: type[np.generic]
    axes: tuple[int, ...] = ()
    padding: int | float = 0


# What a row of text is made of (rows.make_row). Weights are 0 where nothing is to be predicted.
TEXT_KEYS = {
    "tokens": BatchKey(np.int32),
    "targets": BatchKey(np.int32),
    "segment_ids": BatchKey(np.int32),
    "positions": BatchKey(np.int32),
    "weights": BatchKey(np.float32),
}


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Micro-batches whole, rows over data and fsdp, time over context; axes after these whole."""
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


def assemble(
    reads: Mapping[str, BatchKey], shape: Sequence[int], placed: NamedSharding, rows: Mapping[int, Row]
) -> Batch:
    """Global arrays (A, B, T, ...) from this process's rows.

    Right also where `context` or `tensor` spans hosts: every device slices its part from whole rows.

    Args:
      reads: the batch's keys. shape: (A, B, T).
      rows: index in the step -> arrays (T, ...), at least those of `local_rows`.
    Raises: UserError as `check_row`.
    """
    per_micro, length = shape[1:]
    for row in rows.values():
        check_row(row, reads, length)

    def part(name: str) -> Callable:
        def values(index) -> np.ndarray:
            a, b, t = (s.indices(n) for s, n in zip(index, shape, strict=False))  # all of the axes after T
            picked = [rows[i * per_micro + j][name][slice(*t)] for i in range(*a) for j in range(*b)]
            return np.stack(picked).reshape(len(range(*a)), len(range(*b)), *picked[0].shape)

        return values

    return {
        name: jax.make_array_from_callback((*shape, *key.axes), placed, part(name), dtype=key.dtype)
        for name, key in reads.items()
    }


def check_row(row: Row, reads: Mapping[str, BatchKey], length: int) -> None:
    """Raises: UserError for a row whose arrays are not those that the objective reads; nothing is cast or left out."""
    found = {name: (array.shape, array.dtype) for name, array in row.items()}
    asked = {name: ((length, *key.axes), np.dtype(key.dtype)) for name, key in reads.items()}
    for name in asked | found:
        if found.get(name) != asked.get(name):
            raise UserError(
                f"A row has {_shown(found.get(name))} as {name!r}; the objective reads {_shown(asked.get(name))}. Rows "
                "and objective of a task belong together (tasks.py)."
            )


def _shown(array: tuple[tuple[int, ...], np.dtype] | None) -> str:
    return "nothing" if array is None else f"{array[1]} {array[0]}"


def padding_row(reads: Mapping[str, BatchKey], length: int) -> Row:
    """A row that counts for nothing, which fills the last batch of a held-out set."""
    return {name: np.full((length, *key.axes), key.padding, key.dtype) for name, key in reads.items()}


def abstract_batch(
    reads: Mapping[str, BatchKey], shape: Sequence[int], placed: NamedSharding
) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct((*shape, *key.axes), key.dtype, sharding=placed) for name, key in reads.items()}
