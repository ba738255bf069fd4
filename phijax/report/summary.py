"""What came of a run, in a few lines: its losses beside guessing."""

import math
from collections.abc import Mapping

from etils import epath

from phijax.report.plot import HELD_OUT_LOSS
from phijax.report.writers import read_metrics


def summarise(metrics_path: epath.PathLike, baselines: Mapping[str, float]) -> list[str]:
    """The first and last training loss, the last held-out losses, the baselines; nats and perplexity."""
    lines = [line for line in read_metrics(metrics_path) if line.get("loss") is not None]
    if not lines:
        return []
    shown = {
        f"training loss, step {lines[0]['step']}": lines[0]["loss"],
        f"training loss, step {lines[-1]['step']}": lines[-1]["loss"],
    }
    for line in lines:
        found = {
            name.removeprefix(HELD_OUT_LOSS): value
            for name, value in line.items()
            if name.startswith(HELD_OUT_LOSS) and value is not None
        }
        shown |= {f"held-out loss, {name}": value for name, value in found.items()}
    shown |= {f"guessing, {name}": value for name, value in baselines.items()}
    width = max(map(len, shown))
    return [f"  {name:<{width}}  {_described(value)}" for name, value in shown.items()]


def _described(nats: float) -> str:
    if not math.isfinite(nats):
        return str(nats)
    return f"{nats:7.4f} nats a token, perplexity {math.exp(min(nats, 700.0)):,.1f}"
