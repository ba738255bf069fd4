"""The compiler's count of HBM, out of what it says of a program."""

import types

import pytest

from phijax.planning.compiled import hbm_peak

# tests/planning/tiny_plan.py on v5e:2x2. By libtpu 0.0.50 its heap in VMEM (116,931,584 bytes) is larger than in HBM
# (104,122,880), and its peak is VMEM's beside HBM's arguments; by libtpu 0.0.42, without the total, it is HBM's.
NEWER = dict(argument=20770816, output=20692992, alias=20688896, temp=115285504)
OLDER = dict(argument=20770816, output=20692992, alias=20688896, temp=164042752)


@pytest.mark.parametrize(
    ("sizes", "more", "expected"),
    [
        (NEWER, dict(peak_memory_in_bytes=137777152, total_allocation_bytes=129619456), 129619456),
        (NEWER, dict(peak_memory_in_bytes=124968448, total_allocation_bytes=129619456), 124968448),
        (OLDER, dict(peak_memory_in_bytes=161640448), 161640448),
        # No total told, by an older library or an older compiler under a newer one: arguments, results, temporaries.
        (NEWER, dict(peak_memory_in_bytes=137777152), 136060416),
        (NEWER, dict(peak_memory_in_bytes=137777152, total_allocation_bytes=0), 136060416),
    ],
)
def test_a_peak_is_never_more_than_was_placed(sizes, more, expected):
    assert hbm_peak(said(sizes, **more)) == expected


def said(sizes, *, host=0, **more):
    """The compiler's statistics. host: bytes of donated arguments in the host's memory."""
    kinds = ("argument", "output", "alias", "temp")
    on_host = {f"host_{kind}_size_in_bytes": 0 if kind == "temp" else host for kind in kinds}
    return types.SimpleNamespace(**{f"{kind}_size_in_bytes": sizes[kind] for kind in kinds}, **on_host, **more)


def test_what_lies_on_the_host_is_no_hbm():
    # Four layers of phi3_mini's width on v5e:2x2, moments on the hosts; 2,542,868,000 is what hbm.peak counts.
    sizes = dict(argument=654_311_424, output=654_311_424, alias=654_311_424, temp=1_916_000_000)
    peak = said(sizes, host=1_308_622_848, peak_memory_in_bytes=3_851_490_848)
    assert hbm_peak(peak) == 2_542_868_000
