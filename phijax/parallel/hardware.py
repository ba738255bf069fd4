"""What the machine is: peak rates for MFU, and settings that must be made before jax starts."""

import ctypes
import dataclasses
import glob
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from phijax.errors import UserError, nearest_name

# Dense bfloat16 matrix peak of one device, FLOP/s, as published by the makers. Longest prefix of `device_kind` wins.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}

# Device kinds of one generation compile alike. Longest prefix wins.
_GENERATIONS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "NVIDIA": "gpu",
}

# Options of the compiler that can pay off, by generation; none is set by default. They are handed over with each
# program, not by LIBTPU_INIT_ARGS or XLA_FLAGS: so `plan` compiles with what the run compiles with, on machines without
# chips too, and an option that another release of the compiler lacks is an error message instead of an abort.
_SPARSE_CORE = {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true",
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": "true",
    "xla_tpu_use_tc_device_shape_on_sc": "true",
}
# By itself the compiler begins to recompute, and to hide fewer gathers, at 95 % of HBM, with what lies on the hosts
# counted in. At 200 it never does: a program fits as it is, or is refused before it runs.
FILL_MEMORY = "fill_memory"
_FILL_MEMORY = {
    "xla_jf_rematerialization_percent_shared_memory_limit": "200",
    "xla_tpu_scheduler_percent_shared_memory_limit": "200",
}
# XLA's own options (xla_gpu_...) take Python's values, those of libtpu also text.
COMPILER_PROFILES: dict[str, dict[str, dict[str, str | bool]]] = {
    "v5e": {FILL_MEMORY: _FILL_MEMORY},
    # sparse_core: collectives beside the core's work, which else waits for all of them.
    "v5p": {"sparse_core": _SPARSE_CORE, FILL_MEMORY: {**_SPARSE_CORE, **_FILL_MEMORY}},
    "v6e": {"sparse_core": _SPARSE_CORE, FILL_MEMORY: {**_SPARSE_CORE, **_FILL_MEMORY}},
    "gpu": {"latency_hiding": {"xla_gpu_enable_latency_hiding_scheduler": True}},  # not measured by us
}
NO_PROFILE = "none"


@dataclasses.dataclass(frozen=True)
class CompilerConfig:
    """Section `compiler`."""

    profile: str = NO_PROFILE  # options of the TPU compiler: a name of hardware.COMPILER_PROFILES


def generation(device_kind: str) -> str | None:
    """Device.device_kind -> the key of COMPILER_PROFILES; None for devices without profiles (CPUs)."""
    known = [name for name in _GENERATIONS if device_kind.startswith(name)]
    return _GENERATIONS[max(known, key=len)] if known else None


def a_chip_with(config: CompilerConfig) -> str | None:
    """Some chip that has the profile, for a run that is described away from its chips; None where none has."""
    return next((chip for chip, profiles in COMPILER_PROFILES.items() if config.profile in profiles), None)


def compiler_options(
    config: CompilerConfig, chip: str | None, *, moments_on_host: bool = False
) -> tuple[tuple[str, str | bool], ...]:
    """(name, value) pairs for the compiler of `chip`, a key of COMPILER_PROFILES; None or another chip has none.

    Args:
      moments_on_host: then TPUs get those of fill_memory too: without them the memory that it frees is not used.
    Raises: UserError for a profile that this chip does not have.
    """
    here = COMPILER_PROFILES.get(chip or "", {})
    filled = _FILL_MEMORY if moments_on_host and FILL_MEMORY in here else {}
    if config.profile == NO_PROFILE:
        return tuple(filled.items())
    if config.profile in here:
        return tuple({**here[config.profile], **filled}.items())
    elsewhere = [name for name, profiles in COMPILER_PROFILES.items() if config.profile in profiles]
    near = nearest_name(config.profile, here)
    raise UserError(
        f"compiler.profile={config.profile!r} is not one of {chip or 'this device'}: "
        f"{', '.join([NO_PROFILE, *here])}."
        + (f" It is for {', '.join(elsewhere)}." if elsewhere else f" Nearest: {near!r}." if near else "")
        + f"  Try --config.compiler.profile={near or NO_PROFILE}"
    )


def fills_memory(options: Mapping[str, str | bool]) -> bool:
    """Whether a program with these options is compiled without the limit of 95 %."""
    return _FILL_MEMORY.items() <= options.items()


def peak_flops(device_kind: str) -> float | None:
    """Peak of one device in FLOP/s, or None where no figure is published (CPUs): then no MFU is reported."""
    known = [name for name in PEAK_FLOPS if device_kind.startswith(name)]
    return PEAK_FLOPS[max(known, key=len)] if known else None


_ALIGNMENT = 64  # bytes, of what XLA:CPU allocates


def keep_freed_memory() -> bool:
    """Makes glibc keep freed blocks, for XLA:CPU; call before jax is imported. False where it does nothing.

    XLA:CPU takes its temporary buffer (gigabytes) from malloc at each execution; glibc maps it fresh and unmaps it
    after, so every step faults in every page again: measured 1.24x on a 34M train step. The process keeps its peak,
    or what it has had since `give_back_freed_memory`.
    """
    mallopt = _of_libc("mallopt")
    if mallopt is None:
        return False
    arena_max, mmap_max, trim_threshold = -8, -4, -1
    return all((mallopt(arena_max, 1), mallopt(mmap_max, 0), mallopt(trim_threshold, -1)))


def in_kept_memory(program: Callable[..., Any], temporary: int) -> Callable[..., Any]:
    """`program`, whose temporary buffer of so many bytes never lies beside the free place of an earlier one.

    A few bytes of that place, taken for something small between two calls, are enough that the buffer goes elsewhere,
    and all memory is kept: a run then held the buffer twice. So each call first asks malloc for the same bytes; where
    it names another place, what lies free is given back. The program must compute within its call (`run_in_turn`).
    """
    allocate, free = _of_libc("posix_memalign"), _of_libc("free")
    if allocate is None or free is None:
        return program
    allocate.argtypes, free.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t), (ctypes.c_void_p,)
    before = None

    def call(*arguments: Any) -> Any:
        nonlocal before
        place = ctypes.c_void_p()
        if allocate(ctypes.byref(place), _ALIGNMENT, temporary) == 0:
            free(place)
            if place.value != before:
                give_back_freed_memory()
            before = place.value
        return program(*arguments)

    return call


def give_back_freed_memory() -> bool:
    """Gives the pages of all freed blocks back to the system, in the middle of the heap too. Whether glibc did.

    For the end of a phase that is over for good: what a compiler, or the making of start weights, held at its worst
    would stay resident beside what follows, which lies elsewhere (0.4 GiB of 2.7 on a 34M train step).
    """
    trim = _of_libc("malloc_trim")
    return bool(trim and trim(0))


def _of_libc(name: str) -> Callable[..., int] | None:
    """A function of glibc's; None on another system, or with another C library (musl)."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None


def run_in_turn() -> None:
    """Makes a process with one CPU device compute within the call of a program; call before jax starts a backend.

    Dispatched, a step of XLA:CPU begins as soon as the results of the one before are there, which is a moment before
    that one's temporary buffer is freed. The heap then holds two for good: 4.5 GiB of a 34M train step, which are 2.7
    in turn: there is no device beside the host's cores that would wait meanwhile.
    """
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)


def only_cpu() -> bool:
    """Whether this machine will compute on its CPU, told without starting jax: asked for, or no accelerator is seen."""
    asked = os.environ.get("JAX_PLATFORMS", "")
    if asked:
        return asked == "cpu"
    accelerators = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/kfd")
    return not any(glob.glob(pattern) for pattern in accelerators)


def prepare_cpu() -> None:
    """Settings for a machine that computes on its CPU; nothing elsewhere. Call before jax is imported.

    Naming the platform keeps jax from looking for chips, which libtpu, where installed to compile for, does at length.
    """
    if only_cpu():
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        keep_freed_memory()
