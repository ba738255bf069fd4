"""A plan as a picture: HBM and step time as stacked bars, and the roofline."""

import io

from etils import epath

from phijax.planning import roofline
from phijax.planning.assumptions import GIB
from phijax.planning.run_plan import RunPlan
from phijax.training.program import Recipe

INK, GREY = "#1f2328", "#8c959f"
COLOURS = ("#0969da", "#54aeff", "#8250df", "#1a7f37", "#4ac26b", "#bc4c00", "#d4a72c", "#8c959f")
SECONDS = {
    "matrix products": ("matrix", "#0969da"),
    "attention": ("attention", "#8250df"),
    "vector work and copies": ("vector", "#d4a72c"),
    "exposed communication": ("exposed", "#cf222e"),
    "waiting for copies": ("waiting", "#8c959f"),
    "waiting for the host": ("host", "#1a7f37"),
}


def plot_plan(plan: RunPlan, recipe: Recipe, output_png: epath.PathLike) -> None:
    """Draws one bar for each distinct step of the plan; the roofline has its points of the first."""
    # The object interface, not pyplot: no display is looked for and no figure is kept alive.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    memory, time, roof = figure.subplots(1, 3, width_ratios=[1, 1, 1.3])
    steps = list({step.shape: step for step in plan.steps}.values())
    names = [f"{a} x {b} x {t}" for a, b, t in (step.shape for step in steps)]
    for place, step in enumerate(steps):
        bottom = 0.0
        for (part, size), colour in zip(step.hbm_parts.items(), COLOURS, strict=True):
            memory.bar(place, size / GIB, 0.6, bottom, color=colour, label=part if place == 0 else None)
            bottom += size / GIB
        bottom = 0.0
        for label, (field, colour) in SECONDS.items():
            took = getattr(step.estimate, field)
            time.bar(place, took, 0.6, bottom, color=colour, label=label if place == 0 else None)
            bottom += took
        time.annotate(f"MFU {step.mfu:.0%}", (place, bottom), xytext=(0, 3), textcoords="offset points", ha="center",
                      color=INK, fontsize=9)  # fmt: skip
    time.set_ylim(0, 1.1 * max(step.estimate.step for step in steps))
    limit = steps[0].chip.hbm_bytes / GIB
    memory.axhline(limit, color="#cf222e", lw=1.2)
    memory.annotate(f"{limit:.2f} GiB", (0.98, limit), xycoords=("axes fraction", "data"), xytext=(0, 3),
                    textcoords="offset points", ha="right", color="#cf222e", fontsize=8.5)  # fmt: skip
    memory.set_ylim(0, max(limit * 1.1, *(1.1 * step.hbm_peak / GIB for step in steps)))
    for axes, title, unit in ((memory, "HBM of a chip", "GiB"), (time, "One step, estimated", "seconds")):
        axes.set_xticks(range(len(steps)), names)
        axes.set_xlim(-0.8, len(steps) - 0.2)
        _finish(axes, title, unit)
    _draw_roof(roof, plan, recipe)
    method = "compiled" if all(step.method == "compiled" for step in steps) else "analytic"
    figure.suptitle(f"{plan.topology}, {plan.chips} chips, {method}", color=INK, x=0.01, ha="left", fontsize=11)
    data = io.BytesIO()
    figure.savefig(data, format="png")
    epath.Path(output_png).write_bytes(data.getvalue())


def _draw_roof(axes, plan: RunPlan, recipe: Recipe) -> None:
    step = plan.steps[0]
    found = roofline.points(step, recipe, plan.sizes)
    ridge = step.chip.peak_flops / step.chip.hbm_bandwidth
    low, high = min(10.0, ridge / 4), max(2 * max(p.intensity for p in found), 10 * ridge)
    line = [low, ridge, high]
    axes.loglog(line, [roofline.roof(step.chip, x) / 1e12 for x in line], color=INK, lw=1.4)
    for point, colour in zip(found, ("#0969da", "#8250df", "#cf222e"), strict=False):
        axes.plot(point.intensity, point.rate / 1e12, "o", color=colour, label=f"{point.name}: {point.rate / 1e12:.0f}")
    _finish(axes, "Roofline", "TFLOP/s of a chip")
    axes.set_xlabel("FLOP a byte of HBM", color=INK)


def _finish(axes, title: str, unit: str) -> None:
    axes.set_title(title, loc="left", color=INK, fontsize=12, fontweight="bold")
    axes.set_ylabel(unit, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=INK, labelsize=9)
    axes.legend(frameon=False, fontsize=8.5, labelcolor=INK, loc="upper left", bbox_to_anchor=(0, -0.14))
