"""The loss curve of a run as a picture, from its metrics.jsonl alone."""

import io
import itertools
import math
from collections.abc import Mapping, Sequence

from etils import epath

from phijax.report.writers import HELD_OUT_LOSS, read_metrics

INK, GREY = "#1f2328", "#8c959f"
TRAINING, HELD_OUT = "#0969da", ("#cf222e", "#1a7f37", "#8250df", "#bc4c00", "#0a7ea4")


def plot_losses(
    metrics_path: epath.PathLike, output_png: epath.PathLike, baselines: Mapping[str, float] | None = None
) -> None:
    """Draws training loss, held-out loss by data set and horizontal baselines, in nats per token.

    Args:
      metrics_path: a metrics.jsonl. Steps whose loss is not finite are marked at the upper edge.
      output_png: written whole; its folder exists.
      baselines: label -> nats, for example {"uniform, ln 8192": 9.01, "unigram entropy": 6.8}.
    """
    # The object interface, not pyplot: no display is looked for and no figure is kept alive.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_metrics(metrics_path)
    figure = Figure(figsize=(9, 5.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _draw_training(axes, _curve(rows, "loss"))
    names = sorted({key for row in rows for key in row if key.startswith(HELD_OUT_LOSS)})
    for i, key in enumerate(names):
        steps, losses = _curve(rows, key)
        label = f"held-out, {key.removeprefix(HELD_OUT_LOSS)}" + (f": {losses[-1]:.3f}" if losses else "")
        axes.plot(steps, losses, "o-", ms=4.5, lw=1.4, color=HELD_OUT[i % len(HELD_OUT)], label=label, zorder=4)
    for label, value in (baselines or {}).items():
        axes.axhline(value, color=GREY, lw=1, ls=(0, (4, 3)), zorder=1)
        axes.annotate(
            f"{label}: {value:.2f}", (1, value), xycoords=("axes fraction", "data"), xytext=(-4, 3),
            textcoords="offset points", ha="right", va="bottom", fontsize=8.5, color=GREY,
        )  # fmt: skip
    _finish(axes)
    data = io.BytesIO()
    figure.savefig(data, format="png")
    epath.Path(output_png).write_bytes(data.getvalue())


def _curve(rows: Sequence[dict], key: str) -> tuple[list[int], list[float]]:
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _draw_training(axes, curve: tuple[list[int], list[float]]) -> None:
    steps, losses = curve
    finite = [(step, loss) for step, loss in zip(steps, losses, strict=True) if math.isfinite(loss)]
    xs, ys = [step for step, _ in finite], [loss for _, loss in finite]
    if len(ys) > 60:
        axes.plot(xs, ys, color=TRAINING, alpha=0.25, lw=0.8, zorder=2)
        ys = smoothed(ys, window=len(ys) // 30)
        axes.plot(xs, ys, color=TRAINING, lw=1.8, label=f"training, smoothed: {ys[-1]:.3f}", zorder=3)
    elif ys:
        axes.plot(xs, ys, color=TRAINING, lw=1.8, label=f"training: {ys[-1]:.3f}", zorder=3)
    bad = [step for step, loss in zip(steps, losses, strict=True) if not math.isfinite(loss)]
    if bad:
        axes.plot(bad, [1] * len(bad), "v", color=HELD_OUT[0], ms=6, transform=axes.get_xaxis_transform(),
                  label=f"not finite, {len(bad)} logged", clip_on=False)  # fmt: skip


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Mean over about `window` values around each, so that a falling curve is not drawn above itself.

    As many before as after, also at the steep start; at the flat end up to half a window before each.
    """
    sums = [0.0, *itertools.accumulate(values)]
    result = []
    for i in range(len(values)):
        before = min(window // 2, i)
        after = min(before, len(values) - 1 - i)
        result.append((sums[i + after + 1] - sums[i - before]) / (before + after + 1))
    return result


def _finish(axes) -> None:
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel("loss, nats per token", color=INK)
    axes.set_title("Loss", loc="left", color=INK, fontsize=13, fontweight="bold")
    axes.grid(True, color="#d0d7de", lw=0.6, alpha=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=INK, labelsize=9)
    axes.margins(x=0.02, y=0.08)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9.5, labelcolor=INK)
