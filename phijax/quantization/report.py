"""What quantising cost: how far the distributions moved, the error of each layer, the size."""

import dataclasses
import io
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from etils import epath

from phijax.quantization import policy
from phijax.quantization.policy import Scheme
from phijax.report.plot import GREY, HELD_OUT, INK, TRAINING

Logits = Callable[[np.ndarray], np.ndarray]  # ids (T,) -> (T, V)

BLOCK = 64  # rows of logits that are widened to float64 at once


@dataclasses.dataclass(frozen=True)
class Tokens:
    """One number a token, (T,) each: KL(float || quantised) in nats, the two losses in nats, whether top-1 agrees."""

    kl: np.ndarray
    loss_float: np.ndarray
    loss_quantized: np.ndarray
    agrees: np.ndarray


@dataclasses.dataclass(frozen=True)
class Quality:
    """Over all held-out tokens."""

    tokens: int
    kl_mean: float
    kl_99th_percentile: float
    perplexity_float: float
    perplexity_quantized: float
    top1_agreement: float

    def lines(self) -> list[str]:
        return [
            f"on {self.tokens:,} held-out tokens:",
            f"  KL from the float model   mean {self.kl_mean:.5f}, 99th percentile {self.kl_99th_percentile:.4f} nats",
            f"  perplexity                {self.perplexity_float:.4f} -> {self.perplexity_quantized:.4f}",
            f"  the likeliest token       is the same for {self.top1_agreement:.2%}",
        ]


def compare(reference: np.ndarray, quantized: np.ndarray, targets: np.ndarray) -> Tokens:
    """Args: two logits (T, V), any float; targets (T,). In float64."""
    parts = []
    for start in range(0, len(targets), BLOCK):
        here = slice(start, start + BLOCK)
        p, q = (log_softmax(logits[here]) for logits in (reference, quantized))
        wanted = (np.arange(len(p)), targets[here])
        kl = np.sum(np.exp(p) * (p - q), axis=-1)
        parts.append((kl, -p[wanted], -q[wanted], p.argmax(-1) == q.argmax(-1)))
    return Tokens(*(np.concatenate(values) for values in zip(*parts, strict=True)))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """(..., V), in float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def measure(
    rows: Sequence[np.ndarray],
    load_float: Callable[[], Logits],
    load_quantized: Callable[[], Logits],
    say: Callable[[str], None] = lambda line: None,
) -> Quality:
    """Both models over the same rows, (T + 1,) ids each. One after the other: the first's logits wait on disk."""
    with tempfile.TemporaryFile() as file:
        logits, places = load_float(), []
        for number, row in enumerate(rows, start=1):
            values = np.asarray(logits(row[:-1]), np.float32)
            places.append((file.tell(), values.shape))
            file.write(values.tobytes())
            say(f"  float model, row {number} of {len(rows)}")
        del logits
        logits, found = load_quantized(), []
        for number, (row, (place, shape)) in enumerate(zip(rows, places, strict=True), start=1):
            file.seek(place)
            before = np.frombuffer(file.read(4 * math.prod(shape)), np.float32).reshape(shape)
            found.append(compare(before, logits(row[:-1]), row[1:]))
            say(f"  quantised model, row {number} of {len(rows)}")
    return summarise(found)


def summarise(rows: Sequence[Tokens]) -> Quality:
    kl, before, after, agrees = (
        np.concatenate([getattr(row, field.name) for row in rows]) for field in dataclasses.fields(Tokens)
    )
    return Quality(
        tokens=len(kl),
        kl_mean=float(kl.mean()),
        kl_99th_percentile=float(np.percentile(kl, 99)),
        perplexity_float=math.exp(before.mean()),
        perplexity_quantized=math.exp(after.mean()),
        top1_agreement=float(agrees.mean()),
    )


def size_table(
    shapes: Mapping[str, tuple[int, ...]], assigned: Mapping[str, Scheme], nbytes: Mapping[str, int]
) -> list[str]:
    """A line a kind of weight: its scheme, how many weights, bits a weight, bytes before compression."""
    lines = [f"{'weights':<12}{'scheme':<12}{'number':>15}{'bits/weight':>13}{'GB':>9}{'GiB':>9}"]
    for kind in (*policy.KINDS, None):
        paths = [path for path in shapes if policy.kind_of(path) == kind]
        if paths:
            scheme = assigned.get(paths[0])
            lines.append(
                _row(kind or "others", policy.name_of(scheme) if scheme else "as stored", paths, shapes, nbytes)
            )
    return [*lines, _row("all", "", list(shapes), shapes, nbytes)]


def _row(kind: str, scheme: str, paths: list[str], shapes, nbytes) -> str:
    number, size = sum(math.prod(shapes[path]) for path in paths), sum(nbytes[path] for path in paths)
    return f"{kind:<12}{scheme:<12}{number:>15,}{8 * size / number:>13.3f}{size / 1e9:>9.3f}{size / 2**30:>9.3f}"


def plot_errors(errors: Mapping[str, Sequence[float]], output_png: epath.PathLike) -> None:
    """Draws each leaf's relative error |w - q| / |w| over the layers; embedding and head as lines across.

    Args: errors: leaf path -> one number a layer. output_png: written whole; its folder exists.
    """
    # The object interface, not pyplot: no display is looked for and no figure is kept alive.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = (TRAINING, *HELD_OUT, GREY)
    for i, (path, values) in enumerate(errors.items()):
        name, colour = path.rsplit("/", 1)[-1], colours[i % len(colours)]
        if path.startswith("blocks/"):
            axes.plot(range(len(values)), values, "o-", ms=3, lw=1.2, color=colour, label=name)
        else:
            axes.axhline(values[0], lw=1.2, ls=(0, (4, 3)), color=colour, label=name)
    axes.set_xlabel("layer", color=INK)
    axes.set_ylabel("relative error of the weights, |w - q| / |w|", color=INK)
    axes.set_title("What rounding changed", loc="left", color=INK, fontsize=13, fontweight="bold")
    axes.set_ylim(bottom=0)
    axes.grid(True, color="#d0d7de", lw=0.6, alpha=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, ncols=3)
    data = io.BytesIO()
    figure.savefig(data, format="png")
    epath.Path(output_png).write_bytes(data.getvalue())
