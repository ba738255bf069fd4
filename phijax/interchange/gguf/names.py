"""One row per tensor of a GGUF file: which of our leaves lie in it, and how. Read in both directions.

Source: llama.cpp's conversion/phi.py and conversion/llama.py, and gguf's own tables of names.
"""

import dataclasses

import numpy as np

from phijax.interchange.weight_source import model_shapes
from phijax.model.config import ModelConfig

PHI3, LLAMA = "phi3", "llama"


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor of the file.

    name: with {layer} where there is one for each layer.
    leaves: ours, one under another by rows.
    transposed: the file holds our (R, D) as (D, R), as a linear layer's (out, in).
    interleaved: rows of each head stand in the order of a rotation of neighbours (2i, 2i + 1), ours in that of one of
      halves (i, i + H/2).
    """

    name: str
    leaves: tuple[str, ...]
    transposed: bool = False
    interleaved: bool = False


_SHARED = (
    Row("token_embd.weight", ("embedding",)),
    Row("blk.{layer}.attn_norm.weight", ("blocks/attention_norm/scale",)),
    Row("blk.{layer}.attn_output.weight", ("blocks/attention/o",), transposed=True),
    Row("blk.{layer}.ffn_norm.weight", ("blocks/mlp_norm/scale",)),
    Row("blk.{layer}.ffn_down.weight", ("blocks/mlp/down",), transposed=True),
    Row("output_norm.weight", ("final_norm/scale",)),
    Row("output.weight", ("head",)),  # absent where it is tied to the embedding
)
_FUSED = (
    Row("blk.{layer}.attn_qkv.weight", ("blocks/attention/q", "blocks/attention/k", "blocks/attention/v")),
    Row("blk.{layer}.ffn_up.weight", ("blocks/mlp/gate", "blocks/mlp/up")),
)
_SPLIT = (
    Row("blk.{layer}.attn_q.weight", ("blocks/attention/q",), interleaved=True),
    Row("blk.{layer}.attn_k.weight", ("blocks/attention/k",), interleaved=True),
    Row("blk.{layer}.attn_v.weight", ("blocks/attention/v",)),
    Row("blk.{layer}.ffn_gate.weight", ("blocks/mlp/gate",)),
    Row("blk.{layer}.ffn_up.weight", ("blocks/mlp/up",)),
)
TABLE: dict[str, tuple[Row, ...]] = {PHI3: _SHARED + _FUSED, LLAMA: _SHARED + _SPLIT}

# LongRoPE's two lists, (R/2,) float32: part of the model's configuration, not weights.
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A row of the table for one layer of one model.

    layer: None outside of the blocks.
    shape: in the file; (rows, columns), or (D,).
    rows: how many of the file's rows (columns where transposed) each leaf fills.
    """

    name: str
    row: Row
    layer: int | None
    shape: tuple[int, ...]
    rows: tuple[int, ...]


def tensors(architecture: str, c: ModelConfig) -> list[Tensor]:
    """Every tensor of the model in a file of this architecture, layer by layer."""
    shapes = model_shapes(c)
    found = []
    for row in TABLE[architecture]:
        if row.leaves[0] not in shapes:  # the head of a model that has none of its own
            continue
        stacked = "{layer}" in row.name
        leaves = [shapes[path][1:] if stacked else shapes[path] for path in row.leaves]
        rows = tuple(shape[0] for shape in leaves)
        shape = (sum(rows), *leaves[0][1:])
        shape = shape[::-1] if row.transposed else shape
        for layer in range(c.num_layers) if stacked else (None,):
            found.append(Tensor(row.name.format(layer=layer), row, layer, shape, rows))
    return sorted(found, key=lambda tensor: -1 if tensor.layer is None else tensor.layer)


def heads_of(path: str, c: ModelConfig) -> int:
    return c.num_heads if path.endswith("/q") else c.num_kv_heads


def place_in_file(heads: int, head_dim: int) -> np.ndarray:
    """(heads x head_dim,): where an interleaved tensor holds each of our rows."""
    rows = np.arange(heads * head_dim).reshape(heads, head_dim // 2, 2)
    return rows.swapaxes(1, 2).reshape(-1)


def interleave(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of whole heads, (n x H, D), in our order -> in the file's."""
    return rows.reshape(-1, 2, head_dim // 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)
