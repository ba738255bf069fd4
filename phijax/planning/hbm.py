"""What lies in HBM at the worst moment of a compiled program, read from its schedule.

Two values share a buffer where the text makes them: a loop's carry, an update in place, an output that takes over a
donated input, both ends of an asynchronous operation. All else gets a buffer from its operation to its last use.
"""

import collections
import dataclasses
import functools
import re

from phijax.parallel.program_text import Array, Operation, Program

# Operations whose result is their operand under another name or type.
RENAMING = frozenset({"bitcast", "opt-barrier", "tuple", "while", "add-dependency", "async-update", "after-all"})


@dataclasses.dataclass(frozen=True)
class Buffer:
    array: Array
    operation: str  # that made it; of an argument, its name
    source: str
    argument: int | None  # number of the program's argument that it holds

    @property
    def bytes(self) -> float:
        return self.array.padded_bytes


@dataclasses.dataclass(frozen=True)
class Peak:
    """bytes: of all buffers that are alive together; where: the operation."""

    buffers: tuple[Buffer, ...]
    where: str

    @property
    def bytes(self) -> float:
        return sum(buffer.bytes for buffer in self.buffers)


def peak(program: Program) -> Peak:
    """The moment when most bytes of HBM are held, loops followed down to the innermost."""
    return _Computation(program, program.entry, inside_loop=False).peak()


class _Computation:
    """Buffers of one computation. Leaves are (operation name, index in its result); sets of leaves share a buffer."""

    def __init__(self, program: Program, name: str, *, inside_loop: bool):
        self.program, self.name, self.inside_loop = program, name, inside_loop
        self.operations = program.computations[name]
        self.by_name = {o.name: o for o in self.operations}
        self.parent: dict[tuple[str, int], tuple[str, int]] = {}
        for o in self.operations:
            self._join(o)
        self._join_root(self.operations[-1])

    def peak(self) -> Peak:
        """Of a loop's body: without what its carry holds, which lies outside."""
        first, last = self._spans()
        starts, ends = collections.defaultdict(list), collections.defaultdict(list)
        for leaf, place in first.items():
            starts[place].append(leaf)
            ends[last[leaf]].append(leaf)
        alive: dict[tuple[str, int], Buffer] = {}
        held, best = 0.0, Peak((), "")
        most = 0.0
        for place, o in enumerate(self.operations):
            for leaf in starts[place]:
                if (buffer := self._buffer(leaf)) is not None:
                    alive[leaf] = buffer
                    held += buffer.bytes
            inner = self._inner(o)
            total = held + (inner.bytes if inner else 0.0)
            if total > most:
                most = total
                best = Peak((*alive.values(), *(inner.buffers if inner else ())), inner.where if inner else o.name)
            for leaf in ends[place]:
                if leaf in alive:
                    held -= alive.pop(leaf).bytes
        return best

    def _inner(self, o: Operation) -> Peak | None:
        if o.opcode == "while":
            body = o.attribute(r"body=%?([\w.\-]+)")
            return _Computation(self.program, body, inside_loop=True).peak()
        if o.opcode in ("call", "conditional") and o.called:
            inner = [_Computation(self.program, name, inside_loop=True).peak() for name in o.called]
            return max(inner, key=lambda p: p.bytes)
        return None

    def _spans(self) -> tuple[dict, dict]:
        """First and last place of every buffer. An argument is there throughout; the carry belongs to the outside."""
        first: dict[tuple[str, int], int] = {}
        last: dict[tuple[str, int], int] = {}
        end = len(self.operations) - 1
        outside = set()
        for place, o in enumerate(self.operations):
            for index in range(len(o.arrays)):
                leaf = self._find((o.name, index))
                if o.opcode == "parameter":
                    first[leaf], last[leaf] = 0, end
                    outside |= {leaf} if self.inside_loop else set()
                else:
                    first.setdefault(leaf, place)
                    last[leaf] = max(last.get(leaf, place), place)
            for operand, index in self._reads(o):
                leaf = self._find((operand, index))
                if leaf in last:
                    last[leaf] = max(last[leaf], place)
        return {leaf: place for leaf, place in first.items() if leaf not in outside}, last

    def _reads(self, o: Operation) -> list[tuple[str, int]]:
        if o.opcode == "get-tuple-element":
            return [(o.operands[0], int(o.attribute(r"index=(\d+)") or 0))]
        return [(name, i) for name in o.operands if name in self.by_name for i in range(self._width(name))]

    def _width(self, name: str) -> int:
        return len(self.by_name[name].arrays)

    def _buffer(self, leaf: tuple[str, int]) -> Buffer | None:
        """The largest array that the leaf's buffer holds, if it lies in HBM."""
        members = self._members[leaf]
        made = [(self.by_name[name], self.by_name[name].arrays[index]) for name, index in members]
        in_hbm = [(o, array) for o, array in made if array.in_hbm]
        if not in_hbm or in_hbm[0][0].opcode == "constant":
            return None
        o, array = max(in_hbm, key=lambda pair: pair[1].padded_bytes)
        argument = next((int(o.inside) for o, _ in made if o.opcode == "parameter"), None)
        source = next((o.source for o, _ in made if o.source), "")
        return Buffer(array, o.name, source, None if self.inside_loop else argument)

    @functools.cached_property
    def _members(self) -> dict[tuple[str, int], list[tuple[str, int]]]:
        members = collections.defaultdict(list)
        for o in self.operations:
            for index in range(len(o.arrays)):
                members[self._find((o.name, index))].append((o.name, index))
        return members

    # Which leaves share a buffer: union-find.

    def _find(self, leaf: tuple[str, int]) -> tuple[str, int]:
        while (parent := self.parent.get(leaf, leaf)) != leaf:
            leaf = parent
        return leaf

    def _unite(self, a: tuple[str, int], b: tuple[str, int]) -> None:
        a, b = self._find(a), self._find(b)
        if a != b:
            self.parent[b] = a

    def _join(self, o: Operation) -> None:
        """What `o`'s result shares with its operands."""
        known = [name for name in o.operands if name in self.by_name]
        if not known:
            return
        if o.opcode == "get-tuple-element":
            self._unite((known[0], int(o.attribute(r"index=(\d+)") or 0)), (o.name, 0))
        elif o.opcode in RENAMING:
            leaves = [(name, i) for name in known for i in range(self._width(name))]
            for index, leaf in zip(range(len(o.arrays)), leaves, strict=False):
                self._unite(leaf, (o.name, index))
        elif o.opcode == "dynamic-update-slice":
            self._unite((known[0], 0), (o.name, 0))
        elif o.opcode.endswith("-start"):
            self._same_arrays(o, known, once=True)
        elif o.opcode.endswith("-done"):
            self._same_arrays(o, known[:1], once=False)
        elif o.opcode == "fusion":
            for index, operand in self._in_place(o):
                if operand < len(o.operands) and o.operands[operand] in self.by_name and index < len(o.arrays):
                    self._unite((o.operands[operand], 0), (o.name, index))
        elif o.opcode == "custom-call" and o.target == "ConcatBitcast":
            self._unite((known[0], 0), (o.name, 0))

    def _same_arrays(self, o: Operation, operands: list[str], *, once: bool) -> None:
        """Both ends of an asynchronous operation: arrays of the same type are the same buffer."""
        free = [(name, i) for name in operands for i in range(self._width(name))]
        for index, array in reversed(list(enumerate(o.arrays))) if once else enumerate(o.arrays):
            for leaf in free:
                if self.by_name[leaf[0]].arrays[leaf[1]] == array:
                    self._unite(leaf, (o.name, index))
                    free.remove(leaf)
                    break

    def _in_place(self, o: Operation) -> list[tuple[int, int]]:
        """(index of the result, operand) pairs of a fusion that writes into its operand."""
        written = o.attribute(r"output_to_operand_aliasing=\{(.*?\))\}")
        if written:
            pairs = re.findall(r"\{(\d*)\}: \((\d+), \{\}\)", written)
            return [(int(index or 0), int(operand)) for index, operand in pairs]
        called = o.called[0] if o.called else ""
        inside = self.program.computations.get(called, ())
        if not inside:
            return []
        root = inside[-1]
        results = root.operands if root.opcode == "tuple" else (root.name,)
        pairs = []
        for index, name in enumerate(results):
            update = self._through(called, name)
            if update is not None and update.opcode == "dynamic-update-slice":
                target = self._through(called, update.operands[0])
                if target is not None and target.opcode == "parameter":
                    pairs.append((index, int(target.inside)))
        return pairs

    def _through(self, computation: str, name: str) -> Operation | None:
        """The operation behind bitcasts."""
        o = self.program.operation(computation, name)
        while o is not None and o.opcode == "bitcast":
            o = self.program.operation(computation, o.operands[0])
        return o

    def _join_root(self, root: Operation) -> None:
        """A body's results lie where its parameters do; the program's where its donated arguments were."""
        parameter = next((o for o in self.operations if o.opcode == "parameter"), None)
        if self.inside_loop and parameter and len(parameter.arrays) == len(root.arrays):
            for index in range(len(root.arrays)):
                self._unite((parameter.name, index), (root.name, index))
        elif not self.inside_loop:
            arguments = {int(o.inside): o.name for o in self.operations if o.opcode == "parameter"}
            for output, argument in self.program.donated:
                if argument in arguments and output < len(root.arrays):
                    self._unite((arguments[argument], 0), (root.name, output))
