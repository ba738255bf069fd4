"""What of a ModelConfig a family of files can say; all else of a model must be as the family always has it."""

import dataclasses

from phijax.model.config import ModelConfig

# requires_long_rope is of a preset, not of a model.
SIZES = frozenset(
    "vocab_size model_dim num_layers num_heads num_kv_heads head_dim ffn_dim max_position norm_eps tied_head "
    "requires_long_rope".split()
)
ROTATION = frozenset(("rope_theta", "partial_rotary_factor", "sliding_window", "long_rope"))


@dataclasses.dataclass(frozen=True)
class ModelFields:
    """said: fields that a file says. like: a model of the family, as which all are in the others."""

    said: frozenset[str]
    like: ModelConfig

    def unsaid(self, c: ModelConfig) -> str | None:
        """Why a file cannot say what this model is; None if it can."""
        differ = []
        for field in dataclasses.fields(c):
            value, always = getattr(c, field.name), getattr(self.like, field.name)
            if field.name not in self.said and value != always:
                differ.append(f"model.{field.name}={value!r} (there always {always!r})")
        return f"it has {', '.join(differ)}" if differ else None
