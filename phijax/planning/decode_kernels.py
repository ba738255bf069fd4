"""Seconds of the Pallas kernels of decoding: products with weights in four bits, attention over a stacked cache.

The compiler makes no estimate of a kernel. What it does make is the kernel's schedule, and there the matrix unit is
what others wait for: loading a tile of it takes as long whatever is multiplied, and few rows are. So a kernel takes as
long as its bytes from HBM or its tiles, whichever is more, and its first block, which nothing hides.
"""

import math
import re

from phijax.parallel.program_text import Array, Operation, arrays_in
from phijax.planning.assumptions import Chip

REGISTER_BYTES = 4096  # goes into the matrix unit at once,
REGISTER_CYCLES = 8  # in so many cycles
HEAD_TILE = 16  # heads of a query are filled up to a multiple


def is_decode_kernel(operation: Operation) -> bool:
    return operation.name.startswith(("integers", "decode_cache"))


def seconds(operation: Operation, chip: Chip, *, window: int | None) -> float:
    """Args: window: keys that a query sees, if not all: the cache is taken to be full."""
    operands = arrays_in(operation.attribute(r"operand_layout_constraints=\{(.*?)\}, \w+=") or "")
    if operation.name.startswith("integers"):
        read, cycles = _product(operands, chip)
    else:
        read, cycles = _attention(operands, chip, window)
    return max(read / chip.hbm_bandwidth, cycles / chip.clock) + _first_block(operation) / chip.hbm_bandwidth


def _product(operands: tuple[Array, ...], chip: Chip) -> tuple[float, float]:
    """(bytes, cycles) of (layer, x (I, M, S), values (L, rows, D), scales (L, ...)): one of L, I times."""
    _, x, values, scales = operands
    times, rows, _ = x.shape
    layers = values.shape[0]
    weights = values.elements / layers
    return times * (values.bytes + scales.bytes) / layers + x.bytes, times * _matrix_cycles(weights, rows, chip)


def _attention(operands: tuple[Array, ...], chip: Chip, window: int | None) -> tuple[float, float]:
    """(bytes, cycles) of (layer, places, q (R, G, K H), new lines ..., the cache's k, v (L, R, S, K H), scales)."""
    queries, cache = operands[2], [a for a in operands if len(a.shape) == 4]
    layers, _, length, _ = cache[0].shape
    seen = min(1.0, (window or length) / length)
    heads = -(-_kv_heads(operands) // HEAD_TILE) * HEAD_TILE
    numbers = sum(a.elements for a in cache[:2]) / layers * seen
    return sum(a.bytes for a in cache) / layers * seen, _matrix_cycles(numbers, queries.shape[1] * heads, chip)


def _kv_heads(operands: tuple[Array, ...]) -> int:
    """Of an int8 cache the scales say how many; else as many as one tile has, which hides behind the loading."""
    cache = [a for a in operands if len(a.shape) == 4]
    return cache[2].shape[2] if len(cache) == 4 else HEAD_TILE


def _matrix_cycles(numbers: float, rows: int, chip: Chip) -> float:
    """Of `numbers` loaded into the matrix units in bfloat16, each tile multiplied with `rows` rows."""
    tile = chip.matrix_side**2
    units = chip.flops_per_cycle / (2 * tile)
    return numbers / tile / units * max(2 * tile / REGISTER_BYTES * REGISTER_CYCLES, rows)


def _first_block(operation: Operation) -> float:
    """Bytes that are awaited before anything can be done: half of the VMEM that the kernel has, which holds two."""
    sizes = re.findall(r'"used_scoped_memory_configs":\[\{[^]]*"size":"(\d+)"', operation.attributes)
    return math.fsum(map(int, sizes)) / 2
