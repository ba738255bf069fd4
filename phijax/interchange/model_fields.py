"""What of a ModelConfig a family of files can say; all else of a model must be as the family always has it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from phijax.model.config import ModelConfig

# Fields that every family says. requires_long_rope is of a preset, not of a model.
SIZES = frozenset(
    "vocab_size model_dim num_layers num_heads num_kv_heads head_dim ffn_dim max_position norm_eps tied_head "
    "requires_long_rope".split()
)
ROTARY = SIZES | {"rope_theta", "partial_rotary_factor", "sliding_window", "long_rope"}


def unsaid(c: ModelConfig, said: frozenset[str], fixed: Mapping[str, Any]) -> str | None:
    """Why a family cannot say what this model is; None if it can.

    Args: said: fields that it says. fixed: what the others are in it, where that is not their default.
    """
    differ = []
    for field in dataclasses.fields(c):
        value, always = getattr(c, field.name), fixed.get(field.name, field.default)
        if field.name not in said and value != always:
            differ.append(f"model.{field.name}={value!r} (there always {always!r})")
    return f"it has {', '.join(differ)}" if differ else None
