"""The few facts about compiled programs that layout and collectives are judged by."""

import dataclasses
import math
from collections.abc import Iterator

from phijax.parallel.program_text import BYTES, parse


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An operation with an array result; tuples are left out, since their parts have operations of their own."""

    computation: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    layout: str  # "{1,0:T(8,128)(2,1)}", or "" where the text gives none
    opcode: str
    rest: str  # operands and attributes

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> float:
        return self.elements * BYTES.get(self.dtype, 4)


def instructions(text: str) -> Iterator[Instruction]:
    """Every operation of `compiled.as_text()` that makes one array, with the computation it stands in."""
    for computation, operations in parse(text).computations.items():
        for o in operations:
            if o.result.startswith("(") or not o.arrays:
                continue
            (array,) = o.arrays
            rest = f"{o.inside}){o.attributes}"
            yield Instruction(computation, o.name, array.dtype, array.shape, array.layout, o.opcode, rest)


def loop_computations(text: str) -> set[str]:
    """Computations that run once a trip of some loop: the bodies and all that they call, fusions included."""
    computations = parse(text).computations
    loops = [o for operations in computations.values() for o in operations if o.opcode == "while"]
    reached, waiting = set(), [body for loop in loops if (body := loop.attribute(r"body=%?([\w.\-]+)"))]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            for o in computations.get(name, ()):
                condition = o.attribute(r"condition=%?([\w.\-]+)")
                waiting += [*o.called, *([condition] if condition else [])]
    return reached


def relayouts(text: str, elements: set[int]) -> list[Instruction]:
    """Copies and true transposes inside loops whose result has one of these element counts.

    A copy-start to another memory keeps its layout and is not meant; a transpose that moves no data stands as bitcast.
    """
    inside = loop_computations(text)
    return [
        i
        for i in instructions(text)
        if i.computation in inside and i.opcode in ("copy", "transpose") and i.elements in elements
    ]
