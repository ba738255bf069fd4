"""Mesh sizes, the order of devices in it, and what is known of the hardware."""

import dataclasses

import jax
import numpy as np
import pytest

from phijax.errors import UserError
from phijax.parallel.hardware import keep_freed_memory, peak_flops
from phijax.parallel.mesh import MeshConfig, make_mesh, mesh_shape
from phijax.parallel.sharding import MESH_AXES


@pytest.mark.parametrize(
    "config, devices, expected",
    [
        (MeshConfig(), 1, (1, 1, 1, 1)),
        (MeshConfig(), 8, (1, 8, 1, 1)),
        (MeshConfig(data=2), 8, (2, 4, 1, 1)),
        (MeshConfig(data=-1, fsdp=2, tensor=2), 16, (4, 2, 1, 2)),
        (MeshConfig(data=2, fsdp=128), 256, (2, 128, 1, 1)),
        (MeshConfig(data=2, fsdp=1, context=-1), 6, (2, 1, 3, 1)),
        (MeshConfig(data=4, slices=2), 16, (4, 4, 1, 1)),
    ],
)
def test_sizes(config, devices, expected):
    assert mesh_shape(config, devices) == dict(zip(MESH_AXES, expected, strict=True))


@pytest.mark.parametrize(
    "config, devices, message",
    [
        (MeshConfig(fsdp=4), 8, r"needs 4 devices, but there are 8.*-1"),
        (MeshConfig(data=3), 8, r"'data': 3.*there are 8"),
        (MeshConfig(data=16), 8, r"'data': 16.*there are 8"),
        (MeshConfig(data=-1), 8, r"only one may be -1"),
        (MeshConfig(data=0), 8, r"at least 1"),
        (MeshConfig(data=-2), 8, r"at least 1"),
        (MeshConfig(data=2, slices=4), 8, r"mesh\.data=2 cannot be split over mesh\.slices=4"),
        (MeshConfig(data=2, slices=0), 8, r"mesh\.slices=0"),
    ],
)
def test_wrong_sizes_are_refused(config, devices, message):
    with pytest.raises(UserError, match=f"(?s){message}"):
        mesh_shape(config, devices)


def test_virtual_devices_lie_in_order():
    mesh = make_mesh(MeshConfig(1, 2, 2, 2), jax.devices())
    assert mesh.axis_names == MESH_AXES
    assert [device.id for device in mesh.devices.flat] == list(range(8))
    assert mesh.devices.shape == (1, 2, 2, 2)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What mesh_utils reads of a TPU chip."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int
    process_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0


def slices_of_chips(slices: int, side: int = 4) -> list[Chip]:
    """Slices of side x side chips, four to a host, listed shuffled."""
    chips = [
        Chip(s * side**2 + y * side + x, (x, y, 0), s, s * side**2 // 4 + (y // 2) * (side // 2) + x // 2)
        for s in range(slices)
        for y in range(side)
        for x in range(side)
    ]
    np.random.default_rng(0).shuffle(chips)
    return chips


@pytest.mark.parametrize("data, fsdp", [(2, 16), (4, 8), (8, 4)])
def test_slices_join_along_data(data, fsdp):
    """Only `data` crosses slices, and its outer part does: what is gathered at each use stays on the torus."""
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, slices=2), slices_of_chips(2))
    assert mesh.devices.shape == (data, fsdp, 1, 1)
    assert len({chip.id for chip in mesh.devices.flat}) == 32
    of_replica = [{chip.slice_index for chip in replica.flat} for replica in mesh.devices]
    assert of_replica == [{0}] * (data // 2) + [{1}] * (data // 2)


def test_one_slice_follows_the_torus():
    """Neighbours along an axis of 4 are neighbours on the chip grid, however the devices are listed."""
    mesh = make_mesh(MeshConfig(data=4, fsdp=4), slices_of_chips(1))
    for row in mesh.devices.reshape(4, 4):
        x, y = (np.array([chip.coords[i] for chip in row]) for i in (0, 1))
        assert len(set(x)) == 1 or len(set(y)) == 1


@pytest.mark.parametrize("named, found", [(2, 4), (4, 2), (1, 2), (2, 1)])
def test_slices_of_another_count_are_refused(named, found):
    """A message, not a mesh that crosses slices at random."""
    with pytest.raises(UserError, match=rf"mesh\.slices={named}, but the devices lie in {found}\. Set .*{found}"):
        make_mesh(MeshConfig(data=4, slices=named), slices_of_chips(found))


@pytest.mark.parametrize(
    "kind, teraflops",
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 2307),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("cpu", None),
        ("TPU v3", None),
    ],
)
def test_peak_flops(kind, teraflops):
    peak = peak_flops(kind)
    assert peak is None if teraflops is None else peak == teraflops * 1e12


def test_keep_freed_memory_says_whether_it_did(monkeypatch):
    monkeypatch.setattr("sys.platform", "darwin")
    assert keep_freed_memory() is False


def test_numbers_of_64_bits_are_refused_before_anything_is_computed():
    with jax.enable_x64(True), pytest.raises(UserError, match="jax_enable_x64 is on"):
        make_mesh(MeshConfig(), jax.devices())
    make_mesh(MeshConfig(), jax.devices())
