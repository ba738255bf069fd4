"""Quantised weights of ours as blocks of GGUF, integer for integer: four bits as Q4_0, eight as Q8_0.

ggml-quants.c: a block is 32 weights of a row and one float16 d; w = d * (nibble - 8) in Q4_0, byte j holding weight j
low and weight j + 16 high; w = d * q in Q8_0. Our groups are multiples of 32 along the same axis, or a whole channel,
and our scales are float16: d is the scale of the group that the block lies in, and no number changes.
"""

from collections.abc import Mapping

import numpy as np

from phijax.errors import UserError
from phijax.interchange import small_matrices
from phijax.interchange.tensors import Tensor
from phijax.quantization.policy import Scheme

BLOCK = 32
KINDS = {4: "Q4_0", 8: "Q8_0"}  # bits -> GGUF's name


def kind_of(schemes: Mapping[str, Scheme], tensor: Tensor) -> str | None:
    """What a tensor becomes; None where it is dense. Raises: UserError for what blocks cannot hold."""
    parts = [part.leaf for part in tensor.parts]
    leaves = [leaf for leaf in parts if leaf in schemes]
    if not leaves:
        return None
    # Fused parts share the bits of their blocks, not the size of their groups.
    by_bits = {leaf: Scheme(schemes[leaf].bits) for leaf in leaves}
    scheme = small_matrices.common_scheme(by_bits, tensor.name, parts)
    if tensor.shape[1] % BLOCK:
        raise UserError(
            f"{tensor.name} has rows of {tensor.shape[1]} weights; {KINDS[scheme.bits]} needs a multiple of {BLOCK}. "
            "Take --format=hf, or quantise these weights as_stored."
        )
    return KINDS[scheme.bits]


def blocks(integers: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    """(n, in) int8 and (n, groups) float16 -> (n, in / 32, 18 or 34) uint8."""
    n, inputs = integers.shape
    cut = integers.reshape(n, -1, BLOCK)
    if bits == 4:
        nibbles = (cut + np.int8(8)).view(np.uint8)
        values = nibbles[..., :16] | (nibbles[..., 16:] << 4)
    else:
        values = cut.view(np.uint8)
    d = small_matrices.spread(scales, inputs, BLOCK).astype("<f2")[..., None].view(np.uint8)
    return np.concatenate([d, values], axis=-1)
