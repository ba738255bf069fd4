"""Reads compiled programs: the few facts about XLA's text that layout and collectives are judged by."""

import dataclasses
import math
import re
from collections.abc import Iterator

_BYTES = {
    "pred": 1,
    "s4": 0.5,
    "u4": 0.5,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "f32": 4,
    "s32": 4,
}
_BYTES |= {"f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%([\w.\-]+) \(")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = ([a-z]\w*)\[([\d,]*)\](\{[^ ]*\})? ([\w\-]+)\((.*)$")
_WHILE = re.compile(r"\bwhile\(.*\bbody=%([\w.\-]+)")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition)=%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line with an array result; tuples are left out, since their parts have lines of their own."""

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
        return self.elements * _BYTES.get(self.dtype, 4)


def instructions(text: str) -> Iterator[Instruction]:
    """Every instruction of `compiled.as_text()` that makes one array, with the computation it stands in."""
    computation = ""
    for line in text.splitlines():
        started = _COMPUTATION.match(line)
        if started:
            computation = started[1]
            continue
        found = _INSTRUCTION.match(line)
        if found:
            name, dtype, dimensions, layout, opcode, rest = found.groups()
            shape = tuple(int(n) for n in dimensions.split(",") if n)
            yield Instruction(computation, name, dtype, shape, layout or "", opcode, rest)


def loop_computations(text: str) -> set[str]:
    """Computations that run once a trip of some loop: the bodies and all that they call, fusions included."""
    calls: dict[str, set[str]] = {}
    bodies, computation = set(), ""
    for line in text.splitlines():
        started = _COMPUTATION.match(line)
        if started:
            computation = started[1]
            continue
        calls.setdefault(computation, set()).update(_CALLED.findall(line))
        bodies.update(_WHILE.findall(line))
    reached, waiting = set(), list(bodies)
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += calls.get(name, ())
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
