"""Programs of generation as the TPU compiler makes them: weights in few bits are read as they lie, none is copied."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import pytest

from phijax.model import params
from phijax.model.presets import PRESETS
from phijax.model.quantized import Quantized
from phijax.parallel import hlo
from phijax.parallel.mesh import MeshConfig, make_mesh
from phijax.planning import decode_step
from phijax.planning.topology import has_compiler, tpu_devices
from phijax.quantization import policy

pytestmark = pytest.mark.skipif(not has_compiler(), reason="libtpu is not installed: the TPU compiler cannot be asked")

TWO_LAYERS = dataclasses.replace(PRESETS["phi3_mini"], num_layers=2)
PLACES = 512
MIB = 2**20
SMALLEST = 3072 * 3072  # numbers of q's matrix in one layer; k, v and o are as large
READ_ONLY = {"parameter", "get-tuple-element", "bitcast"}


def served(scheme: str, model=TWO_LAYERS, *, tensor: int = 1, cache: str = "auto") -> decode_step.Served:
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=tensor), tpu_devices("v5e:2x2")[:tensor])
    return decode_step.Served(model, mesh, policy.parse(scheme), cache)


def matrices(text: str):
    """Whatever in HBM is as large as a weight and no cache. (Of two layers the compiler reads some ahead into VMEM.)"""
    large = [i for i in hlo.instructions(text) if i.elements >= SMALLEST and PLACES not in i.shape]
    return [i for i in large if "S(1)" not in i.layout and not re.match(r"fused_|\w*_fusion", i.computation)]


def check(compiled, of: decode_step.Served, integers: str) -> None:
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert {i.dtype for i in matrices(text)} == {integers}
    assert {i.opcode for i in matrices(text)} <= READ_ONLY
    assert memory.temp_size_in_bytes < 3 * MIB  # q in four bits has 4.5


@pytest.mark.parametrize(
    ("scheme", "integers", "rows", "cache"),
    [
        ("int4_g128", "s4", 1, "auto"),
        ("int4_g32", "s4", 8, "int8"),
        ("int4", "s4", 8, "auto"),
        ("int4", "s4", 32, "int8"),
        ("int8", "s8", 8, "auto"),
    ],
)
def test_a_step_reads_weights_as_they_lie(scheme, integers, rows, cache):
    of = served(scheme, cache=cache)
    compiled = decode_step.lower_step(of, rows, PLACES).compile()
    check(compiled, of, integers)
    weights = sum(a.size for a in jax.tree.leaves(params.abstract(of.model)))
    memory = compiled.memory_analysis()
    held = decode_step.bytes_read(of, rows, PLACES) + params.shapes(of.model)["embedding"][0] * 3072 / 2
    assert memory.argument_size_in_bytes < 1.25 * held < 2 * weights  # bits are those of the scheme
    # The cache is written where it lies.
    cache_bytes = sum(decode_step._bytes(a) for a in jax.tree.leaves(decode_step.abstract_cache(of, rows, PLACES)))
    assert memory.alias_size_in_bytes >= 0.99 * cache_bytes


def test_by_xla_alone_the_integers_stay_too(monkeypatch):
    """A scale for each channel, as where the kernel does not take a matrix: the product reads the integers."""
    monkeypatch.setattr(decode_step.placement, "for_kernel", lambda c, path, name, w, cut, mesh: w)
    of = served("int4")
    assert isinstance(decode_step.abstract_weights(of)["blocks"]["mlp"]["up"], Quantized)
    compiled = decode_step.lower_step(of, 8, PLACES).compile()
    text = compiled.as_text()
    # Within fusions they are laid out for the unit as they are read; what lies in HBM is what was given.
    assert {i.dtype for i in matrices(text)} == {"s4"}
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * MIB
    # On the matrix unit: seven products of a layer and the head's.
    assert sum(i.opcode == "convolution" for i in hlo.instructions(text)) >= 8


@pytest.mark.parametrize("cache", ["auto", "int8"])
def test_a_chunk_of_a_prompt_does_too_and_leaves_the_cache_where_it_lies(cache):
    """Of so many layers and places that VMEM has no room for all, else the compiler might read them ahead."""
    places = 8192
    of = served("int4_g128", dataclasses.replace(TWO_LAYERS, num_layers=8), cache=cache)
    compiled = decode_step.lower_prefill(of, 64, places).compile()
    large = matrices(compiled.as_text())
    of_cache = [i for i in large if places in i.shape and i.shape[0] == 8]
    assert of_cache
    assert [
        i.name for i in of_cache if i.opcode not in READ_ONLY and "dynamic-update-slice" not in f"{i.opcode} {i.name}"
    ] == []
    weights = [i for i in large if places not in i.shape or i.dtype == "s4"]
    assert {i.dtype for i in weights} == {"s4"} and {i.opcode for i in weights} <= READ_ONLY
    one_layer = 8192 * 3072
    assert compiled.memory_analysis().temp_size_in_bytes < 5 * one_layer


def test_four_chips_hold_a_quarter():
    of, alone = served("int4_g128", tensor=4, cache="int8"), served("int4_g128", cache="int8")
    compiled = decode_step.lower_step(of, 8, PLACES).compile()
    text = compiled.as_text()
    gathered = [i for i in hlo.instructions(text) if i.opcode.startswith("all-gather") and i.elements > SMALLEST // 8]
    assert gathered == []
    whole = decode_step.bytes_read(alone, 8, PLACES)
    assert decode_step.bytes_read(of, 8, PLACES) == pytest.approx(whole / 4, rel=0.01)
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * MIB


def loops(jaxpr):
    """The types of everything that loops of a program are given, loop by loop, those within loops too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("scan", "while"):
            yield [v.aval for v in equation.invars]
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns") and equation.primitive.name != "pallas_call":
                    yield from loops(inner)


@pytest.mark.parametrize(("scheme", "dtype", "count"), [("int4_g128", jnp.int4, 7), ("int4_down8", jnp.int4, 6)])
def test_weights_in_the_loop_over_layers_are_small(scheme, dtype, count):
    """Counted in the traced program; in a float type there is nothing as large as a matrix."""
    of = served(scheme)
    traced = decode_step.trace_step(of, 8, PLACES)
    given = max(loops(traced.jaxpr.jaxpr), key=len)
    large = [a for a in given if math.prod(a.shape[-2:]) >= SMALLEST and a.shape[-2] != PLACES]
    assert sum(a.dtype == dtype for a in large) == count
    assert all(a.dtype in (jnp.int4, jnp.int8) for a in large) and len(large) == 7


@pytest.mark.slow
@pytest.mark.parametrize("rows", [8, 32])
@pytest.mark.parametrize("scheme", ["int4", "int4_g128"])
def test_mini_whole(scheme, rows):
    of = served(scheme, PRESETS["phi3_mini"], cache="int8")
    check(decode_step.lower_step(of, rows, PLACES).compile(), of, "s4")
