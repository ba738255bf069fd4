"""TPU slices that are not here: the compiler alone, on a CPU machine."""

import dataclasses
import importlib.util
import os
import re
from collections.abc import Iterable

from phijax.distribution import install_hint
from phijax.errors import UserError
from phijax.parallel import hardware
from phijax.planning.assumptions import chip_of
from phijax.planning.interconnect import Torus


def lengths_of(topology: str) -> list[int]:
    """Chips along each axis of "v5p:4x4x8". Raises: UserError for a name that is no slice."""
    match = re.fullmatch(r"(v\w+):(\d+(?:x\d+)+)", topology)
    axes = chip_of(topology).axes
    if not match:
        raise UserError(f"{topology!r} is no TPU slice. Examples: v5e:16x16, v5p:4x4x8, v6e:16x16.")
    lengths = [int(n) for n in match[2].split("x")]
    if len(lengths) != axes or 0 in lengths:
        raise UserError(f"{topology!r} is no TPU slice: {match[1]} slices have {axes} axes, all at least 1.")
    return lengths


def has_compiler() -> bool:
    """Whether libtpu is installed, without loading it."""
    return importlib.util.find_spec("libtpu") is not None


def torus_of(topology: str, devices: Iterable) -> Torus:
    """Where the devices of a mesh lie, in the mesh's order."""
    lengths, devices = lengths_of(topology), list(devices)
    slices = tuple(getattr(device, "slice_index", 0) for device in devices)
    places = tuple(tuple(device.coords[: len(lengths)]) for device in devices)
    return Torus(tuple(lengths), places, slices if len(set(slices)) > 1 else ())


@dataclasses.dataclass(frozen=True)
class ImaginaryDevice:
    """What `mesh_utils` reads of a TPU: enough to lay a mesh onto a slice where no compiler is installed."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int
    platform: str = "tpu"
    device_kind: str = "TPU"
    core_on_chip: int = 0
    process_index: int = 0


def imaginary_devices(topology: str, slices: int = 1) -> list[ImaginaryDevice]:
    """A stand-in for every chip, in the compiler's order: the first axis fastest."""
    places = Torus.in_order((*lengths_of(topology), 1, 1)[:3]).coordinates
    return [ImaginaryDevice(k * len(places) + i, place, k) for k in range(slices) for i, place in enumerate(places)]


def tpu_devices(topology: str, slices: int = 1) -> list:
    """Devices of a slice such as "v5e:16x16" or "v5p:4x4x8", to build a mesh and compile for. Nothing can run on them.

    Args:
      slices: as many of them, joined over DCN.
    Raises: UserError for a name that is no slice, or where libtpu is not installed.
    """
    lengths = lengths_of(topology)
    wraps_at = chip_of(topology).wraps_at
    if not has_compiler():
        raise UserError(f"{topology}: the TPU compiler is not here: {install_hint('tpu')}.")
    _prepare_environment()
    from jax.experimental import topologies

    # Without wrap a v5p slice has no torus links, and an all-gather over three axes becomes an all-reduce.
    wrap = tuple(n % wraps_at == 0 for n in lengths) + (False,) * (3 - len(lengths))
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology, num_slices=slices, wrap=wrap)
    except Exception as error:
        raise UserError(f"{topology}: the TPU compiler knows no such slice ({error}).") from error
    return list(described.devices)


def _prepare_environment() -> None:
    """The compiler must not look for the cloud's metadata, nor mind a second process that compiles."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    if hardware.only_cpu():  # else it complains, at length, that it finds no machine around it
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_WORKER_ID", "0")
