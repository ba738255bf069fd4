"""Seconds of a compiled TPU program, without a TPU: its schedule replayed on several clocks.

The matrix and vector core runs operation after operation, each for the cycles that the compiler itself expects. Links
between chips, copies between HBM and VMEM, and those from and to the host's memory run beside it: a start enqueues, a
done waits for what is not finished.
What carries no cycles (collectives, Pallas kernels) is modelled in `interconnect.py` and `kernels.py`.
"""

import collections
import dataclasses
import re
from typing import Literal

from phijax.parallel.program_text import Operation, Program, parse
from phijax.planning import interconnect, kernels
from phijax.planning.assumptions import SMALLEST_COUNTED, VMEM_SPEEDUP, Chip
from phijax.planning.interconnect import COLLECTIVES, Torus

FREE = frozenset(
    {
        "parameter",
        "get-tuple-element",
        "tuple",
        "constant",
        "bitcast",
        "partition-id",
        "replica-id",
        "after-all",
        "opt-barrier",
        "add-dependency",
    }
)


@dataclasses.dataclass
class Traffic:
    """Of one kind of collective and size of group, over a whole step: how often, bytes of whole arrays, seconds."""

    count: int = 0
    bytes: float = 0.0
    seconds: float = 0.0


@dataclasses.dataclass
class Estimate:
    """Seconds of one step. matrix + vector + attention + exposed + waiting + host = step."""

    step: float = 0.0
    matrix: float = 0.0  # operations with a matrix product in them
    vector: float = 0.0  # all other operations, copies included
    attention: float = 0.0  # Pallas kernels
    exposed: float = 0.0  # collectives that the core waits for
    overlapped: float = 0.0  # collectives beside the core's work; not part of the sum
    waiting: float = 0.0  # for copies between HBM and VMEM
    host: float = 0.0  # for copies from and to the host's memory
    kinds: dict[str, float] = dataclasses.field(default_factory=collections.Counter)  # kind of operation -> seconds
    operations: dict[str, float] = dataclasses.field(default_factory=collections.Counter)  # one by one
    collectives: dict[str, Traffic] = dataclasses.field(default_factory=lambda: collections.defaultdict(Traffic))
    core_cycles: int = 0  # the compiler's own, outside of collectives and kernels: exact, for gates


def estimate(text: str | Program, chip: Chip, torus: Torus, *, window: int | None = None) -> Estimate:
    """Replays `compiled.as_text()`.

    Args:
      window: of the attention kernels' masks; the text does not say (kernels.seconds).
    """
    program = text if isinstance(text, Program) else parse(text)
    replay = _Replay(program, chip, torus, window)
    result = replay.result
    result.step = replay.run(program.entry, 1)
    result.overlapped = max(0.0, sum(t.seconds for t in result.collectives.values()) - result.exposed)
    return result


class _Replay:
    def __init__(self, program: Program, chip: Chip, torus: Torus, window: int | None):
        self.program, self.chip, self.torus, self.window = program, chip, torus, window
        self.result = Estimate()

    def run(self, computation: str, times: int) -> float:
        """Seconds of one run of a computation; adds those of `times` runs to the result. Each trip starts idle."""
        core, copies, links, host = 0.0, 0.0, {"+": 0.0, "-": 0.0}, {"in": 0.0, "out": 0.0}
        pending: dict[str, tuple[float, str]] = {}  # name or channel -> when it is finished, what a wait for it is
        for o in self.program.computations[computation]:
            if o.opcode in FREE:
                continue
            if o.opcode == "while":
                trips = self.program.trips(o)
                body = o.attribute(r"body=%?([\w.\-]+)")
                core += trips * self.run(body, times * trips)
            elif o.opcode in ("call", "conditional"):
                core += self.run(o.called[0], times) if o.called else 0.0
            elif o.opcode.endswith("-update"):
                pending[o.name] = pending.get(o.operands[0], (core, "exposed"))
            elif o.opcode.endswith("-done"):
                core = self._wait(core, pending.get(o.operands[0]), times)
            elif communication := self._communication(o, computation):
                collective, where, stage = communication
                if stage == "done":
                    core = self._wait(core, pending.get(f"channel {collective.channel}"), times)
                    continue
                took, ways = self._collective(o, collective, where, times)
                finished = max(core, *(links[way] for way in ways)) + took
                links.update(dict.fromkeys(ways, finished))
                if stage == "start":
                    pending[o.name] = pending[f"channel {collective.channel}"] = (finished, "exposed")
                else:
                    core = self._wait(core, (finished, "exposed"), times)
            elif o.opcode.endswith("-start") and (way := _over_the_host(o)):
                host[way] = max(host[way], core) + _crossing(o) / self.chip.host_bandwidth
                pending[o.name] = (host[way], "host")
            elif o.opcode.endswith("-start"):
                # The text names both ends of a copy: half the bytes move.
                copies = max(copies, core) + o.bytes / 2 / self.chip.hbm_bandwidth
                pending[o.name] = (copies, "waiting")
            else:
                core += self._work(o, times)
        return core

    def _wait(self, core: float, awaited: tuple[float, str] | None, times: int) -> float:
        if awaited is None or awaited[0] <= core:
            return core
        finished, field = awaited
        setattr(self.result, field, getattr(self.result, field) + (finished - core) * times)
        return finished

    def _communication(self, o: Operation, computation: str) -> tuple[Operation, str, str] | None:
        """(the collective, its computation, "start", "done" or "whole") if `o` is one, or a fusion around one.

        A fusion in which steps of a collective go on beside a matrix product is the product's work, not the links'.
        """
        base = o.opcode.removesuffix("-start")
        if base in COLLECTIVES:
            return o, computation, "start" if o.opcode.endswith("-start") else "whole"
        if o.opcode not in ("fusion", "async-start", "call-start", "custom-call-start"):
            return None
        inside = [pair for called in o.called for pair in self.program.within(called)]
        found = next(((c, where) for where, c in inside if c.opcode.removesuffix("-start") in COLLECTIVES), None)
        if found is None:
            return None
        targets = {c.target for where, c in inside if where == o.called[0]} - {None}
        if o.opcode != "fusion":
            return *found, "start"
        if "AsyncCollectiveDone" in targets:
            return *found, "done"
        if o.called[0].startswith("async_collective_fusion"):
            return None
        return *found, "start" if "AsyncCollectiveStart" in targets else "whole"

    def _collective(self, o: Operation, collective: Operation, where: str, times: int) -> tuple[float, str]:
        """(seconds on the links, their directions); counts the traffic."""
        kind = collective.opcode.removesuffix("-start")
        sizes = [array.bytes for array in collective.arrays]
        # A start's tuple holds operands and results, a plain one's the results of arrays that travel together.
        size = max(sizes) if collective.opcode.endswith("-start") else sum(sizes)
        if kind == "reduce-scatter":
            sources = (self.program.operation(where, name) for name in collective.operands)
            size = max([size, sum(source.bytes for source in sources if source)])
        if kind == "all-reduce" and o.opcode == "fusion" and o.bytes < 0.75 * size:
            kind = "reduce-scatter"  # fused: every chip keeps its part alone
        group = interconnect.first_group(collective.attributes, self.program.partitions)
        took = interconnect.seconds(kind, size, group, self.torus, self.chip)
        traffic = self.result.collectives[f"{kind} over {2 if kind == 'collective-permute' else len(group)}"]
        traffic.count += times
        traffic.bytes += size * times
        traffic.seconds += took * times
        way = interconnect.ring_direction(collective.attributes, self.program.partitions)
        return took, way if kind == "collective-permute" and way else "+-"

    def _work(self, o: Operation, times: int) -> float:
        """Seconds of an operation of the core."""
        if o.opcode == "custom-call" and o.target == kernels.KERNEL_TARGET:
            took = kernels.seconds(o, self.chip, window=self.window)
            self.result.attention += took * times
            return self._count(f"kernel {re.sub(r'[.0-9]+$', '', o.name)}", o, took, times)
        if o.opcode == "custom-call":
            return 0.0
        if o.cycles is not None:
            took = o.cycles / self.chip.clock
            self.result.core_cycles += o.cycles * times
            if self._has_product(o):
                self.result.matrix += took * times
                return self._count("matrix product", o, took, times)
        elif o.bytes > SMALLEST_COUNTED:
            took = 2 * o.bytes / self.chip.hbm_bandwidth / (VMEM_SPEEDUP if "S(1)" in o.result else 1.0)
        else:
            return 0.0
        self.result.vector += took * times
        return self._count(_vector_kind(o), o, took, times)

    def _count(self, kind: str, o: Operation, took: float, times: int) -> float:
        self.result.kinds[kind] += took * times
        self.result.operations[f"{o.name} {o.result[:60]} {o.source[-60:]}"] += took * times
        return took

    def _has_product(self, o: Operation) -> bool:
        inside = [c for called in o.called for _, c in self.program.within(called)]
        return any(c.opcode in ("convolution", "dot") for c in (o, *inside))


def _over_the_host(o: Operation) -> Literal["in", "out"] | None:
    """The way of a copy, or of a slice's, between HBM and the host's memory."""
    arrays = [array for array in o.arrays if array.shape]
    if not any(array.on_host for array in arrays):
        return None
    result = arrays[0] if o.opcode == "copy-start" else arrays[-1]  # a slice's operands stand before it
    return "out" if result.on_host else "in"


def _crossing(o: Operation) -> float:
    """Bytes of such a copy: of a slice, or of what is written over one, and not of the whole that it is cut from."""
    return min(array.bytes for array in o.arrays if array.shape)


def _vector_kind(o: Operation) -> str:
    """A coarse name for work without matrix products, from the names that XLA gives its fusions."""
    words = f"{o.name} {o.opcode} {o.source.rsplit('/', 1)[-1]}".replace("-", "_")
    for kind, marks in (
        ("write into a stack", ("dynamic_update_slice",)),
        ("read from a stack", ("dynamic_slice", "dynamic_index")),
        ("copy and transpose", ("copy", "transpose")),
        ("sum and maximum", ("reduce",)),
        ("conversion", ("convert",)),
    ):
        if any(mark in words for mark in marks):
            return kind
    return "elementwise"
