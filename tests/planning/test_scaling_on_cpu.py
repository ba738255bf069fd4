"""What virtual CPU devices can tell of scaling: bytes gathered, memory of a device, size of the program to compile."""

import dataclasses
import functools
import math

import jax
import pytest
from quick_compilation import QUICK

from phijax.model.backend import Backend
from phijax.model.config import ModelConfig
from phijax.model.cross_entropy import LossConfig
from phijax.parallel.mesh import MeshConfig, make_mesh
from phijax.parallel.program_text import Program, parse
from phijax.planning import analytic
from phijax.training.optimizer import OptimizerConfig
from phijax.training.program import Recipe, lower_train_step

MODEL = ModelConfig(
    vocab_size=1000,
    model_dim=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=4,
    head_dim=12,
    ffn_dim=80,
    max_position=4096,
)
LENGTH = 16


def recipe(layers: int = 3) -> Recipe:
    # Everything is made again, so that every layer's weights are gathered twice, as on a TPU.
    backend = Backend(remat="full")
    return Recipe(
        dataclasses.replace(MODEL, num_layers=layers), backend, OptimizerConfig(), LossConfig(), total_steps=100, seed=0
    )


@functools.cache
def program(mesh: MeshConfig, layers: int = 3) -> tuple[Program, int, int]:
    """Of one row a device: the program, bytes of its arguments on a device, of its batch there."""
    chips = mesh.data * mesh.fsdp
    laid = make_mesh(mesh, jax.devices()[:chips])
    compiled = lower_train_step(recipe(layers), laid, (1, chips, LENGTH)).compile(QUICK)
    return parse(compiled.as_text()), compiled.memory_analysis().argument_size_in_bytes, 5 * 4 * LENGTH


def moved(found: Program, kind: str) -> int:
    """Bytes of the whole arrays of one kind of collective in a step, loops counted as often as they turn."""

    def of(computation: str) -> int:
        total = 0
        for o in found.computations[computation]:
            if o.opcode == "while":
                total += found.trips(o) * of(o.attribute(r"body=%?([\w.\-]+)"))
            elif o.opcode in ("call", "conditional"):
                total += sum(of(name) for name in o.called)
            elif o.opcode == kind:
                total += sum(int(a.bytes) for a in o.arrays)
        return total

    return of(found.entry)


@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=2), MeshConfig(fsdp=8), MeshConfig(data=2, fsdp=4)], ids=str)
def test_bytes_gathered_are_what_the_plan_says_whatever_the_mesh(mesh):
    found, _, _ = program(mesh)
    where = analytic.make_slice("v5e:2x4" if mesh.data * mesh.fsdp == 8 else "v5e:1x2", mesh)
    planned = analytic.estimate(recipe(), where, (1, mesh.data * mesh.fsdp, LENGTH)).collectives
    norms = 2 * 2 * MODEL.num_layers * MODEL.model_dim * 4  # on every device already; the plan counts them
    expected = planned["gathered weights"].bytes + planned["gathered embedding and head"].bytes - norms
    assert moved(found, "all-gather") == expected


@pytest.mark.parametrize(
    "mesh", [MeshConfig(fsdp=1), MeshConfig(fsdp=2), MeshConfig(fsdp=8), MeshConfig(4, 2)], ids=str
)
def test_a_device_holds_its_share_of_the_state_and_nothing_else(mesh):
    _, arguments, batch = program(mesh)
    sizes = {"data": mesh.data, "fsdp": mesh.fsdp, "context": 1, "tensor": 1}
    state, whole = (analytic.state_bytes(recipe(), sizes | dict(fsdp=n)) for n in (mesh.fsdp, 1))
    assert 0 <= arguments - batch - state < 64  # counters
    # The plan reads the table that the program reads: what neither cuts shows here. Norms are cut nowhere, 1.5 %.
    assert state < 1.03 * whole / mesh.fsdp or mesh.fsdp == 1


def test_the_program_does_not_grow_with_devices_or_layers():
    """So the time to compile it does not either: of its loops the bodies are compiled once."""
    size = lambda found: sum(len(operations) for operations in found[0].computations.values())  # noqa: E731
    few = size(program(MeshConfig(fsdp=2)))
    assert math.isclose(size(program(MeshConfig(fsdp=8))), few, rel_tol=0.1)
    assert math.isclose(size(program(MeshConfig(fsdp=2), layers=12)), few, rel_tol=0.05)
