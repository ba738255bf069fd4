"""The table from logical axes to mesh axes, and the three things done with it: spec, check, constrain."""

import math
from collections.abc import Iterable, Mapping, Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from phijax.errors import UserError, nearest_name

MESH_AXES = ("data", "fsdp", "context", "tensor")

RULES: dict[str, str | tuple[str, ...] | None] = {
    # Weights: rows are split, tensor first so that it cuts at heads; D never is (relayout copies cost 16 % of a step).
    "heads": ("tensor", "fsdp"),
    "kv_heads": ("tensor", "fsdp"),
    "ffn": ("tensor", "fsdp"),
    "vocab": ("tensor", "fsdp"),
    "embed": None,
    "layers": None,
    "position": None,  # a table of 2 to 7 MB: cut, its few rows a chip would not fill tiles
    "rank": None,  # of a change of low rank: 8 to 64, which few meshes would divide
    # Activations.
    "act_batch": ("data", "fsdp"),
    "act_time": "context",
    "act_heads": "tensor",
    "act_ffn": "tensor",
    "act_embed": None,
    "micro_batch": None,
}

TILE_ROWS = 8  # a shard of a multiple of 8 rows is gathered straight into the matrix unit's layout T(8,128)


def spec(axes: Sequence[str | None], *, gathered: bool = False) -> PartitionSpec:
    """PartitionSpec of an array whose dimensions carry these logical axes; inside a shard_map, of its local part.

    Args:
      axes: one logical name (or None) a dimension.
      gathered: leave out `fsdp`: what a weight looks like while it is used.
    Raises: UserError for a name that is not in the table, or a mesh axis that would be used twice.
    """
    used: dict[str, str] = {}
    entries = []
    for axis in axes:
        if axis is not None and axis not in RULES:
            near = nearest_name(axis, RULES)
            raise UserError(
                f"logical axis {axis!r} of {tuple(axes)} is not in the sharding table (parallel/sharding.py)."
                + (f" Nearest: {near!r}." if near else "")
            )
        rule = RULES[axis] if axis is not None else None
        names = () if rule is None else (rule,) if isinstance(rule, str) else rule
        names = open_axes(name for name in names if not (gathered and name == "fsdp"))
        for name in names:
            if name in used:
                raise UserError(
                    f"mesh axis {name!r} is used twice in {tuple(axes)}: by {used[name]!r} and by {axis!r}."
                )
            used[name] = str(axis)
        entries.append(names[0] if len(names) == 1 else names or None)
    return PartitionSpec(*entries)


def parts(axis: str, sizes: Mapping[str, int], *, gathered: bool = False) -> int:
    """Over how many chips a dimension of this logical axis is split on a mesh of these sizes."""
    entry = spec((axis,), gathered=gathered)[0]
    names = () if entry is None else (entry,) if isinstance(entry, str) else entry
    return math.prod(sizes[name] for name in names)


def even(shape: Sequence[int], axes: Sequence[str | None], sizes: Mapping[str, int]) -> tuple[str | None, ...]:
    """`axes` with None where a mesh of these sizes does not cut a dimension of this length evenly: it stays whole."""
    return tuple(
        None if axis is not None and length % parts(axis, sizes) else axis
        for length, axis in zip(shape, axes, strict=True)
    )


def check_divides(name: str, shape: Sequence[int], axes: Sequence[str], sizes: Mapping[str, int]) -> None:
    """Refuses, before memory is taken, an array that the mesh does not cut evenly.

    Raises: UserError with array, axis, sizes and the counts that would divide.
    """
    if len(shape) != len(axes):
        raise UserError(f"{name}: {len(shape)} dimensions {tuple(shape)} but {len(axes)} logical axes {tuple(axes)}.")
    spec(axes)
    for length, axis in zip(shape, axes, strict=True):
        count = parts(axis, sizes)
        if length % count:
            near = max(n for n in range(1, count + 1) if length % n == 0)
            raise UserError(
                f"{name}: axis {axis!r} has length {length}, which cannot be split over {count} chips "
                f"(mesh {dict(sizes)}, rule {RULES[axis]}).\nNearest that divides: {near}. Change the mesh."
            )


def sharding(mesh: Mesh, axes: Sequence[str | None]) -> NamedSharding:
    return NamedSharding(mesh, spec(axes))


def constrain(x: jax.Array, axes: Sequence[str | None], *, gathered: bool = False) -> jax.Array:
    """Pins the layout of an intermediate value to the table; without a mesh in context the value is left alone."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, gathered=gathered))


def open_axes(names: Iterable[str]) -> tuple[str, ...]:
    """Those mesh axes that no shard_map around the code being traced has cut already; over the others it sees one part.

    The train step is inside of one over `data` while it accumulates gradients.
    """
    outer = jax.sharding.get_abstract_mesh().manual_axes
    return tuple(name for name in names if name not in outer)


def mesh_sizes() -> dict[str, int]:
    """Sizes of the mesh in context; all ones without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return {name: 1 for name in MESH_AXES} if mesh.empty else dict(mesh.shape)


def row_warnings(
    leaves: Mapping[str, tuple[Sequence[int], Sequence[str]]], sizes: Mapping[str, int], *, ignore: Sequence[str] = ()
) -> list[str]:
    """Says which weights would leave a chip with rows that are not a multiple of 8, and the nearest fsdp that does not.

    Such a weight is gathered into layout T(2,128) and laid out anew before each matmul: measured on the TPU compiler,
    20 % of medium's matmul time at 140 rows a chip.

    Args:
      leaves: path -> (shape, logical axes).
      ignore: logical axes whose copies do not matter (grouped k and v are small).
    """
    ragged = {}
    for path, (shape, axes) in leaves.items():
        for length, axis in zip(shape, axes, strict=True):
            count = parts(axis, sizes)
            if count > 1 and axis not in ignore and length % (count * TILE_ROWS):
                ragged[path] = (length, count)
    if not ragged:
        return []
    best = sizes["fsdp"]
    while best > 1 and any(length % (best * sizes["tensor"] * TILE_ROWS) for length, _ in ragged.values()):
        best //= 2
    path, (length, count) = next(iter(ragged.items()))
    return [
        f"mesh {dict(sizes)} leaves {length / count:g} rows of {path} on a chip, not a multiple of {TILE_ROWS}: every "
        f"gather of it is followed by a relayout copy (so for {len(ragged)} weights). Nearest mesh that avoids it: "
        f"fsdp={best}, the remaining chips as data."
    ]
