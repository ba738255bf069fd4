"""What kernels of decoding are taken to cost, by hand, from the lines that the compiler writes of them."""

import pytest

from phijax.parallel.program_text import parse
from phijax.planning import kernels
from phijax.planning.assumptions import CHIPS

V5E = CHIPS["v5e"]

PRODUCT = (
    "  %integers.3 = bf16[8,8192]{1,0:T(8,128)(2,1)S(1)} custom-call(%a, %b, %c, %d), "
    'custom_call_target="tpu_custom_call", operand_layout_constraints={s32[1]{0}, bf16[1,8,3072]{2,1,0}, '
    "s4[32,8192,3072]{2,1,0}, s16[32,24,8192]{2,1,0}}, frontend_attributes={kernel_metadata={}}, "
    'backend_config={"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"1622016"}]}'
)
ATTENTION = (
    "  %decode_cache.1 = (bf16[8,1,3072]{2,1,0}, s8[32,8,512,3072]{3,2,1,0}) custom-call(%a, %b), "
    'custom_call_target="tpu_custom_call", operand_layout_constraints={s32[1]{0}, s32[8]{0}, bf16[8,1,3072]{2,1,0}, '
    "s8[8,1,3072]{2,1,0}, s8[8,1,3072]{2,1,0}, bf16[8,32,1]{2,1,0}, bf16[8,32,1]{2,1,0}, s8[32,8,512,3072]{3,2,1,0}, "
    "s8[32,8,512,3072]{3,2,1,0}, bf16[32,8,32,512]{3,2,1,0}, bf16[32,8,32,512]{3,2,1,0}}, "
    "output_to_operand_aliasing={{1}: (7, {})}, backend_config={}"
)


def seconds(line: str, window: int | None = None) -> float:
    program = parse(f"ENTRY %main (x: f32[]) -> f32[] {{\n{line}\n}}\n")
    return kernels.seconds(program.computations["main"][0], V5E, window=window)


def test_a_product_is_its_tiles_or_its_bytes():
    first_block = 1622016 / 2 / V5E.hbm_bandwidth
    units = V5E.flops_per_cycle / 2 / 128**2  # four and a little: the published peak is rounded
    tiles = 8192 * 3072 / 128**2 / units * 64 / V5E.clock  # 64 cycles to load one
    read = (8192 * 3072 / 2 + 24 * 8192 * 2 + 8 * 3072 * 2) / V5E.hbm_bandwidth
    assert seconds(PRODUCT) == pytest.approx(max(tiles, read) + first_block)
    assert tiles > read  # four bits come as fast as they can be loaded
    # With 256 rows multiplying takes longer than loading.
    many = PRODUCT.replace("[1,8,3072]", "[1,256,3072]").replace("[8,8192]", "[256,8192]")
    assert seconds(many) == pytest.approx(4 * tiles + first_block)
    # Eight bits are waited for.
    eight = PRODUCT.replace("s4[", "s8[")
    assert seconds(eight) == pytest.approx(read + 8192 * 3072 / 2 / V5E.hbm_bandwidth + first_block)


def test_attention_is_its_cache():
    integers, scales = 2 * 8 * 512 * 3072, 2 * 2 * 8 * 32 * 512
    assert seconds(ATTENTION) == pytest.approx((integers + scales) / V5E.hbm_bandwidth)
    assert seconds(ATTENTION, window=256) == pytest.approx(seconds(ATTENTION) / 2)
    assert seconds(ATTENTION, window=4096) == seconds(ATTENTION)
