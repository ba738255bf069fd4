"""Keys of the architectures that rotate (phi3, llama), both ways.

Sources: llama.cpp's docs, conversion/phi.py, conversion/llama.py.
"""

import math
from typing import Any

from phijax.errors import UserError
from phijax.interchange.gguf.keys import Keys
from phijax.interchange.gguf.long_rope import check_attention_factor, read_lists
from phijax.interchange.model_fields import ROTATION, SIZES, ModelFields
from phijax.model.config import ModelConfig
from phijax.model.presets import PRESETS

FOLLOWED = frozenset(
    "context_length embedding_length block_count feed_forward_length vocab_size attention.head_count "
    "attention.head_count_kv attention.key_length attention.value_length attention.layer_norm_rms_epsilon "
    "attention.sliding_window rope.dimension_count rope.freq_base rope.scaling.original_context_length "
    "rope.scaling.attn_factor".split()
)
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none", "longrope"),  # longrope: the lists say it already
    "rope.scaling.factor": (1.0, 0.0),
    "rope.scale_linear": (1.0,),
    "rope.scaling.finetuned": (False, True),  # a remark
    "expert_count": (0,),
    "expert_used_count": (0,),
    "use_parallel_residual": (False,),
    "attention.causal": (True,),
    "tensor_data_layout": ("", "Meta AI original pth"),  # a remark of 2023
}
# What these files do not say, is in all of these models as in phi-3.
FIELDS = ModelFields(SIZES | ROTATION, PRESETS["phi3_mini"])


def read(keys: Keys, *, partial: bool) -> ModelConfig:
    """Args: partial: whether heads may rotate in part. Raises: UserError, as `Family.read`."""
    model_dim, num_layers = keys.size("embedding_length"), keys.layers()
    num_heads = keys.size("attention.head_count")
    head_dim = keys.size("attention.key_length", model_dim // num_heads)
    if (value_dim := keys.size("attention.value_length", head_dim)) != head_dim:
        raise UserError(f"{keys.file.path}: heads of {head_dim} for keys and {value_dim} for values; one size is read.")
    rotary_dim = keys.size("rope.dimension_count", head_dim)
    if rotary_dim > head_dim or (rotary_dim != head_dim and not partial):
        raise UserError(
            f"{keys.said('rope.dimension_count', rotary_dim)} of {head_dim} is not read"
            + ("." if rotary_dim > head_dim else " for this architecture, only for 'phi3'.")
        )
    config = ModelConfig(
        vocab_size=keys.vocabulary(),
        model_dim=model_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=keys.size("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        ffn_dim=keys.size("feed_forward_length"),
        max_position=keys.size("context_length"),
        rope_theta=keys.decimal("rope.freq_base", 10000.0),
        partial_rotary_factor=_share(rotary_dim, head_dim),
        sliding_window=keys.size("attention.sliding_window", 0, least=0) or None,
        tied_head="output.weight" not in keys.file.tensors,
        norm_eps=keys.decimal("attention.layer_norm_rms_epsilon"),
        long_rope=read_lists(keys, rotary_dim),
    )
    config.check()
    check_attention_factor(keys, config)
    return config


def write(c: ModelConfig) -> dict[str, int | float]:
    return {
        "context_length": c.max_position,
        "embedding_length": c.model_dim,
        "block_count": c.num_layers,
        "feed_forward_length": c.ffn_dim,
        "vocab_size": c.vocab_size,
        "attention.head_count": c.num_heads,
        "attention.head_count_kv": c.num_kv_heads,
        "attention.layer_norm_rms_epsilon": float(c.norm_eps),
        "rope.dimension_count": c.rotary_dim,
        "rope.freq_base": float(c.rope_theta),
    }


def _share(rotary_dim: int, head_dim: int) -> float:
    share = rotary_dim / head_dim
    return share if int(head_dim * share) == rotary_dim else math.nextafter(share, 1.0)
