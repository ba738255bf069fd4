"""The tensors of a file and the leaves of ours in them: a family's rows, laid out for one model. Knows no format.

A matrix is spoken of as [out, in], y = x W^T, whichever way round a file or a leaf has it. A leaf is [out, in] too,
unless its product sums over rows (o, down: `params.leaves` says so): then it is [in, out].
"""

import dataclasses
import itertools
from typing import NamedTuple

import numpy as np

from phijax.interchange.weight_source import Index, model_shapes
from phijax.model import params
from phijax.model.config import ModelConfig


class Row(NamedTuple):
    """One tensor of a family; with {} in its name one a layer.

    leaves: ours; several lie one after another along the outputs.
    inputs_first: the file has the matrix as [in, out].
    interleaved: in each head the file has the outputs in the order of a rotation of neighbours (2i, 2i + 1), ours in
      that of one of halves (i, i + H/2).
    """

    name: str
    leaves: tuple[str, ...]
    inputs_first: bool = False
    interleaved: bool = False


@dataclasses.dataclass(frozen=True)
class Part:
    """Where one layer of a leaf lies in a tensor: `rows` outputs from `start` on. transposed: the leaf is [in, out]."""

    leaf: str
    layer: int | None
    start: int
    rows: int
    transposed: bool


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file and the parts it is made of, first output first.

    shape: in the file.
    matrix: whether it is one to the model: what is quantised, and may be narrow. Others are norms, biases, tables.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    matrix: bool
    inputs_first: bool = False
    interleaved: bool = False

    def turned(self, part: Part) -> bool:
        """Whether that part stands in the file transposed to the leaf."""
        return part.transposed != self.inputs_first

    def index(self, part: Part, index: Index) -> Index:
        """A slice of one layer of a leaf -> where it is in the file, transposed there where `turned`."""
        out, *inputs = index[::-1] if part.transposed else index
        start, stop, _ = out.indices(part.rows)
        there = (slice(part.start + start, part.start + stop), *inputs)
        return there[::-1] if self.inputs_first else there


def tensors(c: ModelConfig, rows: tuple[Row, ...]) -> list[Tensor]:
    """Every tensor of the model in the order of the rows; neighbours that are one a layer are dealt out by layers."""
    shapes, leaves = model_shapes(c), params.leaves(c)
    present = [row for row in rows if row.leaves[0] in shapes]  # a tied head has no tensor
    held = [leaf for row in present for leaf in row.leaves]
    assert sorted(held) == sorted(shapes), f"a leaf without a tensor, or with two: {set(held) ^ set(shapes)}"
    found = []
    for stacked, run in itertools.groupby(present, lambda row: "{}" in row.name):
        together = list(run)
        for layer in range(c.num_layers) if stacked else (None,):
            found += [_tensor(row, layer, shapes, leaves) for row in together]
    return found


def _tensor(row: Row, layer: int | None, shapes: dict, leaves: dict) -> Tensor:
    parts, start, inputs = [], 0, ()
    for leaf in row.leaves:
        transposed = leaves[leaf].summed == "rows"
        shape = shapes[leaf] if layer is None else shapes[leaf][1:]
        outputs, *inputs = shape[::-1] if transposed else shape
        parts.append(Part(leaf, layer, start, outputs, transposed))
        start += outputs
    shape = (start, *inputs)
    return Tensor(
        name=row.name.format(layer),
        shape=shape[::-1] if row.inputs_first else shape,
        parts=tuple(parts),
        matrix=all(leaves[leaf].kind is not None for leaf in row.leaves),
        inputs_first=row.inputs_first,
        interleaved=row.interleaved,
    )


def place_in_file(outputs: int, head_dim: int) -> np.ndarray:
    """(outputs,): where an interleaved tensor holds each of our outputs."""
    rows = np.arange(outputs).reshape(-1, head_dim // 2, 2)
    return rows.swapaxes(1, 2).reshape(-1)


def interleave(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Outputs of whole heads, (n x H, ...), in our order -> in an interleaved file's."""
    return rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
