"""Meshes, remat policies, micro-batches and places of Adam's moments: all ranked from shapes, the best few compiled.

Compiling takes a minute or more each, so that the order matters: candidates that differ by less than the shapes can
tell wait until it is known whose twins they are, and it ends when no other can win by what was seen so far.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from phijax.errors import UserError
from phijax.model import params
from phijax.model.config import ModelConfig
from phijax.model.decoder import REMAT_POLICIES
from phijax.parallel.hardware import FILL_MEMORY
from phijax.parallel.mesh import MeshConfig
from phijax.parallel.sharding import MESH_AXES
from phijax.planning import analytic
from phijax.planning.analytic import Slice
from phijax.planning.assumptions import CROWDED_FROM, GIB
from phijax.planning.compiled import Compiled, DoesNotFit
from phijax.training.program import BatchShape, Recipe

LARGEST_TENSOR = 8  # beyond it every layer's all-reduces cross more links than they save products
MARGIN = 1.05  # analytic memory may be this much over before a candidate is dropped: the compiler has the last word
TWINS = 0.01  # of the seconds: settings of one mesh and number of micro-batches that the shapes cannot tell apart
FILLED_FROM = 0.9  # of HBM by shapes: below CROWDED_FROM by what they err, since fill_memory changes nothing else
SCATTER = 0.05  # of compiled over analytic seconds among the candidates of a search (benchmarks/plan_accuracy.py)
POLICIES = tuple(name for name, saved in REMAT_POLICIES.items() if saved is not None)


@dataclasses.dataclass(frozen=True)
class Candidate:
    mesh: MeshConfig
    remat: str
    micro_batches: int
    moments: Literal["device", "host"] = "device"

    def overrides(self) -> dict[str, str]:
        """Config keys -> values."""
        return {
            **{f"mesh.{name}": str(getattr(self.mesh, name)) for name in MESH_AXES},
            "model.remat": self.remat,
            "data.micro_batches": str(self.micro_batches),
            "optimizer.moments": self.moments,
        }


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

    by_shapes: seconds as ranked; they stay when `seconds` are the compiled ones. profile: name of the compiler
    options (parallel/hardware.py) that it was compiled with, "" for none.
    """

    candidate: Candidate
    work: Work
    seconds: float
    peak: float
    ragged: bool
    by_shapes: float
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
        for remat, micro in itertools.product(POLICIES, micro_batches):
            peak = 0.0
            for moments in ("device", "host"):
                if moments == "host" and peak <= CROWDED_FROM * where.chip.hbm_bytes:
                    continue  # quicker on the device, which has the room
                candidate = Candidate(mesh, remat, micro, moments)
                try:
                    work = work_of(candidate, where)
                except UserError:
                    continue
                looked_at += 1
                ranked = by_shapes(candidate, work, where)
                peak = ranked.peak
                if peak <= MARGIN * where.chip.hbm_bytes:
                    found.append(ranked)
    return sorted(found, key=lambda one: one.seconds), looked_at


def by_shapes(candidate: Candidate, work: Work, where: Slice) -> Ranked:
    """With fill_memory as its profile where it leaves little room."""
    peak = max(sum(analytic.memory(work.recipe, where.sizes, shape).values()) for _, shape in work.phases)
    seconds = sum(n * analytic.estimate(work.recipe, where, shape).step for n, shape in work.phases)
    profile = FILL_MEMORY if peak > FILLED_FROM * where.chip.hbm_bytes else ""
    ragged = bool(params.check_mesh(work.recipe.model, where.sizes))
    return Ranked(candidate, work, seconds, peak, ragged, seconds, profile=profile)


CompileOne = Callable[[Ranked, BatchShape], Compiled | DoesNotFit]


def compile_in_turn(
    ranked: Sequence[Ranked], top: int, profiles: Sequence[str], compile_one: CompileOne
) -> Iterator[Ranked]:
    """Each candidate with the compiler's answers as soon as they are there, refused ones too.

    The best of `ranked` until `top` fit or no other can win, then the quickest's twins. What has little room by shapes
    is compiled with fill_memory; the first that fits with room is compiled under each other profile of compiler options
    too, and what comes after it under what was best for it: options change the order. No more than 2 x `top` refusals
    are taken.
    """
    done: list[Ranked] = []
    options: str | None = None  # the best for what has room
    waiting = collections.deque(one for i, one in enumerate(ranked) if not twins(one, ranked[:i]))
    while waiting:
        fitting = [one for one in done if not one.refused]
        refusals = len(done) - len(fitting)
        if _candidates(fitting) >= top or refusals >= 2 * top or cannot_win(waiting[0], fitting):
            break
        now = compile_all(under(waiting.popleft(), options), compile_one)
        done.append(now)
        yield now
        if now.refused:
            smaller = [one for one in twins(now, ranked) if one.peak < now.peak]
            waiting.extendleft(reversed(smaller))
        elif now.profile != FILL_MEMORY and options is None:
            under_each = [now]
            for name in profiles:
                if name != FILL_MEMORY:
                    under_each.append(compile_all(dataclasses.replace(now, profile=name), compile_one))
                    yield under_each[-1]
            done += under_each[1:]
            options = quickest(under_each).profile
    compiled = {one.candidate for one in done}
    for one in twins(best, ranked) if (best := quickest(done)) else []:
        if one.candidate not in compiled:
            yield compile_all(under(one, options), compile_one)


def under(one: Ranked, options: str | None) -> Ranked:
    """With the profile of what has room, or its own."""
    return one if one.profile == FILL_MEMORY else dataclasses.replace(one, profile=options or "")


def cannot_win(one: Ranked, fitting: Sequence[Ranked]) -> bool:
    """Whether it is slower than the quickest even where the compiler likes it better than all that it has seen."""
    if _candidates(fitting) < 2:  # one alone does not tell how far shapes are off here
        return False
    ratio = min(other.seconds / other.by_shapes for other in fitting) * (1 - SCATTER)
    return one.by_shapes * ratio > quickest(fitting).seconds


def _candidates(done: Sequence[Ranked]) -> int:
    return len({one.candidate for one in done})


def quickest(done: Sequence[Ranked]) -> Ranked | None:
    return min((one for one in done if not one.refused), key=lambda one: one.seconds, default=None)


def twins(one: Ranked, among: Sequence[Ranked]) -> list[Ranked]:
    """Others of its mesh and micro-batches that are as quick by shapes."""
    pairs = [(other, other.candidate) for other in among if other.candidate != one.candidate]
    return [
        other
        for other, c in pairs
        if (c.mesh, c.micro_batches) == (one.candidate.mesh, one.candidate.micro_batches)
        and abs(one.by_shapes - other.by_shapes) <= TWINS * one.by_shapes
    ]


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
    settings = f"{'data x fsdp x context x tensor':<31}{'remat':<26}{'A':>4}{'moments':>9}"
    header = f"{settings}{'GiB':>8}{'s a step':>10}{'by shapes':>11}"
    return [f"  {line}" for line in (header, *map(row, rows))]


def row(one: Ranked) -> str:
    """Mesh, policy, micro-batches, whose memory has the moments; GiB, seconds of a step, how they are known.

    Seconds are the mean of the phases' steps.
    """
    steps = sum(n for n, _ in one.work.phases)
    mesh = " x ".join(str(getattr(one.candidate.mesh, name)) for name in MESH_AXES)
    how = "refused by the compiler" if one.refused else "compiled" if one.answers else "analytic"
    if one.answers:
        how += f" in {sum(answer.compile_seconds for answer in one.answers):.0f} s"
    how += ", rows not a multiple of 8" if one.ragged else ""
    how += f", options {one.profile}" if one.profile else ""
    seconds = "-" if one.refused else f"{one.seconds / steps:.3f}"
    candidate = one.candidate
    return (
        f"{mesh:<31}{candidate.remat:<26}{candidate.micro_batches:>4}{candidate.moments:>9}{one.peak / GIB:>8.2f}"
        f"{seconds:>10}{one.by_shapes / steps:>11.3f}  {how}"
    )


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
