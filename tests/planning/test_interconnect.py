"""Replica groups in XLA's spellings against numpy, link bandwidths by hand."""

import numpy as np
import pytest

from phijax.planning.assumptions import CHIPS
from phijax.planning.interconnect import Torus, first_group, ring_direction, seconds

V5E, V5P = CHIPS["v5e"], CHIPS["v5p"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("replica_groups={{0,2,4},{1,3,5}}", [0, 2, 4]),
        ("replica_groups=[2,128]<=[256]", list(range(128))),
        ("replica_groups=[16,16]<=[16,16]T(1,0)", np.arange(256).reshape(16, 16).T.reshape(16, 16)[0].tolist()),
        (
            "replica_groups=[8,16]<=[2,4,16]T(2,1,0)",
            np.arange(128).reshape(2, 4, 16).transpose(2, 1, 0).reshape(8, 16)[0].tolist(),
        ),
        ("replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}", [0, 1, 2, 3]),
        ("replica_groups=mesh['data'=2,'fsdp'=4] {'data'}", [0, 4]),
        ("replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp':(2)2}", [0, 1]),
        ("dimensions={0}", list(range(8))),
    ],
)
def test_first_group(text, expected):
    assert first_group(f"{text}, use_global_device_ids=true", 8) == expected


@pytest.mark.parametrize(
    ("chip", "shape", "group", "links"),
    [
        (V5E, (16, 16), range(256), 4),  # both axes closed
        (V5E, (16, 16), range(128), 3),  # 16 x 8: one ring, one line
        (V5E, (16, 16), range(8), 1),  # half an axis
        (V5E, (4, 4), range(16), 2),  # too short to close
        (V5P, (4, 4, 8), range(128), 6),
        (V5P, (4, 4, 8), range(0, 128, 16), 2),  # the long axis alone
        (V5P, (4, 4, 8), [0, 16], 1),
    ],
)
def test_bandwidth_counts_links(chip, shape, group, links):
    assert Torus.in_order(shape).bandwidth(group, chip) == links * chip.link_bandwidth


def test_seconds_by_hand():
    torus, group = Torus.in_order((16, 16)), range(256)
    once = 1e9 * 255 / 256 / (4 * 45e9)
    assert seconds("all-gather", 1e9, group, torus, V5E) == pytest.approx(once + 8e-6)
    assert seconds("all-reduce", 1e9, group, torus, V5E) == pytest.approx(2 * once + 8e-6)
    assert seconds("collective-permute", 1e9, group, torus, V5E) == pytest.approx(1 / 45 + 1e-6)


def test_the_directions_of_a_ring():
    assert ring_direction("source_target_pairs={{0,1},{1,2}}", 8) == "+"
    assert ring_direction("source_target_pairs={{0,7},{1,0}}", 8) == "-"
    assert ring_direction("replica_groups={{0,1}}", 8) is None


def test_slices_are_joined_by_the_hosts_network():
    torus = Torus((4, 4, 4), Torus.in_order((4, 4, 4)).coordinates * 2, (0,) * 64 + (1,) * 64)
    assert torus.by_slice(range(128)) == (list(range(64)), 2)
    # A gigabyte: a 64th of it for each chip, both ways, half of it from the other slice, at a quarter of 12.5 GB/s.
    inside = 2 * 1e9 * 63 / 64 / (6 * 90e9)
    between = 2 * 1e9 / 64 / 2 / (12.5e9 / 4)
    assert seconds("all-reduce", 1e9, range(128), torus, V5P) == pytest.approx(inside + between + 7e-6)
    pair = 2 * 1e9 / 2 / (12.5e9 / 4)  # one chip of each slice: all of it crosses
    assert seconds("all-reduce", 1e9, [0, 64], torus, V5P) == pytest.approx(pair + 1e-6)
