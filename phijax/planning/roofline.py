"""Where a step lies under the chip's roof: FLOP for each byte of HBM against FLOP a second."""

import dataclasses
from collections.abc import Mapping

from phijax.model import params
from phijax.model.flops import matmul_parameters
from phijax.planning.assumptions import Chip
from phijax.planning.step_plan import StepPlan
from phijax.training.program import Recipe


@dataclasses.dataclass(frozen=True)
class Point:
    """intensity: FLOP a byte; rate: FLOP a second of one chip, as estimated."""

    name: str
    intensity: float
    rate: float


def roof(chip: Chip, intensity: float) -> float:
    """The most FLOP a second at this intensity. Williams et al. 2009, doi:10.1145/1498765.1498785."""
    return min(chip.peak_flops, intensity * chip.hbm_bandwidth)


def points(step: StepPlan, recipe: Recipe, sizes: Mapping[str, int]) -> list[Point]:
    """Matrix products, attention, and the whole step. Each array of a product is read or written once."""
    c, e, tensor = recipe.model, step.estimate, sizes["tensor"]
    micro, rows, length = step.shape
    tokens = rows * length / (sizes["data"] * sizes["fsdp"] * sizes["context"])
    width = recipe.backend.dtype.itemsize
    q, kv = (n / tensor for n in (c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim))
    flops = moved = 0.0
    of_layer = (leaf for leaf in params.leaves(c).values() if leaf.kind and leaf.axes[0] == "layers")
    for out in (leaf.shape[-2] / tensor for leaf in of_layer):
        flops += 3 * 2 * tokens * out * c.model_dim * c.num_layers
        moved += 3 * width * (tokens * c.model_dim + out * c.model_dim + tokens * out) * c.num_layers
    head = c.padded_vocab_size / tensor
    flops += 3 * 2 * tokens * head * c.model_dim
    moved += 3 * (width * (tokens * c.model_dim + head * c.model_dim) + 4 * tokens * head)
    found = [Point("matrix products", flops / moved, micro * flops / e.matrix)]
    attention = step.flops / step.chips - 6 * matmul_parameters(c) * step.tokens / step.chips
    heads = width * tokens * c.num_layers * (3 * (2 * q + 2 * kv) + q)  # forward and backward, operands and results
    if e.attention:
        found.append(Point("attention", attention / micro / heads, attention / e.attention))
    vector = e.vector * step.chip.hbm_bandwidth
    whole = step.flops / step.chips
    found.append(Point("whole step", whole / (micro * (moved + heads) + vector), whole / e.step))
    return found
