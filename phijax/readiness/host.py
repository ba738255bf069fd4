"""What one process knows about itself and its machine, told without a device."""

import dataclasses
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import resource
import shutil

import jax
from etils import epath

import phijax
from phijax.checkpoint import host_memory
from phijax.storage import durable

# libtpu is absent on machines without TPUs, which is equal there too.
PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "tensorstore", "grain")
# Of jax, from the environment: what decides numbers and programs.
SETTINGS = ("jax_enable_x64", "jax_default_matmul_precision", "jax_numpy_dtype_promotion", "jax_default_prng_impl")
SOURCES = (".py", ".cc", ".h")


@dataclasses.dataclass(frozen=True)
class Host:
    """memory: free bytes of the machine. disk: free bytes where the workdir lies, None on an object store."""

    name: str
    versions: dict[str, str]
    memory: int | None
    disk: int | None
    open_files: int


def this_host(workdir: epath.Path | None) -> Host:
    return Host(
        name=os.uname().nodename,
        versions=versions(),
        memory=host_memory.available_bytes(),
        disk=free_disk(workdir),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    )


def versions() -> dict[str, str]:
    """Of Python, of the packages that decide numbers and protocols, and of our own files by digest; jax's settings."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}  # a patch of it changes neither
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    found |= {name: str(getattr(jax.config, name, "absent")) for name in SETTINGS}
    # Instead of our version, which a checkout of another commit has too.
    return {**found, "code": code_digest(pathlib.Path(phijax.__file__).parent)}


def code_digest(package: pathlib.Path) -> str:
    """Twelve hex digits over names and contents of all sources of a package: Python, and C++ that is built from it."""
    digest = hashlib.sha256()
    for file in sorted(file for file in package.rglob("*") if file.suffix in SOURCES):
        digest.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def free_disk(folder: epath.Path | None) -> int | None:
    """Bytes; of the nearest folder above that exists."""
    if folder is None or not durable.is_local(folder):
        return None
    existing = os.path.abspath(os.fspath(folder))
    while not os.path.exists(existing):
        existing = os.path.dirname(existing)
    return shutil.disk_usage(existing).free
