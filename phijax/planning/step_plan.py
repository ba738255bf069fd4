"""What one phase's train step needs and takes, compiled or analytic, under the same names."""

import dataclasses
import math
from typing import Any, Literal

from phijax.model.flops import train_flops_per_token
from phijax.parallel.hardware import fills_memory
from phijax.planning import analytic
from phijax.planning.analytic import Slice
from phijax.planning.assumptions import ANALYTIC_ERROR, COMPILED_ERROR, CROWDED, CROWDED_FROM, Chip
from phijax.planning.compiled import Compiled, DoesNotFit
from phijax.planning.estimator import Estimate
from phijax.training.program import BatchShape, Recipe

FLOP_CONVENTION = (
    "6 FLOP a matrix parameter and token, 12 N H a layer and key that a causal query sees (half the square), nothing "
    "for recomputation"
)


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """Bytes are of one chip, seconds of one optimizer step; `flops` are the model's, of a step on all chips."""

    name: str
    shape: BatchShape  # (A, B, T)
    steps: int
    method: Literal["compiled", "analytic"]
    chip: Chip
    chips: int
    fits: bool
    hbm_peak: float
    hbm_parts: dict[str, float]
    estimate: Estimate
    flops: float
    error: str
    note: str = ""
    compile_seconds: float = 0.0

    @property
    def tokens(self) -> int:
        return math.prod(self.shape)

    @property
    def mfu(self) -> float:
        return self.flops / self.chips / self.estimate.step / self.chip.peak_flops

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.estimate.step

    @property
    def seconds(self) -> float:
        return self.steps * self.estimate.step

    def to_dict(self) -> dict[str, Any]:
        e = self.estimate
        return {
            "name": self.name,
            "batch": list(self.shape),
            "steps": self.steps,
            "method": self.method,
            "error": self.error,
            "note": self.note,
            "fits": self.fits,
            "hbm_limit_bytes": self.chip.hbm_bytes,
            "hbm_peak_bytes": self.hbm_peak,
            "hbm_parts_bytes": self.hbm_parts,
            "step_seconds": e.step,
            "seconds": {
                "matrix": e.matrix,
                "vector": e.vector,
                "attention": e.attention,
                "exposed_communication": e.exposed,
                "waiting_for_copies": e.waiting,
                "waiting_for_host": e.host,
                "overlapped_communication_beside": e.overlapped,
            },
            "seconds_by_kind": dict(sorted(e.kinds.items(), key=lambda item: -item[1])),
            "collectives": {kind: dataclasses.asdict(traffic) for kind, traffic in e.collectives.items()},
            "core_cycles": e.core_cycles,
            "tokens_per_step": self.tokens,
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
            "compile_seconds": self.compile_seconds,
        }


BETWEEN_SLICES = (
    "the compiled text shows neither traffic between slices nor its buffers: gradients over data are added from "
    "shapes, and the parts of HBM lack what the peak has for it"
)


def _with_slices(compiled: Compiled, shapes: Estimate) -> Compiled:
    """Gradients cross the slices' network once a step, and nothing is done beside it."""
    traffic = shapes.collectives["gradients over data"]
    found = compiled.estimate
    collectives = {**found.collectives, "gradients over data (from shapes)": traffic}
    took = traffic.seconds
    estimate = dataclasses.replace(found, step=found.step + took, exposed=found.exposed + took, collectives=collectives)
    return dataclasses.replace(compiled, estimate=estimate)


def plan_step(
    name: str,
    steps: int,
    recipe: Recipe,
    where: Slice,
    shape: BatchShape,
    compiled: Compiled | DoesNotFit | None,
) -> StepPlan:
    """Args: compiled: what the compiler said; None where it was not asked, then all is analytic."""
    chip, chips = where.chip, math.prod(where.sizes.values())
    flops = train_flops_per_token(recipe.model, shape[2]) * math.prod(shape)
    fills = fills_memory(dict(recipe.compiler_options))
    if isinstance(compiled, Compiled):
        notes = [CROWDED] if compiled.hbm_peak > CROWDED_FROM * chip.hbm_bytes and not fills else []
        if where.torus.slices:
            compiled = _with_slices(compiled, analytic.estimate(recipe, where, shape))
            notes.append(BETWEEN_SLICES)
        return StepPlan(
            name, shape, steps, "compiled", chip, chips, True, compiled.hbm_peak, compiled.hbm_parts,
            compiled.estimate, flops, COMPILED_ERROR, "; ".join(notes), compiled.compile_seconds,
        )  # fmt: skip
    parts = analytic.memory(recipe, where.sizes, shape)
    peak, fits = sum(parts.values()), sum(parts.values()) <= chip.hbm_bytes
    note, seconds = "", 0.0
    if fits and peak > CROWDED_FROM * chip.hbm_bytes and not fills:
        note = CROWDED
    if isinstance(compiled, DoesNotFit):
        fits, seconds = False, compiled.compile_seconds
        peak = compiled.hbm_peak or peak
        note = f"the compiler refuses it ({compiled.message}); parts and seconds are analytic"
    return StepPlan(
        name, shape, steps, "analytic", chip, chips, fits, peak, parts,
        analytic.estimate(recipe, where, shape), flops, ANALYTIC_ERROR, note, seconds,
    )  # fmt: skip
