"""The device mesh: data x fsdp x context x tensor, slices joined over DCN along `data`."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh

from phijax.errors import UserError
from phijax.parallel.sharding import MESH_AXES


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; their product is the number of chips. One of them may be -1: what is left."""

    data: int = 1  # replicas; over DCN between slices, and inside a slice where fsdp would leave too few rows a chip
    fsdp: int = -1  # parameters, gradients and optimizer state are split over it, gathered when used
    context: int = 1  # rows are cut along their length
    tensor: int = 1  # heads, feed-forward layer and vocabulary are cut over it
    slices: int = 1  # TPU slices joined over DCN; divides data


def mesh_shape(config: MeshConfig, num_devices: int) -> dict[str, int]:
    """Axis -> size, with -1 resolved.

    Raises: UserError when the product is not the number of devices.
    """
    sizes = {name: getattr(config, name) for name in MESH_AXES}
    free = [name for name, size in sizes.items() if size == -1]
    bad = [name for name, size in sizes.items() if size != -1 and size < 1]
    if bad or len(free) > 1:
        raise UserError(f"mesh {sizes}: every axis is at least 1, and only one may be -1 (the rest of the devices).")
    known = math.prod(size for size in sizes.values() if size != -1)
    if free and num_devices % known == 0:
        sizes[free[0]] = num_devices // known
    if math.prod(sizes.values()) != num_devices:
        raise UserError(
            f"mesh {sizes} needs {abs(math.prod(sizes.values()))} devices, but there are {num_devices}.\n"
            f"Set one axis to -1 to take what is left, e.g. --config.mesh.fsdp=-1, or change the sizes."
        )
    if config.slices < 1 or sizes["data"] % config.slices:
        raise UserError(
            f"mesh.data={sizes['data']} cannot be split over mesh.slices={config.slices}: slices join along data."
        )
    return sizes


def check_32_bits() -> None:
    """Whatever computes has a mesh, and asks here. Raises: UserError where jax's numbers are of 64 bits by default."""
    if jax.config.jax_enable_x64:
        raise UserError(
            "jax_enable_x64 is on, by JAX_ENABLE_X64 or in this program. phijax's programs say which numbers are of 32 "
            "bits, and leave the others to jax; of 64 they fail or are others. Unset it for this process."
        )


def make_mesh(config: MeshConfig, devices: Sequence) -> Mesh:
    """Lays the axes onto the devices' physical torus (and slices onto DCN); virtual and single devices in id order.

    Raises: UserError when sizes or slices are not those of the devices, and as `check_32_bits`.
    """
    check_32_bits()
    sizes = mesh_shape(config, len(devices))
    shape = tuple(sizes.values())
    if config.slices > 1 or devices[0].platform == "tpu":
        found = len({getattr(device, "slice_index", 0) for device in devices})
        if found != config.slices:
            raise UserError(f"mesh.slices={config.slices}, but the devices lie in {found}. Set mesh.slices={found}.")
    if config.slices > 1:
        within = (shape[0] // config.slices, *shape[1:])
        grid = mesh_utils.create_hybrid_device_mesh(
            within, (config.slices, 1, 1, 1), devices, allow_split_physical_axes=True
        )
    elif devices[0].platform == "tpu":
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        grid = np.asarray(devices).reshape(shape)
    return Mesh(grid, MESH_AXES)
