"""Integers of four and eight bits as they lie in files: bytes, and words of 32 bits."""

import numpy as np

ZERO_BYTE = 0x88  # two zeros


def pack(values: np.ndarray) -> np.ndarray:
    """(..., D) integers of -8 to 7 -> (..., D / 2) uint8: value + 8, the even column in the low bits.

    For weights with D last this is the order of compressed-tensors and MLX: their words of 32 bits are four of these
    bytes, little-endian.
    """
    unsigned = (values + np.int8(8)).view(np.uint8) if values.dtype == np.int8 else (values + 8).astype(np.uint8)
    return unsigned[..., 0::2] | (unsigned[..., 1::2] << 4)


def unpack(packed: np.ndarray) -> np.ndarray:
    """The inverse: (..., D / 2) uint8 -> (..., D) int8."""
    out = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.int8)
    out[..., 0::2] = packed & 15
    out[..., 1::2] = packed >> 4
    out -= 8
    return out


def packed(values: np.ndarray, bits: int) -> np.ndarray:
    """(n, D) int8 -> (n, D bits / 32) int32: value + 2^(bits-1), lowest bits first."""
    out = pack(values) if bits == 4 else (values.view(np.uint8) ^ np.uint8(128))
    return np.ascontiguousarray(out).view("<i4")
