"""The train step, compiled ahead of time for chips that are not here, and what its text says."""

import dataclasses
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from phijax.errors import UserError
from phijax.parallel.program_text import parse
from phijax.planning import estimator, hbm, memory_parts
from phijax.planning.assumptions import chip_of
from phijax.planning.estimator import Estimate
from phijax.planning.topology import torus_of
from phijax.training.program import BatchShape, Recipe, abstract_batch, abstract_state, lower_train_step


@dataclasses.dataclass(frozen=True)
class Compiled:
    """hbm_peak: bytes by the compiler's own count; hbm_parts: bytes by part at that moment, read from the schedule."""

    hbm_peak: int
    hbm_parts: dict[str, float]
    estimate: Estimate
    compile_seconds: float


@dataclasses.dataclass(frozen=True)
class DoesNotFit:
    """The compiler's refusal. hbm_peak: bytes that it would need, None where its message does not say."""

    message: str
    hbm_peak: int | None
    compile_seconds: float


def compile_step(
    recipe: Recipe,
    mesh: Mesh,
    topology: str,
    shape: BatchShape,
    *,
    options: Mapping[str, Any] | None = None,
) -> Compiled | DoesNotFit:
    """Compiles the very step that would run. A minute or two and 1 to 2 GB of this machine's memory at full size.

    Args:
      mesh: over `topology.tpu_devices(topology)`.
      options: the compiler's, by name, beside those of the recipe.
    Raises: UserError for an option that this compiler does not take.
    """
    asked = {**dict(recipe.compiler_options), **(options or {})}
    started = time.monotonic()
    try:
        compiled = lower_train_step(recipe, mesh, shape).compile(compiler_options=dict(options) if options else None)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if asked and "INVALID_ARGUMENT" in str(error):
            raise UserError(f"The TPU compiler refuses an option of {asked}: {_first_line(error)}") from error
        if not _is_out_of_memory(str(error)):
            raise
        return DoesNotFit(_first_line(error), needed_bytes(str(error)), time.monotonic() - started)
    seconds = time.monotonic() - started
    program = parse(compiled.as_text())
    arguments = argument_parts(recipe, mesh, shape)
    return Compiled(
        hbm_peak=hbm_peak(compiled.memory_analysis()),
        hbm_parts=memory_parts.by_part(hbm.peak(program), recipe, dict(mesh.shape), shape, arguments),
        estimate=estimator.estimate(
            program, chip_of(topology), torus_of(topology, mesh.devices.flat), window=recipe.model.sliding_window
        ),
        compile_seconds=seconds,
    )


def hbm_peak(memory: Any) -> int:
    """Bytes of HBM at the worst moment, out of the compiler's `CompiledMemoryStats`.

    XLA's peak is that of whichever memory holds most, added to the arguments, those in the host's memory too: for a
    small program that is VMEM's, and the figure more than was ever placed in HBM. What was placed bounds it: by the
    compiler's own total or, where it tells none, by arguments, results and temporaries.
    """
    host = memory.host_argument_size_in_bytes + memory.host_output_size_in_bytes - memory.host_alias_size_in_bytes
    host += memory.host_temp_size_in_bytes
    placed = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    placed += memory.temp_size_in_bytes
    return min(memory.peak_memory_in_bytes - host, getattr(memory, "total_allocation_bytes", 0) or placed)


def argument_parts(recipe: Recipe, mesh: Mesh, shape: BatchShape) -> Sequence[str]:
    """The part of memory that each argument of the program belongs to, in the program's order."""
    arguments = (abstract_state(recipe, mesh), abstract_batch(recipe, mesh, shape))
    parts = []
    for path, _ in jax.tree_util.tree_leaves_with_path(arguments):
        name = jax.tree_util.keystr(path)
        known = {".params": "parameters", ".frozen": "parameters", ".opt_state": "optimizer"}
        parts.append(next((part for mark, part in known.items() if mark in name), "batch"))
    return parts


def _is_out_of_memory(message: str) -> bool:
    return "RESOURCE_EXHAUSTED" in message or "Ran out of memory" in message or "CompileTimeHbmOom" in message


def needed_bytes(message: str) -> int | None:
    """Out of "Used 16.91G of 15.75G hbm" or "total memory required for HLO temporaries (2.00T)"."""
    found = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message)
    found = found or re.search(r"total memory required for HLO temporaries \(([\d.]+)([KMGT])\)", message)
    return int(float(found[1]) * 1024 ** ("KMGT".index(found[2]) + 1)) if found else None


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
