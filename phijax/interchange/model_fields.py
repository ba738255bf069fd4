"""What of a ModelConfig a family of files can say; all else of a model must be as the family always has it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from phijax.model.config import ModelConfig

# requires_long_rope is of a preset, not of a model.
_SIZES = frozenset(
    "vocab_size model_dim num_layers num_heads num_kv_heads head_dim ffn_dim max_position norm_eps tied_head "
    "requires_long_rope".split()
)


@dataclasses.dataclass(frozen=True)
class ModelFields:
    """said: fields that a file says. fixed: what the others are in the family, where that is not their default."""

    said: frozenset[str]
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def unsaid(self, c: ModelConfig) -> str | None:
        """Why a file cannot say what this model is; None if it can."""
        differ = []
        for field in dataclasses.fields(c):
            value, always = getattr(c, field.name), self.fixed.get(field.name, field.default)
            if field.name not in self.said and value != always:
                differ.append(f"model.{field.name}={value!r} (there always {always!r})")
        return f"it has {', '.join(differ)}" if differ else None


ROTARY = ModelFields(_SIZES | {"rope_theta", "partial_rotary_factor", "sliding_window", "long_rope"})
# Where nothing rotates, the rotation's numbers say nothing.
GPT2 = ModelFields(
    _SIZES | {"rope_theta", "partial_rotary_factor"},
    {"positions": "learned", "norm": "layer", "bias": True, "activation": "gelu_tanh", "gated": False},
)
