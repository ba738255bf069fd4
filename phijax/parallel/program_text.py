"""A compiled program, read from its text: computations, operations, arrays with their layouts. Knows no chip.

The text of a TPU program is scheduled: operations stand in the order in which they are issued.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

BYTES = {
    **{"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1},
    **{"bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8},
}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*-> .*\{$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|true_computation)=%?([\w.\-]+)|(?:branch|called)_computations=\{([^}]*)\}"
)


@dataclasses.dataclass(frozen=True)
class Array:
    """One array type: "bf16[32,4096,96]{2,1,0:T(8,128)(2,1)S(1)}"."""

    dtype: str
    shape: tuple[int, ...]
    layout: str

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> float:
        return BYTES.get(self.dtype, 4) * self.elements

    @property
    def in_hbm(self) -> bool:
        """Memory spaces other than 0 are written S(n): VMEM, scalars, semaphores, the host."""
        return "S(" not in self.layout

    @property
    def on_host(self) -> bool:
        return "S(5)" in self.layout

    @property
    def padded_bytes(self) -> float:
        """Bytes with each tile filled up: a minor dimension of 96 lies in rows of 128."""
        tile = re.search(r":T\(([\d,]+)\)", self.layout)
        order = [int(n) for n in re.findall(r"\d+", self.layout.split(":")[0])]
        if not tile or len(order) != len(self.shape):
            return self.bytes
        shape = [self.shape[axis] for axis in reversed(order)]  # minor last
        sides = [int(n) for n in tile[1].split(",")]
        for i, side in enumerate(reversed(sides), start=1):
            if i <= len(shape):
                shape[-i] = -(-shape[-i] // side) * side
        return BYTES.get(self.dtype, 4) * math.prod(shape)


def arrays_in(text: str) -> tuple[Array, ...]:
    return tuple(
        Array(dtype, tuple(int(n) for n in dims.split(",") if n), layout or "")
        for dtype, dims, layout in _ARRAY.findall(text)
    )


@dataclasses.dataclass(frozen=True)
class Operation:
    """One line: name = result opcode(operands), attributes."""

    name: str
    opcode: str
    result: str
    operands: tuple[str, ...]
    inside: str  # the text between the parentheses
    attributes: str
    is_root: bool

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """The result's arrays, those of a tuple in order."""
        return arrays_in(self.result)

    @property
    def bytes(self) -> float:
        return sum(array.bytes for array in self.arrays)

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        found = []
        for one, many in _CALLED.findall(self.attributes):
            found += [one] if one else re.findall(r"[\w.\-]+", many)
        return tuple(found)

    @functools.cached_property
    def cycles(self) -> int | None:
        """The compiler's own estimate; None where it makes none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found[1]) if found else None

    @property
    def channel(self) -> str | None:
        return self.attribute(r"channel_id=(\d+)")

    @property
    def source(self) -> str:
        """Where it comes from in the traced function."""
        return self.attribute(r'op_name="([^"]*)"') or ""

    @property
    def target(self) -> str | None:
        return self.attribute(r'custom_call_target="([^"]*)"')

    def attribute(self, pattern: str) -> str | None:
        found = re.search(pattern, self.attributes)
        return found[1] if found else None


@dataclasses.dataclass(frozen=True)
class Program:
    """entry: name of the computation that is run; partitions: chips that run it together.

    donated: (output, argument) that share a buffer.
    """

    computations: dict[str, list[Operation]]
    entry: str
    partitions: int
    donated: tuple[tuple[int, int], ...] = ()

    def operation(self, computation: str, name: str) -> Operation | None:
        return self._by_name.get((computation, name))

    @functools.cached_property
    def _by_name(self) -> dict[tuple[str, str], Operation]:
        return {(where, o.name): o for where, operations in self.computations.items() for o in operations}

    def within(self, computation: str) -> Iterator[tuple[str, Operation]]:
        """(computation, operation) of a computation and of all that it calls."""
        for operation in self.computations.get(computation, ()):
            yield computation, operation
            for called in operation.called:
                yield from self.within(called)

    def trips(self, loop: Operation) -> int:
        """How often a while's body runs; 1 where the text does not say.

        From the backend's count, or the largest constant of the condition over the counter's increment.
        """
        known = loop.attribute(r"known_trip_count[^\d]*(\d+)")
        if known:
            return int(known)
        condition, body = loop.attribute(r"condition=%?([\w.\-]+)"), loop.attribute(r"body=%?([\w.\-]+)")
        limits = [value for o in self.computations.get(condition, ()) if (value := _constant(o)) is not None]
        return max(1, max(limits, default=1) // self._increment(condition, body))

    def _increment(self, condition: str, body: str) -> int:
        read = next((o for o in self.computations[condition] if o.opcode == "get-tuple-element"), None)
        root = self.computations[body][-1]
        index = int(read.attribute(r"index=(\d+)")) if read else None
        if index is None or root.opcode != "tuple" or index >= len(root.operands):
            return 1
        step = self.operation(body, root.operands[index])
        while step and step.opcode in ("copy", "bitcast"):
            step = self.operation(body, step.operands[0])
        if step is None or step.opcode != "add":
            return 1
        added = [_constant(o) for name in step.operands if (o := self.operation(body, name))]
        return max([1, *(value for value in added if value)])


def _constant(operation: Operation) -> int | None:
    if operation.opcode != "constant" or not re.match(r"[su]32\[\]", operation.result):
        return None
    return int(operation.inside) if re.fullmatch(r"-?\d+", operation.inside) else None


def parse(text: str) -> Program:
    """Reads `compiled.as_text()`."""
    computations: dict[str, list[str]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if started := _COMPUTATION.match(line):
            current = computations.setdefault(started[2], [])
            entry = started[2] if started[1] else entry
        elif line.rstrip() == "}" or line.startswith("}, execution_thread"):
            # A kernel's metadata has a line that begins with "}" and goes on; this one ends the computation.
            current = None
        elif current is not None and _OPERATION.match(line):
            current.append(line)
        elif current:
            current[-1] += f" {line}"
    partitions = re.search(r"num_partitions=(\d+)", text)
    read = {name: [o for line in lines if (o := _operation(line))] for name, lines in computations.items()}
    donated = re.findall(r"\{(\d+)\}: \((\d+), \{\}, (?:may|must)-alias\)", text[: text.find("\n")])
    pairs = tuple((int(output), int(argument)) for output, argument in donated)
    return Program(read, entry, int(partitions[1]) if partitions else 1, pairs)


def _operation(line: str) -> Operation | None:
    named = _OPERATION.match(line)
    start = named.end()
    end = _closing(line, start) if line[start] == "(" else line.index(" ", start)
    opcode = re.match(r" ?([a-z][\w\-]*)\(", line[end:])
    if not opcode:
        return None
    opened = end + opcode.end() - 1
    closed = _closing(line, opened)
    inside = line[opened + 1 : closed - 1]
    return Operation(
        name=named[1],
        opcode=opcode[1],
        result=line[start:end],
        operands=tuple(re.findall(r"%([\w.\-]+)", inside)),
        inside=inside,
        attributes=line[closed:],
        is_root=line.lstrip().startswith("ROOT "),
    )


def _closing(line: str, opened: int) -> int:
    """The place behind the parenthesis that closes the one at `opened`."""
    depth = 0
    for place in range(opened, len(line)):
        depth += {"(": 1, ")": -1}.get(line[place], 0)
        if depth == 0:
            return place + 1
    return len(line)
