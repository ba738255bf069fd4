"""The text of compiled programs: its traps, by hand."""

import pytest

from phijax.parallel import hlo
from phijax.parallel.program_text import parse

# A kernel's metadata goes over lines, one of which begins with "}"; a computation of another core ends in its thread.
PROGRAM = """HloModule traps, is_scheduled=true, input_output_alias={ {0}: (1, {}, may-alias) }, num_partitions=8

FileNames
1 "model.py"

%sparse (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  ROOT %y = f32[4]{0} negate(%x)
}, execution_thread="sparsecore"

%inner (t: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %t = (s32[], bf16[8,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  %a = bf16[8,16]{1,0:T(8,128)(2,1)} get-tuple-element(%t), index=1
  %k = (bf16[8,16]{1,0}, /*index=1*/f32[8]{0}) custom-call(%a), custom_call_target="tpu_custom_call",
frontend_attributes={kernel_metadata={
"block_kv": 512
}}, metadata={op_name="jit(f)/while/body/kernel"}, backend_config={"estimated_cycles":"70"}
  %out = bf16[8,16]{1,0} get-tuple-element(%k), index=0
  %turned = bf16[8,16]{0,1:T(8,128)(2,1)} copy(%out)
  %step = s32[]{:T(128)} constant(4)
  %add = s32[]{:T(128)} add(%i, %step)
  %moved = s32[]{:T(128)} copy(%add)
  ROOT %next = (s32[], bf16[8,16]{1,0}) tuple(%moved, %turned)
}

%test (c: (s32[], bf16[8,16])) -> pred[] {
  %c = (s32[], bf16[8,16]{1,0}) parameter(0)
  %n = s32[]{:T(128)} get-tuple-element(%c), index=0
  %limit = s32[]{:T(128)} constant(32)
  ROOT %more = pred[]{:T(512)} compare(%n, %limit), direction=LT
}

ENTRY %main (p: bf16[8,16], q: f32[4]) -> (f32[4]) {
  %p = bf16[8,16]{1,0} parameter(0)
  %q = f32[4]{0} parameter(1)
  %zero = s32[] constant(0)
  %first = (s32[], bf16[8,16]{1,0}) tuple(%zero, %p)
  %loop = (s32[], bf16[8,16]{1,0}) while(%first), condition=%test, body=%inner
  %outside = bf16[8,16]{0,1} copy(%p)
  %side = f32[4]{0} call(%q), to_apply=%sparse, channel_id=7
  ROOT %result = (f32[4]{0}) tuple(%side)
}
"""


@pytest.fixture(scope="module")
def program():
    return parse(PROGRAM)


def test_computations_end_where_they_end(program):
    counts = {name: len(operations) for name, operations in program.computations.items()}
    assert counts == {"sparse": 2, "inner": 10, "test": 4, "main": 8}
    assert (program.entry, program.partitions, program.donated) == ("main", 8, ((0, 1),))


def test_an_operation_over_several_lines(program):
    kernel = program.operation("inner", "k")
    assert (kernel.opcode, kernel.operands, kernel.target, kernel.cycles) == (
        "custom-call",
        ("a",),
        "tpu_custom_call",
        70,
    )
    assert [(a.dtype, a.shape) for a in kernel.arrays] == [("bf16", (8, 16)), ("f32", (8,))]
    assert kernel.source == "jit(f)/while/body/kernel" and kernel.attribute(r'block_kv": (\d+)') == "512"
    side = program.operation("main", "side")
    assert side.called == ("sparse",) and side.channel == "7"


def test_trips_by_limit_and_increment(program):
    loop = program.operation("main", "loop")
    assert program.trips(loop) == 8  # to 32 by 4, behind a copy
    told = parse(PROGRAM.replace("body=%inner", 'body=%inner, backend_config={"known_trip_count":{"n":"5"}}'))
    assert told.trips(told.operation("main", "loop")) == 5


def test_relayouts_are_those_in_loops():
    assert hlo.loop_computations(PROGRAM) == {"inner"}
    assert [i.name for i in hlo.relayouts(PROGRAM, {128})] == ["turned"]
    copied = {i.name: (i.dtype, i.bytes, i.layout) for i in hlo.instructions(PROGRAM) if i.opcode == "copy"}
    assert copied["turned"] == ("bf16", 256, "{0,1:T(8,128)(2,1)}") and set(copied) == {"turned", "moved", "outside"}
