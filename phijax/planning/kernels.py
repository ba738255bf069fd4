"""Seconds of Pallas kernels, for which the compiler makes no estimate."""

import re

from phijax.parallel.program_text import Operation, arrays_in
from phijax.planning import decode_kernels
from phijax.planning.assumptions import ATTENTION_EFFICIENCY, Chip

KERNEL_TARGET = "tpu_custom_call"
# Splash's backward kernel says neither that it makes dq too nor its blocks where they are looked for, and is taken as
# four products in blocks of 512. Five in blocks of 1024 would be 1.39 times as much; ATTENTION_EFFICIENCY is no better
# known, and figures of programs with the same kernels compare all the same.
BACKWARD_PRODUCTS = 4
BACKWARD_BLOCK = 512


def is_attention(operation: Operation) -> bool:
    return any(word in operation.name.lower() for word in ("splash", "flash", "attention"))


def seconds(operation: Operation, chip: Chip, *, window: int | None) -> float:
    """Attention by its padded matrix products at an assumed efficiency; any other kernel by its bytes in HBM.

    Args:
      window: keys that a query sees, if not all before it.
    """
    if decode_kernels.is_decode_kernel(operation):
        return decode_kernels.seconds(operation, chip, window=window)
    if not is_attention(operation):
        return 2 * operation.bytes / chip.hbm_bandwidth
    operands = arrays_in(operation.attribute(r"operand_layout_constraints=\{(.*?)\}, (?:front|meta|back|custom)") or "")
    heads = [a.shape for a in operands if a.dtype == "bf16" and len(a.shape) in (3, 4) and a.shape[-1] >= 64]
    if not heads:
        return 2 * operation.bytes / chip.hbm_bandwidth
    query = heads[0]
    *rows, length, width = query
    count = 1
    for n in rows:
        count *= n
    keys = max(shape[-2] for shape in heads)
    width = -(-width // chip.matrix_side) * chip.matrix_side
    share = seen_share(keys, _block(operation), window=window)
    flops = products(operation) * 2 * count * length * keys * width * share
    return flops / chip.peak_flops / ATTENTION_EFFICIENCY


def products(operation: Operation) -> int:
    """Matrix products of queries x keys x head: 2 forward, 5 in a fused backward, 3 for dq alone, else 4."""
    if "fwd" in operation.name:
        return 2
    if re.search(r'use_fused_bwd_kernel[\\": ]+true', operation.attributes):
        return 5
    return 3 if "dq" in operation.name else BACKWARD_PRODUCTS


def _block(operation: Operation) -> int:
    found = operation.attribute(r'block_kv\\*": (\d+)')
    return int(found) if found else BACKWARD_BLOCK


def seen_share(keys: int, block: int, *, window: int | None = None) -> float:
    """Share of the queries x keys square that the kernel computes: whole blocks with any key that is seen.

    So it is for one chip's queries under `context` too, since rows are dealt (parallel/dealing.py); with a window it is
    the mean of the chips.
    """
    block = min(block, keys)
    total = 0
    for start in range(0, keys, block):
        last = min(start + block, keys)
        lowest = max(0, start - window + 1) // block * block if window is not None else 0
        total += (last - start) * (-(-last // block) * block - lowest)
    return total / keys**2
