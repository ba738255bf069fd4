"""The replay of compiled programs: against seconds of another replay, written apart from this one, and by hand."""

import gzip
import json
import pathlib

import pytest

from phijax.planning.assumptions import CHIPS
from phijax.planning.estimator import estimate
from phijax.planning.interconnect import Torus

# Our own train step: phi3_mini, 1 sequence of 4096 a chip, data 2 x fsdp 128 (libtpu 0.0.42), sources and tables cut.
OURS = pathlib.Path(__file__).with_name("mini_v5e_16x16.hlo.gz")
V5E = CHIPS["v5e"]
SLICE = Torus.in_order((16, 16))


def read(path) -> str:
    with gzip.open(path, "rt") as file:
        return file.read()


def compare(ours, theirs: dict[str, float]) -> None:
    # The other replay takes the peak as clock x FLOP a cycle (196.6e12) for attention, and leaves operations without
    # cycles out of its vector seconds: 0.2 % and 0.6 % of those.
    assert ours.step == pytest.approx(theirs["step_s"], rel=0.01)
    for mine, name in (("matrix", "matmul"), ("vector", "nonmatmul"), ("attention", "pallas_modelled")):
        assert getattr(ours, mine) == pytest.approx(theirs[name], rel=0.01), mine
    assert ours.exposed == pytest.approx(theirs["comm_exposed"], rel=0.01)


def test_the_reference_program_takes_what_another_replay_says(shared):
    folder = shared / "reference" / "tpu_lab"
    expected = json.loads((folder / "mini_v5e_16x16_rows.expected.json").read_text())
    found = estimate(read(folder / "mini_v5e_16x16_rows.hlo.gz"), V5E, SLICE)
    compare(found, expected)
    for kind, traffic in expected["collectives"].items():
        mine = found.collectives[kind.replace(" g=", " over ")]
        assert (mine.count, round(mine.bytes / 1e9, 3)) == (traffic["n"], traffic["GB"])


@pytest.fixture(scope="module")
def ours():
    return estimate(read(OURS), V5E, SLICE)


def test_our_program_takes_what_another_replay_says(ours):
    theirs = dict(step_s=0.92648, matmul=0.554886, nonmatmul=0.168277, pallas_modelled=0.130489, comm_exposed=0.0656546)
    compare(ours, theirs)
    counts = {kind: (traffic.count, round(traffic.bytes / 1e9, 3)) for kind, traffic in ours.collectives.items()}
    assert counts == {
        "all-gather over 128": (2, 0.403),
        "all-gather over 256": (448, 14.496),
        "all-reduce over 256": (67, 0.057),
        "reduce-scatter over 128": (226, 7.65),
        "all-reduce over 2": (2, 0.005),
    }
    assert sum(traffic.seconds for traffic in ours.collectives.values()) == pytest.approx(0.145856, rel=1e-4)


def test_parts_are_the_step(ours):
    parts = ours.matrix + ours.vector + ours.attention + ours.exposed + ours.waiting + ours.host
    assert parts == pytest.approx(ours.step, rel=1e-9)
    work = ours.matrix + ours.vector + ours.attention
    assert sum(ours.kinds.values()) == pytest.approx(work, rel=1e-9)
    assert sum(ours.operations.values()) == pytest.approx(work, rel=1e-9)
    assert ours.kinds["matrix product"] == ours.matrix
    assert ours.core_cycles / V5E.clock == pytest.approx(ours.matrix + ours.vector, rel=0.01)


# 1.5 GHz: 1,500,000 cycles are a millisecond. 4 chips on a line gather 90 MB, 3 of 4 parts, at 45 GB/s: 1.5 ms.
PROGRAM = """HloModule small, is_scheduled=true, num_partitions=4

%product (a: f32[8,8], b: f32[8,8]) -> f32[8,8] {
  %a = f32[8,8]{1,0} parameter(0)
  %b = f32[8,8]{1,0} parameter(1)
  ROOT %dot = f32[8,8]{1,0} dot(%a, %b), lhs_contracting_dims={1}
}

%condition (s: (s32[], f32[8,8])) -> pred[] {
  %s = (s32[], f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %limit = s32[] constant(10)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (t: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %t = (s32[], f32[8,8]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%t), index=0
  %x = f32[8,8]{1,0} get-tuple-element(%t), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%j, %two)
  %work = f32[8,8]{1,0} fusion(%x, %x), kind=kOutput, calls=%product, backend_config={"estimated_cycles":"1500000"}
  ROOT %out = (s32[], f32[8,8]{1,0}) tuple(%next, %work)
}

ENTRY %main (p: f32[8,8]) -> f32[8,8] {
  %p = f32[8,8]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (f32[8,8]{1,0}, bf16[45000000]{0}) all-gather-start(%p), replica_groups={{0,1,2,3}}, dimensions={0}
  %beside = f32[8,8]{1,0} exponential(%p), backend_config={"estimated_cycles":"750000"}
  %done = bf16[45000000]{0} all-gather-done(%start)
  %first = (s32[], f32[8,8]{1,0}) tuple(%zero, %beside)
  %loop = (s32[], f32[8,8]{1,0}) while(%first), condition=%condition, body=%body
  ROOT %result = f32[8,8]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_loops_overlap_and_exposure_by_hand():
    found = estimate(PROGRAM, V5E, Torus.in_order((4, 1)))
    assert found.matrix == pytest.approx(5e-3)  # counted to 10 by 2
    assert found.vector == pytest.approx(0.5e-3)
    gather = 0.09e9 * 3 / 4 / 45e9 + 2e-6  # a latency for each of two hops
    assert found.exposed == pytest.approx(gather - 0.5e-3)
    assert found.overlapped == pytest.approx(0.5e-3)
    assert found.step == pytest.approx(5e-3 + gather)
    assert found.core_cycles == 5 * 1_500_000 + 750_000


# 30 MB of a layer cross at 15 GB/s in 2 ms. The second comes in while the first is worked on and goes out again.
OFFLOADED = """HloModule small, is_scheduled=true, num_partitions=1

ENTRY %main (m: f32[4,7500000], i: s32[]) -> f32[4,7500000] {
  %m = f32[4,7500000]{1,0:T(8,128)S(5)} parameter(0)
  %i = s32[] parameter(1)
  %in.1 = ((f32[4,7500000]{1,0:S(5)}, s32[], s32[]), f32[1,7500000]{1,0}, u32[]{:S(2)}) dynamic-slice-start(%m, %i, %i)
  %work.1 = f32[8]{0} fusion(%i), kind=kLoop, calls=%none, backend_config={"estimated_cycles":"750000"}
  %done.1 = f32[1,7500000]{1,0} dynamic-slice-done(%in.1)
  %in.2 = (f32[1,7500000]{1,0}, f32[1,7500000]{1,0:S(5)}, u32[]{:S(2)}) copy-start(%m)
  %work.2 = f32[8]{0} fusion(%i), kind=kLoop, calls=%none, backend_config={"estimated_cycles":"1500000"}
  %out.1 = ((f32[4,7500000]{1,0:S(5)}, f32[1,7500000]{1,0}, s32[], s32[]), f32[4,7500000]{1,0:S(5)}, u32[]{:S(2)}) dynamic-update-slice-start(%m, %done.1, %i, %i)
  %done.2 = f32[1,7500000]{1,0} copy-done(%in.2)
  ROOT %end = f32[4,7500000]{1,0:S(5)} dynamic-update-slice-done(%out.1)
}
"""  # noqa: E501


def test_copies_from_and_to_the_host_by_hand():
    found = estimate(OFFLOADED, V5E, Torus.in_order((1, 1)))
    assert found.vector == pytest.approx(1.5e-3)
    # In at 2 and 4 ms; the first goes out from 3 to 5 ms, at the same time, and the core waits 1.5, 1 and 1 ms.
    assert found.host == pytest.approx(3.5e-3)
    assert found.step == pytest.approx(5e-3) and found.waiting == 0


def test_a_synchronous_collective_is_exposed_whole():
    text = PROGRAM.replace("all-gather-start", "all-gather").replace(
        "%done = bf16[45000000]{0} all-gather-done", "%x0 = u8[1] bitcast"
    )
    text = text.replace("(f32[8,8]{1,0}, bf16[45000000]{0}) all-gather(", "bf16[45000000]{0} all-gather(")
    found = estimate(text, V5E, Torus.in_order((4, 1)))
    assert found.overlapped == 0
    assert found.step == pytest.approx(5.5e-3 + 1.5e-3 + 2e-6)
