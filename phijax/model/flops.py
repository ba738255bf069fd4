"""Parameters and FLOPs a token: the plan and the reported MFU read the same numbers."""

from phijax.model import params
from phijax.model.config import ModelConfig


def matmul_parameters(c: ModelConfig) -> int:
    """Parameters that multiply each token: all matrices but the embedding lookup (a tied head still multiplies)."""
    looked_up = {None} if c.tied_head else {None, "embedding"}
    return sum(params.size(c, leaf) for leaf in params.leaves(c).values() if leaf.kind not in looked_up)


def attended_keys(length: int, window: int | None) -> float:
    """Keys that a query sees on average in an unpacked row of `length`."""
    w = min(window or length, length)
    return (w * (w + 1) / 2 + (length - w) * w) / length


def train_flops_per_token(c: ModelConfig, length: int) -> float:
    """Forward and backward, recomputation not counted: 6 a matrix parameter, 12 N H a seen key and layer.

    Chowdhery et al. 2022, arXiv:2204.02311, appendix B, but with the keys that a causal query really sees: about half
    of the square, so this MFU is lower than one that counts the whole.
    """
    attention = 12 * c.num_layers * c.num_heads * c.head_dim * attended_keys(length, c.sliding_window)
    return 6 * matmul_parameters(c) + attention
