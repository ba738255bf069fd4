"""Reads out of a compiled program which devices exchange data, and whether once or in a loop."""

import collections
import re

import numpy as np

from phijax.parallel import hlo
from phijax.parallel.program_text import parse


def device_groups(line: str) -> list[list[int]]:
    """Which devices exchange data, in any of the three ways in which XLA writes it."""
    listed = re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", line)
    if listed:
        return [[int(d) for d in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if iota:
        return _iota(iota[2], iota[3]).reshape(_numbers(iota[1])).tolist()
    mesh = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}",
        line,
    )
    assert mesh, line
    axes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
    sizes, over = [int(size) for size in axes.values()], re.findall(r"'(\w+)'", mesh[4])
    devices = (_iota(mesh[2], mesh[3]) if mesh[2] else np.arange(np.prod(sizes))).reshape(sizes)
    summed = [i for i, axis in enumerate(axes) if axis in over]
    moved = np.moveaxis(devices, summed, range(-len(summed), 0))
    return moved.reshape(-1, int(np.prod([sizes[i] for i in summed]))).tolist()


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _iota(sizes: str, order: str | None) -> np.ndarray:
    devices = np.arange(np.prod(_numbers(sizes))).reshape(_numbers(sizes))
    return devices.transpose(_numbers(order)) if order else devices


def over_axis(text: str, shape: tuple[int, ...], *, axis: int) -> list[tuple[str, bool]]:
    """(line, whether it stands in a loop) of each exchange between devices of different coordinate along a mesh axis.

    Args:
      text: of a compiled program. shape: of the mesh, its devices in order. axis: which of them.
    """
    place = np.unravel_index(np.arange(np.prod(shape)), shape)[axis]
    inside, found, computation = hlo.loop_computations(text), [], ""
    for line in text.splitlines():
        started = re.match(r"^(?:ENTRY )?%([\w.\-]+) \(", line)
        computation = started[1] if started else computation
        opcode = re.search(r" (all-reduce|reduce-scatter|all-gather|all-to-all)(-start)?\(", line)
        if not opcode:
            continue
        groups = device_groups(line)
        if any(len({place[d] for d in group}) > 1 for group in groups):
            found.append((line, computation in inside))
    return found


def moved(text: str, kind: str) -> collections.Counter:
    """(dtype, shape without ones) of the arrays that collectives of one kind make -> how often in a run of the program.

    Args:
      text: of a program compiled for CPUs. kind: "all-gather", "all-reduce", "reduce-scatter".
    """
    program, found = parse(text), collections.Counter()

    def visit(computation: str, times: int) -> None:
        for o in program.computations[computation]:
            if o.opcode == kind:
                for a in o.arrays:
                    found[a.dtype, tuple(n for n in a.shape if n > 1)] += times
            elif o.opcode in ("while", "call", "conditional"):
                for called in o.called:
                    visit(called, times * (program.trips(o) if o.opcode == "while" else 1))

    visit(program.entry, 1)
    return found
