"""Whose bytes they are: the buffers of a program's worst moment, told apart by argument, shape and type."""

import math
from collections.abc import Mapping, Sequence

from phijax.model import params
from phijax.parallel import sharding
from phijax.planning.hbm import Buffer, Peak
from phijax.training.program import BatchShape, Recipe

PARTS = (
    "parameters",
    "optimizer",
    "gradients",
    "saved activations",
    "weights in the compute type",
    "logits and head",
    "batch",
    "workspace",
)


def by_part(
    peak: Peak, recipe: Recipe, sizes: Mapping[str, int], shape: BatchShape, arguments: Sequence[str]
) -> dict[str, float]:
    """Part -> bytes of one chip.

    Args:
      arguments: part of each argument, in order.
    """
    known = _Shapes(recipe, sizes, shape)
    parts = dict.fromkeys(PARTS, 0.0)
    for buffer in peak.buffers:
        if buffer.argument is not None and buffer.argument < len(arguments):
            parts[arguments[buffer.argument]] += buffer.bytes
        else:
            parts[known.part(buffer)] += buffer.bytes
    return parts


class _Shapes:
    """Sizes by which an array that is no argument is recognised."""

    def __init__(self, recipe: Recipe, sizes: Mapping[str, int], shape: BatchShape):
        c = recipe.model
        self.stack = (c.num_layers, shape[1] // (sizes["data"] * sizes["fsdp"]))
        self.vocab = c.padded_vocab_size // sizes["tensor"]
        self.head = self.vocab * c.model_dim
        self.shards, self.gathered = set(), set()
        for path, shape in params.shapes(c).items():
            names = params.axes(c)[path]
            cut = [n // sharding.parts(a, sizes) for n, a in zip(shape, names, strict=True)]
            whole = [n // sharding.parts(a, sizes, gathered=True) for n, a in zip(shape, names, strict=True)]
            self.shards.add(tuple(cut))
            if path.startswith(f"{params.STACKED}/") and len(shape) == 3:
                self.gathered.add(math.prod(whole[1:]))
                self.gathered.add(math.prod(whole))
        self.shard_elements = {math.prod(shape) for shape in self.shards}
        self.compute = {"bfloat16": "bf16", "float32": "f32"}.get(recipe.backend.compute_dtype, "bf16")

    def part(self, buffer: Buffer) -> str:
        array = buffer.array
        if array.shape[:2] == self.stack:  # before all else: a stack may have as many elements as a gathered weight
            return "saved activations"
        if array.elements in self.shard_elements:
            # With float32 weights in a float32 program both look alike; they are gradients far more often.
            return "gradients" if array.dtype == "f32" else "weights in the compute type"
        if array.elements == self.head or self.vocab in array.shape:
            return "logits and head"
        if array.elements in self.gathered:
            return "weights in the compute type"
        return "workspace"
