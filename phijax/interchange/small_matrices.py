"""Quantised weights as other formats store them: [out, in] integers, scales along the inputs; some rows at a time."""

from collections.abc import Iterator, Mapping

import numpy as np

from phijax.errors import UserError
from phijax.interchange.opened import Opened
from phijax.interchange.tensors import Part, Tensor
from phijax.interchange.weight_source import Index, QuantizedSource
from phijax.quantization import policy
from phijax.quantization.policy import Scheme

AT_ONCE = 1 << 24  # integers in memory at once


def require_quantized(opened: Opened, format: str) -> Mapping[str, Scheme]:
    """Its schemes. Raises: UserError for a checkpoint that is not quantised, with the command that quantises it."""
    if found := opened.weights.schemes:
        return found
    quantised = f"the {opened.kind} checkpoint {opened.path} is not quantised"
    raise UserError(
        f"--format={format} is for small weights; {quantised}. First:\n"
        f"  phijax quantize --checkpoint={opened.path} --scheme=int4_g64 --output=SMALL\n"
        f"  phijax export --checkpoint=SMALL --format={format} --output=..."
    )


def scheme_of(schemes: Mapping[str, Scheme], tensor: Tensor) -> Scheme | None:
    """The scheme of a tensor, one for all of its parts; None: dense. Raises: UserError where the parts' differ."""
    return common_scheme(schemes, tensor.name, [part.leaf for part in tensor.parts])


def common_scheme(schemes: Mapping[str, Scheme], name: str, leaves: list[str]) -> Scheme | None:
    found = {leaf: schemes.get(leaf) for leaf in leaves}
    if len(set(found.values())) > 1:
        shown = ", ".join(f"{leaf}: {policy.name_of(s) if s else policy.AS_STORED}" for leaf, s in found.items())
        raise UserError(f"{name} is one matrix in this format, its parts are quantised differently ({shown}).")
    return next(iter(found.values()))


def integers(source: QuantizedSource, part: Part) -> Iterator[np.ndarray]:
    """A part of a tensor from its first row: (n, in) int8 pieces."""
    width = _inputs(source, part.leaf, part.transposed)
    step = max(1, AT_ONCE // width)
    for start in range(0, part.rows, step):
        rows = slice(start, min(start + step, part.rows))
        yield read_integers(source, part.leaf, part.layer, part.transposed, rows)


def scales(source: QuantizedSource, part: Part) -> np.ndarray:
    """(out, groups) float16 of a whole part; one group: a scale for each channel."""
    return read_scales(source, part.leaf, part.layer, part.transposed, slice(0, part.rows))


def read_integers(source: QuantizedSource, leaf: str, layer: int | None, transposed: bool, rows: slice) -> np.ndarray:
    """Rows of the matrix [out, in] that a leaf (or a layer of it) is elsewhere: (n, in) int8."""
    across = slice(0, _inputs(source, leaf, transposed))
    return _matrix(source.read_values(leaf, _index(layer, transposed, rows, across)), transposed)


def read_scales(source: QuantizedSource, leaf: str, layer: int | None, transposed: bool, rows: slice) -> np.ndarray:
    """The same of its scales: (n, groups) float16."""
    group = source.schemes[leaf].group
    across = slice(0, _inputs(source, leaf, transposed) // group if group else 1)
    return _matrix(source.read_scales(leaf, _index(layer, transposed, rows, across)), transposed)


def spread(found: np.ndarray, inputs: int, group: int) -> np.ndarray:
    """Scales (n, groups) of larger groups as those of groups of `group` inputs: (n, inputs / group)."""
    return np.repeat(found, inputs // group // found.shape[1], axis=1)


def _inputs(source: QuantizedSource, leaf: str, transposed: bool) -> int:
    return source.shapes()[leaf][-2 if transposed else -1]


def _index(layer: int | None, transposed: bool, rows: slice, across: slice) -> Index:
    whole = () if layer is None else (slice(layer, layer + 1),)
    return (*whole, across, rows) if transposed else (*whole, rows, across)


def _matrix(values: np.ndarray, transposed: bool) -> np.ndarray:
    matrix = values.reshape(values.shape[-2:])
    return np.ascontiguousarray(matrix.T) if transposed else matrix
