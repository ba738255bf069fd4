"""Meshes, remat policies and micro-batches for a slice: all ranked from shapes, the best few compiled."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from phijax.errors import UserError
from phijax.model import params
from phijax.model.config import ModelConfig
from phijax.model.decoder import REMAT_POLICIES
from phijax.parallel.mesh import MeshConfig
from phijax.parallel.sharding import MESH_AXES
from phijax.planning import analytic
from phijax.planning.analytic import Slice
from phijax.planning.assumptions import CROWDED, CROWDED_FROM, GIB
from phijax.planning.compiled import Compiled, DoesNotFit
from phijax.training.program import BatchShape, Recipe

LARGEST_TENSOR = 8  # beyond it every layer's all-reduces cross more links than they save products
MARGIN = 1.05  # analytic memory may be this much over before a candidate is dropped: the compiler has the last word
POLICIES = tuple(name for name, saved in REMAT_POLICIES.items() if saved is not None)


@dataclasses.dataclass(frozen=True)
class Candidate:
    mesh: MeshConfig
    remat: str
    micro_batches: int

    def overrides(self) -> dict[str, str]:
        """Config keys -> values."""
        sizes = {f"mesh.{name}": str(getattr(self.mesh, name)) for name in MESH_AXES}
        return {**sizes, "model.remat": self.remat, "data.micro_batches": str(self.micro_batches)}


@dataclasses.dataclass(frozen=True)
class Work:
    """What is to be done with a candidate: a recipe that passed all of training's own checks, and its phases.

    phases: (steps, (A, B, T)) each.
    """

    recipe: Recipe
    phases: tuple[tuple[int, BatchShape], ...]


@dataclasses.dataclass(frozen=True)
class Ranked:
    """seconds: of the whole run; peak: bytes of the worst phase; answers: the compiler's, for each distinct shape.

    profile: name of the compiler options (parallel/hardware.py) that it was compiled with, "" for none.
    """

    candidate: Candidate
    work: Work
    seconds: float
    peak: float
    ragged: bool
    answers: tuple[Compiled | DoesNotFit, ...] = ()
    profile: str = ""

    @property
    def refused(self) -> bool:
        return any(isinstance(answer, DoesNotFit) for answer in self.answers)


def meshes(chips: int, slices: int, model: ModelConfig, longest: int) -> Iterator[MeshConfig]:
    """Every mesh of so many chips that could make sense.

    Args:
      longest: sequence length; short rows are not cut over `context`.
    """
    for context in _divisors(chips):
        if longest // context < 4096 and context > 1:
            continue
        for tensor in _divisors(chips // context):
            if tensor > LARGEST_TENSOR or model.num_kv_heads % tensor:
                continue
            rest = chips // context // tensor
            for data in _divisors(rest):
                if data % slices == 0:
                    yield MeshConfig(data=data, fsdp=rest // data, context=context, tensor=tensor, slices=slices)


def rank(
    topology: str,
    options: Sequence[MeshConfig],
    micro_batches: Sequence[int],
    work_of: Callable[[Candidate, Slice], Work],
) -> tuple[list[Ranked], int]:
    """-> (candidates that fit by shapes, quickest run first; how many were looked at).

    Args:
      work_of: makes a candidate's recipe with all checks of a real run; UserError drops the candidate.
    """
    found, looked_at = [], 0
    for mesh in options:
        where = analytic.make_slice(topology, mesh)
        for remat in POLICIES:
            for micro in micro_batches:
                candidate = Candidate(mesh, remat, micro)
                try:
                    work = work_of(candidate, where)
                except UserError:
                    continue
                looked_at += 1
                peak = max(sum(analytic.memory(work.recipe, where.sizes, shape).values()) for _, shape in work.phases)
                if peak > MARGIN * where.chip.hbm_bytes:
                    continue
                seconds = sum(n * analytic.estimate(work.recipe, where, shape).step for n, shape in work.phases)
                if peak > CROWDED_FROM * where.chip.hbm_bytes:
                    seconds *= CROWDED
                ragged = bool(params.check_mesh(work.recipe.model, where.sizes))
                found.append(Ranked(candidate, work, seconds, peak, ragged))
    return sorted(found, key=lambda one: one.seconds), looked_at


CompileOne = Callable[[Ranked, BatchShape], Compiled | DoesNotFit]


def compile_best(ranked: Sequence[Ranked], top: int, compile_one: CompileOne) -> list[Ranked]:
    """The best `top` that fit, compiled, quickest first, then those that the compiler refused on the way there."""
    fitting, refused = [], []
    for one in ranked:
        if len(fitting) == top or len(refused) == 2 * top:
            break
        done = compile_all(one, compile_one)
        (refused if done.refused else fitting).append(done)
    return sorted(fitting, key=lambda one: one.seconds) + refused


def compile_all(one: Ranked, compile_one: CompileOne) -> Ranked:
    """`one` with the compiler's answers for every distinct shape, up to the first refusal."""
    answers: dict[BatchShape, Compiled | DoesNotFit] = {}
    for _, shape in one.work.phases:
        if shape not in answers and not any(isinstance(answer, DoesNotFit) for answer in answers.values()):
            answers[shape] = compile_one(one, shape)
    done = dataclasses.replace(one, answers=tuple(answers.values()))
    if done.refused:
        return done
    seconds = sum(steps * answers[shape].estimate.step for steps, shape in one.work.phases)
    return dataclasses.replace(done, seconds=seconds, peak=max(answer.hbm_peak for answer in answers.values()))


def table(rows: Sequence[Ranked]) -> list[str]:
    """Lines of a table."""
    steps = [sum(n for n, _ in one.work.phases) for one in rows]
    out = [f"  {'data x fsdp x context x tensor':<31}{'remat':<26}{'A':>4}{'GiB':>8}{'s a step':>10}  "]
    for one, count in zip(rows, steps, strict=True):
        mesh = " x ".join(str(getattr(one.candidate.mesh, name)) for name in MESH_AXES)
        how = "refused by the compiler" if one.refused else "compiled" if one.answers else "analytic"
        how += ", rows not a multiple of 8" if one.ragged else ""
        how += f", options {one.profile}" if one.profile else ""
        peak = one.peak
        out.append(
            f"  {mesh:<31}{one.candidate.remat:<26}{one.candidate.micro_batches:>4}{peak / GIB:>8.2f}"
            f"{one.seconds / count:>10.3f}  {how}"
        )
    return out


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
