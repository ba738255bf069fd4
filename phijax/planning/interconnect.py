"""Collectives on a torus: which chips take part, over which axes they lie, how long bytes take."""

import dataclasses
import math
import re
from collections.abc import Sequence

from phijax.planning.assumptions import COLLECTIVE_LATENCY, DCN_BANDWIDTH_PER_HOST, Chip

COLLECTIVES = frozenset(
    {
        "all-gather",
        "all-reduce",
        "reduce-scatter",
        "all-to-all",
        "collective-permute",
        "ragged-all-to-all",
        "collective-broadcast",
    }
)


@dataclasses.dataclass(frozen=True)
class Torus:
    """Where the chips of a program lie.

    shape: chips along each axis of a slice. coordinates: of partition 0, 1, ...; the order of the mesh, not of device
    ids. slices: which slice each lies in; () where there is one.
    """

    shape: tuple[int, ...]
    coordinates: tuple[tuple[int, ...], ...]
    slices: tuple[int, ...] = ()

    @classmethod
    def in_order(cls, shape: Sequence[int]) -> "Torus":
        """Partitions counted along the first axis fastest."""
        coordinates = []
        for number in range(math.prod(shape)):
            place = []
            for length in shape:
                place.append(number % length)
                number //= length
            coordinates.append(tuple(place))
        return cls(tuple(shape), tuple(coordinates))

    def by_slice(self, group: Sequence[int]) -> tuple[list[int], int]:
        """Those of a group that share a slice with its first one; over how many slices it reaches."""
        if not self.slices:
            return list(group), 1
        home = self.slices[group[0]]
        return [i for i in group if self.slices[i] == home], len({self.slices[i] for i in group})

    def bandwidth(self, group: Sequence[int], chip: Chip) -> float:
        """Bytes a second that reach a chip in an all-gather over `group`: each axis that it spans adds its links.

        Both directions of an axis work where the group closes the ring; on a line one does.
        """
        spans = self._spans(group)
        rings = [reached == length and length % chip.wraps_at == 0 for reached, length in spans]
        return sum(chip.link_bandwidth * (2 if ring else 1) for ring in rings) or 2 * chip.link_bandwidth

    def wraps(self, group: Sequence[int], chip: Chip) -> bool:
        """Whether every axis that `group` spans closes into a ring, though it may take a part of it."""
        return all(length % chip.wraps_at == 0 for _, length in self._spans(group))

    def _spans(self, group: Sequence[int]) -> list[tuple[int, int]]:
        """(places along it that the group has, its length) of each axis that the group spans."""
        places = [self.coordinates[i] for i in group if i < len(self.coordinates)]
        reached = [len({place[axis] for place in places}) for axis in range(len(self.shape))]
        return [(n, length) for n, length in zip(reached, self.shape, strict=True) if n > 1]


def seconds(kind: str, size: float, group: Sequence[int], torus: Torus, chip: Chip) -> float:
    """One collective alone on its links: inside each slice, then between slices what is left to a chip.

    Args:
      size: bytes of the whole array: of a gather's result, of a scatter's input.
    """
    near, slices = torus.by_slice(group)
    if kind == "collective-permute":
        rate = dcn_bandwidth(chip) if slices > 1 else chip.link_bandwidth
        return size / rate + COLLECTIVE_LATENCY
    chips = max(len(near), 1)
    # A reduction gathers what it has scattered; in an all-to-all on a torus half the bytes cross the middle.
    factor = {"all-reduce": 2.0, "all-to-all": 0.5}.get(kind, 1.0)
    inside = size * (chips - 1) / chips / torus.bandwidth(near, chip) if chips > 1 or slices == 1 else 0.0
    between = size / chips * (slices - 1) / slices / dcn_bandwidth(chip)
    return factor * (inside + between) + COLLECTIVE_LATENCY * max(1.0, math.log2(max(len(group), 2)))


def dcn_bandwidth(chip: Chip) -> float:
    """Bytes a second between slices for one chip: its share of its host's network."""
    return DCN_BANDWIDTH_PER_HOST / chip.chips_per_host


def first_group(attributes: str, partitions: int) -> list[int]:
    """Partitions of the first replica group, in any of XLA's spellings; all partitions where none is written."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    if listed:
        return [int(n) for n in listed[1].split(",")]
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        groups, shape, order = ([int(n) for n in text.split(",")] if text else [] for text in iota.groups())
        return _iota(shape, order or list(range(len(shape))), math.prod(groups[1:]))
    mesh = re.search(r"replica_groups=mesh\[(.*?)\](?:\([^)]*\))? ?\{(.*?)\}", attributes)
    if mesh:
        return _mesh_group(re.findall(r"'([^']+)'=(\d+)", mesh[1]), mesh[2])
    return list(range(partitions))


def _iota(shape: list[int], order: list[int], count: int) -> list[int]:
    """The first `count` of 0, 1, ... laid out in `shape` and read with its axes in `order`."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    result = []
    for number in range(count):
        place = 0
        for axis in reversed(order):
            number, digit = divmod(number, shape[axis])
            place += digit * strides[axis]
        result.append(place)
    return result


def _mesh_group(axes: list[tuple[str, str]], used: str) -> list[int]:
    """Named axes: "mesh['a'=2,'b'=4] {'b'}", and parts of them: "{'b':(1)2}", two of b, the first one behind 1."""
    strides, stride = {}, 1
    for name, size in reversed(axes):
        strides[name] = (stride, int(size))
        stride *= int(size)
    group = [0]
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", used):
        stride, length = strides[name]
        if size:
            stride, length = stride * length // (int(before) * int(size)), int(size)
        group = [i + k * stride for i in group for k in range(length)]
    return group


def ring_direction(attributes: str, partitions: int) -> str | None:
    """ "+" or "-" of a permute's first pair: the two directions are independent links. None: not a permute's text."""
    pair = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes)
    if not pair:
        return None
    return "+" if 0 < (int(pair[2]) - int(pair[1])) % partitions <= partitions // 2 else "-"
