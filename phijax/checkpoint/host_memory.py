"""Will a save fit in this host's memory? Asked before the first one, since the answer of the kernel is SIGKILL."""

import math
from typing import Any

import jax

from phijax.errors import UserError

SYNCHRONOUS_LIMIT_GB = 4  # a synchronous save copies this much to the host at a time, or one array if that is larger
WARN_FRACTION = 0.8


def bytes_held_by_save(tree: Any, *, asynchronous: bool) -> int:
    """Upper bound of the host bytes that this process needs while it saves `tree` (arrays or shapes with shardings).

    Each distinct piece of an array that lies on this process's devices counts once; a replica written by another
    process counts all the same.
    """
    sizes = [_distinct_bytes(leaf) for leaf in jax.tree.leaves(tree)]
    if asynchronous:
        return sum(sizes)
    return min(sum(sizes), max(max(sizes, default=0), SYNCHRONOUS_LIMIT_GB * 10**9))


def bytes_on_host(tree: Any) -> int:
    """Of shapes whose shardings lie in the memory of this process's host: what they will take there.

    Every device keeps its own piece there, replicas too.
    """
    return sum(
        len(leaf.sharding.addressable_devices) * math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding.memory_kind == "pinned_host"
    )


def available_bytes() -> int | None:
    """Host memory that can be taken now: the smaller of the machine's and the container's; None if unknown."""
    bounds = [bound for bound in (_machine_available(), _container_available()) if bound is not None]
    return min(bounds, default=None)


def check(tree: Any, *, asynchronous: bool, available: int | None) -> str | None:
    """A warning line if a save of `tree` comes close to `available` bytes. Raises UserError if it does not fit.

    Arrays that lie in the host's memory have taken what they need; shapes that will lie there have not.
    """
    if available is None:
        return None
    resident = bytes_on_host(tree)
    needed = bytes_held_by_save(tree, asynchronous=asynchronous) + resident
    sizes = f"{needed / 1e9:.1f} GB of host memory in this process"
    if resident:
        sizes += f", {resident / 1e9:.1f} of them for the optimizer's moments (optimizer.moments=host)"
    sizes += f"; {available / 1e9:.1f} GB are free"
    if needed > available:
        remedy = (
            "Say --config.checkpoint.asynchronous=False (the run then waits for each save), shard the state over more "
            if asynchronous
            else "Shard the state over more "
        )
        raise UserError(f"A save of the run's state needs {sizes}.\n{remedy}processes, or use hosts with more memory.")
    if needed > WARN_FRACTION * available:
        return f"WARNING: a save of the run's state needs {sizes}: little is left for the data loader."
    return None


def _distinct_bytes(leaf: Any) -> int:
    pieces = set()
    for index in leaf.sharding.addressable_devices_indices_map(leaf.shape).values():
        pieces.add(tuple(part.indices(size) for part, size in zip(index, leaf.shape, strict=True)))
    elements = sum(math.prod(stop - start for start, stop, _ in piece) for piece in pieces)
    return elements * leaf.dtype.itemsize


def _machine_available() -> int | None:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024  # in kB
    except (OSError, KeyError, ValueError):
        return None


def _container_available() -> int | None:
    """What the cgroup (version 2) still allows; file cache that the kernel would drop counts as free."""
    cgroup = "/sys/fs/cgroup/memory"
    try:
        with open(f"{cgroup}.max", encoding="ascii") as file:
            limit = file.read().strip()
        with open(f"{cgroup}.current", encoding="ascii") as file:
            used = int(file.read())
        with open(f"{cgroup}.stat", encoding="ascii") as file:
            cached = int(dict(line.split() for line in file)["inactive_file"])
        return None if limit == "max" else max(0, int(limit) - used + cached)
    except (OSError, ValueError, KeyError):
        return None
