"""What every estimate stands on: rates of the chips, and what is assumed where nobody publishes a figure."""

import dataclasses

from phijax.errors import UserError, nearest_name
from phijax.parallel.hardware import PEAK_FLOPS

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TPU chip. Bytes are bytes, rates are per second."""

    name: str
    peak_flops: float  # bfloat16 matrix products
    clock: float  # Hz of the compiler's cycles: peak / (FLOP of all matrix units in a cycle)
    hbm_bandwidth: float
    hbm_bytes: int  # what a program may use
    link_bandwidth: float  # one ICI link, one way
    int8_speedup: float  # of matrix products over bfloat16's
    matrix_side: int  # rows of the systolic array: a smaller contraction is padded to it
    axes: int  # of a slice's torus
    wraps_at: int  # an axis whose length is a multiple of this closes into a ring
    chips_per_host: int
    host_bytes: int
    host_bandwidth: float  # between a chip and its host's memory, one way

    @property
    def flops_per_cycle(self) -> float:
        return self.peak_flops / self.clock


# peak_flops, hbm_bandwidth, host_bytes: the maker's tables, cloud.google.com/tpu/docs/v5e, v5p and v6e.
# hbm_bytes: what the compiler itself calls available when it refuses a program (libtpu 0.0.42): a little less than
#   the 16, 95 and 32 GB of the tables.
# clock: 4 units of 128 x 128 (v5e), 8 (v5p), 4 units of 256 x 256 (v6e), two FLOP each, reach the published peak at it.
# link_bandwidth: the tables' figure for a chip over its links: 1600 Gbit/s (v5e), 4800 (v5p), 3200 (v6e), both ways
#   added up, over 4, 6 and 4 links of two ways: 45-50, 90-100, 90-100 GB/s one way; the lower one is taken.
# host_bandwidth: no maker's table tells it. 16 GB/s for v4 and 15 for v6e are what Google's engineers reckon with in
#   jax-ml.github.io/scaling-book, part 2; the lower is taken for all, and both ways at once.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v5e", peak_flops=PEAK_FLOPS["TPU v5e"], clock=1.5e9, hbm_bandwidth=8.1e11,
            hbm_bytes=int(15.75 * GIB), link_bandwidth=4.5e10, int8_speedup=2.0, matrix_side=128, axes=2, wraps_at=16,
            chips_per_host=4, host_bytes=192 * 10**9, host_bandwidth=1.5e10,
        ),
        Chip(
            name="v5p", peak_flops=PEAK_FLOPS["TPU v5p"], clock=1.75e9, hbm_bandwidth=2.77e12,
            hbm_bytes=int(95.74 * GIB), link_bandwidth=9.0e10, int8_speedup=2.0, matrix_side=128, axes=3, wraps_at=4,
            chips_per_host=4, host_bytes=448 * 10**9, host_bandwidth=1.5e10,
        ),
        Chip(
            name="v6e", peak_flops=PEAK_FLOPS["TPU v6e"], clock=1.75e9, hbm_bandwidth=1.64e12,
            hbm_bytes=int(31.25 * GIB), link_bandwidth=9.0e10, int8_speedup=2.0, matrix_side=256, axes=2, wraps_at=16,
            chips_per_host=4, host_bytes=720 * 10**9, host_bandwidth=1.5e10,
        ),
    )
}  # fmt: skip

# Pallas kernels carry no cycles. Share of the (padded) matrix peak that splash attention is taken to reach.
ATTENTION_EFFICIENCY = 0.6
# An elementwise operation that carries no cycles reads and writes its result once; in VMEM ten times as fast.
VMEM_SPEEDUP = 10.0
SMALLEST_COUNTED = 65536  # bytes; below, an operation without cycles is free
# Start of a collective: one hop of a permute; a group of n chips takes log2(n) of them.
COLLECTIVE_LATENCY = 1e-6
# DCN of a host: 200 Gbit/s network cards at about what one flow group reaches.
DCN_BANDWIDTH_PER_HOST = 12.5e9

# What an estimate is off by, said with each. Memory and bytes are the compiler's own; seconds are not measured.
COMPILED_ERROR = (
    "seconds: the compiler's cycles replayed, attention and collectives modelled; rankings hold to about 3 %, "
    "absolute MFU to +-10 points (nothing was run); vector work is overstated up to 2.4 times, so real steps are "
    "rather shorter"
)
ANALYTIC_ERROR = (
    "seconds and memory: from shapes alone, within 15 % of the compiled estimate on the cases compared, unless "
    "memory is crowded"
)
# A program that takes more than this share of HBM is crowded: unless told not to (compiler.profile=fill_memory) the
# compiler then recomputes on its own and hides fewer gathers, and steps of 1.11 (medium on 16 v5p) and 1.35 times (mini
# on 16 v5e) the analytic seconds were seen.
CROWDED_FROM = 0.95
CROWDED = (
    "crowded: so near its limit the compiler recomputes on its own and hides fewer gathers, steps of 1.1 to 1.35 times "
    "the seconds from shapes were seen; --config.compiler.profile=fill_memory keeps it from that"
)


def chip_of(topology: str) -> Chip:
    """The chip of "v5p:4x4x8". Raises: UserError for one that is not known."""
    name = topology.split(":")[0]
    if name not in CHIPS:
        near = nearest_name(name, CHIPS)
        raise UserError(
            f"--topology={topology}: no figures for {name!r}."
            + (f" Nearest: {near!r}." if near else "")
            + f" There are: {', '.join(CHIPS)}, as in v5e:16x16, v5p:4x4x8, v6e:16x16."
        )
    return CHIPS[name]
