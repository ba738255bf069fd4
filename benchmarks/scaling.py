"""How training scales by the plan: python benchmarks/scaling.py [--compile_up_to=128] [--plot=scaling.png]

Mini and medium on v5p (mini on v5e too), from one host to 2048 chips of one slice (v5p-4096) and to eight slices over
DCN. Weak: as many sequences a chip everywhere. Strong: 1024 sequences a step in all. Analytic, from shapes alone, but
for the rows that --compile_up_to asks for, which the TPU compiler makes on this machine (1 to 3 minutes and 3 GB each).
Nothing is run on any TPU.
"""

import dataclasses
import math
from collections.abc import Iterator

from absl import app, flags

from phijax.parallel import hardware

hardware.prepare_cpu()

from phijax.model.backend import CHOICES
from phijax.model.cross_entropy import LossConfig
from phijax.model.presets import PRESETS
from phijax.parallel.mesh import MeshConfig, make_mesh
from phijax.planning import analytic, search
from phijax.planning.assumptions import CROWDED_FROM, GIB
from phijax.planning.compiled import compile_step
from phijax.planning.step_plan import StepPlan, plan_step
from phijax.planning.topology import lengths_of, tpu_devices
from phijax.training.optimizer import OptimizerConfig
from phijax.training.program import Recipe

FLAGS = flags.FLAGS
flags.DEFINE_integer("compile_up_to", 0, "Chips of the largest rows that are compiled; 0: none.")
flags.DEFINE_multi_string("price", ["v5e=1.2", "v5p=4.2"], "CHIP=NUMBER, of a chip and hour, in any currency.")
flags.DEFINE_string("plot", None, "Picture to write.")

LENGTH = 4096
STRONG = 1024  # sequences a step
# Most rows a weight can be cut into with 8 left on a chip: WORKSPACE.md, planning.md.
FSDP = {"phi3_mini": 128, "phi3_medium": 64}
WEAK = {("phi3_mini", "v5e"): 2, ("phi3_mini", "v5p"): 4, ("phi3_medium", "v5p"): 4}  # sequences a chip
PLACES = {
    "v5e": [("2x2", 1), ("2x4", 1), ("4x4", 1), ("8x8", 1), ("16x16", 1), ("16x16", 2), ("16x16", 8)],
    "v5p": [
        *(("2x2x1", 1), ("2x2x2", 1), ("2x2x4", 1), ("4x4x4", 1), ("4x4x8", 1), ("8x8x8", 1), ("8x16x16", 1)),
        *(("4x4x8", 2), ("4x4x8", 8)),
    ],
}


@dataclasses.dataclass(frozen=True)
class Row:
    model: str
    place: str
    slices: int
    kind: str  # weak or strong
    mesh: MeshConfig
    remat: str
    plan: StepPlan
    shapes: StepPlan  # the same setting from shapes alone

    def cost(self, prices: dict[str, float]) -> float:
        """Of 10^9 tokens."""
        return prices[self.place.split(":")[0]] * self.plan.chips * 1e9 / self.plan.tokens_per_second / 3600


def rows(model: str, chip: str) -> Iterator[Row]:
    for shape, slices in PLACES[chip]:
        place = f"{chip}:{shape}"
        chips = math.prod(lengths_of(place)) * slices
        fsdp = min(FSDP[model], chips // slices)
        mesh = MeshConfig(data=chips // fsdp, fsdp=fsdp, slices=slices)
        for kind, sequences in (("weak", WEAK[model, chip] * chips), ("strong", STRONG)):
            if sequences % chips == 0 and (found := best(model, place, mesh, sequences)):
                yield Row(model, place, slices, kind, mesh, *found)


def best(model: str, place: str, mesh: MeshConfig, sequences: int) -> tuple[str, StepPlan, StepPlan] | None:
    """The quickest of what fits by shapes: what is saved, and how many sequences a chip takes at once.

    Where the compiler is asked and finds that it does not fit, the next one.
    """
    where, found = analytic.make_slice(place, mesh), []
    chips = math.prod(where.sizes.values())
    for remat in search.POLICIES:
        recipe = Recipe(
            dataclasses.replace(PRESETS[model], sliding_window=None),
            dataclasses.replace(CHOICES["tpu"], remat=remat),
            OptimizerConfig(),
            LossConfig(),
            total_steps=10_000,
            seed=0,
        )
        for at_once in (1, 2, 4):
            if sequences // chips % at_once:
                continue
            micro = sequences // chips // at_once
            plan = plan_step(remat, 1, recipe, where, (micro, sequences // micro, LENGTH), None)
            if plan.hbm_peak < CROWDED_FROM * plan.chip.hbm_bytes:
                found.append((plan.estimate.step, remat, recipe, plan))
    found.sort(key=lambda one: one[0])
    if chips > FLAGS.compile_up_to:
        return next(((remat, plan, plan) for _, remat, _, plan in found), None)
    laid = make_mesh(mesh, tpu_devices(place, mesh.slices))
    for _, remat, recipe, shapes in found:
        plan = plan_step(remat, 1, recipe, where, shapes.shape, compile_step(recipe, laid, place, shapes.shape))
        if plan.fits:
            return remat, plan, shapes
    return None


def line(row: Row, prices: dict[str, float]) -> str:
    plan, name = row.plan, f"{row.slices} x {row.place}" if row.slices > 1 else row.place
    a, b, _ = plan.shape
    by_shapes = ""
    if plan.method == "compiled":
        step, peak = row.shapes.estimate.step, row.shapes.hbm_peak
        by_shapes = (
            f"; by shapes {step:.3f} s ({step / plan.estimate.step - 1:+.1%}), {peak / GIB:.2f} GiB "
            f"({peak / plan.hbm_peak - 1:+.1%})"
        )
    return (
        f"{row.model.removeprefix('phi3_'):<7}{name:<15}{plan.chips:>5} {row.kind:<7}{row.mesh.data:>4} x "
        f"{row.mesh.fsdp:<4}{a:>4} x {b:<6}{row.remat:<24}{plan.estimate.step:>9.3f}"
        f"{plan.tokens_per_second / 1e3:>10,.0f}{plan.tokens_per_second / plan.chips:>9,.0f}{plan.mfu:>7.1%}"
        f"{plan.hbm_peak / GIB:>8.2f}{row.cost(prices):>9.2f}  {plan.method}{by_shapes}"
    )


def main(_) -> None:
    prices = {chip: float(price) for chip, price in (text.split("=") for text in FLAGS.price)}
    print(
        f"{'model':<7}{'slices':<15}{'chips':>5} {'kind':<7}{'data x fsdp':<11}{'  A x B':<13}{'saved':<24}"
        f"{'seconds':>9}{'k tok/s':>10}{'a chip':>9}{'MFU':>7}{'GiB':>8}{'per 1e9':>9}"
    )
    found = []
    for model, chip in WEAK:
        for row in rows(model, chip):
            found.append(row)
            print(line(row, prices), flush=True)
    if FLAGS.plot:
        plot(found, FLAGS.plot)
        print(f"wrote {FLAGS.plot}")


def plot(found: list[Row], output: str) -> None:
    """MFU and tokens a second over chips: a line of one slice, circles of several, crosses where it was compiled."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    share, speed = figure.subplots(1, 2)
    colours = dict(zip(WEAK, ("#1a7f37", "#0969da", "#bc4c00"), strict=True))
    for (model, chip), colour in colours.items():
        for kind, style in (("weak", "-"), ("strong", ":")):
            mine = [r for r in found if (r.model, r.place.split(":")[0], r.kind) == (model, chip, kind)]
            one, several = ([r for r in mine if (r.slices > 1) == many] for many in (False, True))
            label = f"{model.removeprefix('phi3_')}, {chip}, {kind}"
            for axes, value in ((share, lambda p: p.mfu), (speed, lambda p: p.tokens_per_second)):
                axes.plot(
                    *([r.plan.chips for r in one], [value(r.shapes) for r in one], style),
                    **dict(marker=".", color=colour, label=label),
                )
                axes.plot(
                    [r.plan.chips for r in several], [value(r.shapes) for r in several], "o", mfc="none", color=colour
                )
                compiled = [r for r in mine if r.plan.method == "compiled"]
                axes.plot([r.plan.chips for r in compiled], [value(r.plan) for r in compiled], "x", color=colour)
    share.set_ylim(0, 1)
    speed.set_yscale("log")
    for axes, name in ((share, "estimated MFU"), (speed, "estimated tokens a second")):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("chips (circles: several slices over DCN; crosses: compiled)")
        axes.set_ylabel(name)
        axes.spines[["top", "right"]].set_visible(False)
    share.legend(frameon=False, fontsize=8, ncols=2)
    figure.savefig(output)


if __name__ == "__main__":
    app.run(main)
