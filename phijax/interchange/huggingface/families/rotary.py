"""config.json of the classes that rotate (Phi3, Llama, Mistral): the keys that they share, both ways.

transformers 5.24, modeling_rope_utils.py and models/{phi3,llama,mistral}/configuration_*.py.
"""

import math
from collections.abc import Mapping
from typing import Any

from phijax.errors import UserError
from phijax.interchange.model_fields import ROTATION, SIZES, ModelFields
from phijax.model.config import LongRope, ModelConfig
from phijax.model.presets import PRESETS
from phijax.model.rope import long_rope_factor
from phijax.storage.strict_json import Fields, named, shown

KEYS = frozenset(
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size "
    "max_position_embeddings original_max_position_embeddings rms_norm_eps rope_theta rope_scaling rope_parameters "
    "partial_rotary_factor sliding_window tie_word_embeddings hidden_act".split()
)
_ROPE_KEYS = frozenset(
    "type rope_type rope_theta partial_rotary_factor short_factor long_factor original_max_position_embeddings factor "
    "attention_factor short_mscale long_mscale".split()
)
# What these files do not say, is in all of these models as in phi-3.
FIELDS = ModelFields(SIZES | ROTATION, PRESETS["phi3_mini"])


def read(values: Fields, *, partial: bool = False, original: int | None = None) -> ModelConfig:
    """What the shared keys describe.

    Args:
      partial: whether heads of this class may rotate in part.
      original: original_max_position_embeddings where config.json has none beside the rope's keys, which alone this
        class sees there; None: it is the one among them.
    Raises: UserError, as `Family.read`.
    """
    dim, heads = values.integer("hidden_size", least=1), values.integer("num_attention_heads", least=1)
    max_position = values.integer("max_position_embeddings", least=1)
    if values.text("hidden_act", "silu") not in ("silu", "swish"):
        raise values.refusal("hidden_act", "silu, which phijax computes")
    rope = _rope(values, partial)
    return ModelConfig(
        vocab_size=values.integer("vocab_size", least=1),
        model_dim=dim,
        num_layers=values.integer("num_hidden_layers", least=1),
        num_heads=heads,
        num_kv_heads=values.integer("num_key_value_heads", heads, least=1),
        head_dim=values.integer("head_dim", dim // heads, least=1),
        ffn_dim=values.integer("intermediate_size", least=1),
        max_position=max_position,
        rope_theta=rope.number("rope_theta", 10000.0, above=0),
        partial_rotary_factor=rope.number("partial_rotary_factor", 1.0, above=0),
        sliding_window=values.integer("sliding_window", None, least=1),
        tied_head=values.boolean("tie_word_embeddings", False),
        norm_eps=values.number("rms_norm_eps", above=0),
        long_rope=_long_rope(rope, values, max_position, original),
    )


def write(c: ModelConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """The shared keys of transformers 4, which 5 reads as well; LongRoPE's are not among them."""
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.model_dim,
        "intermediate_size": c.ffn_dim,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": c.max_position,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "tie_word_embeddings": c.tied_head,
        "attention_dropout": 0.0,
        **given,
    }


def write_long_rope(c: ModelConfig) -> dict[str, Any]:
    """LongRoPE's keys, for classes that do not have them of themselves."""
    rope = c.long_rope
    if rope is None:
        return {}
    return {
        # transformers 4 looks for it here and would else take max_position_embeddings, 5 for the one inside.
        "original_max_position_embeddings": rope.original_max_position,
        "rope_scaling": {
            "rope_type": "longrope",
            "type": "longrope",
            "factor": c.max_position / rope.original_max_position,
            "original_max_position_embeddings": rope.original_max_position,
            **lists(rope),
        },
    }


def lists(rope: LongRope) -> dict[str, list[float]]:
    return {"short_factor": list(rope.short_factor), "long_factor": list(rope.long_factor)}


def windowed(c: ModelConfig) -> bool:
    """Whether the window is shorter than the longest text."""
    return c.sliding_window is not None and c.sliding_window < c.max_position


def lacks_whole_heads(c: ModelConfig, class_name: str) -> str | None:
    """Why a class whose heads rotate whole cannot hold a model; None if it can."""
    if c.partial_rotary_factor != 1.0:
        return f"{class_name} rotates whole heads, this model a part: take --format=hf (Phi3)"
    if c.model_dim % c.num_heads:
        return f"transformers wants hidden_size={c.model_dim} to be a multiple of {c.num_heads} heads here"
    return None


def derived(name: str, shape: tuple[int, ...], c: ModelConfig) -> bool:
    """Frequencies of the rotation, as files of 2023 carry them."""
    return name.endswith(".rotary_emb.inv_freq")


def _rope(values: Fields, partial: bool) -> Fields:
    """Both spellings as one object, with rope_theta, partial_rotary_factor and rope_type in it."""
    both = [values.object(name, {}) for name in ("rope_scaling", "rope_parameters")]
    given = next((found for found in both if found.values), both[1])
    inside, where = {name: value for name, value in given.values.items() if value is not None}, given.place
    if unknown := sorted(inside.keys() - _ROPE_KEYS):
        names = ", ".join(map(named, unknown[:8]))
        raise UserError(f"{values.file}: {where} has {names}, which phijax does not do.")
    beside = {name: values.values.get(name) for name in ("rope_theta", "partial_rotary_factor")}
    rope = Fields({**beside, **inside}, values.file, where)
    kind = rope.text("rope_type", None) or rope.text("type", None) or "default"
    if kind not in ("default", "longrope", "su"):
        raise UserError(
            f"{values.file}: rope_type={shown(kind)} is not done by phijax, which rotates by the default rule or by "
            "LongRoPE ('longrope', 'su')."
        )
    if not partial and (share := rope.number("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError(f"{values.file}: partial_rotary_factor={share} is no key of this class.")
    return Fields(rope.values | {"rope_type": "default" if kind == "default" else "longrope"}, values.file, where)


def _long_rope(rope: Fields, values: Fields, max_position: int, original: int | None) -> LongRope | None:
    """The lists; refuses factors on cos and sin that differ from sqrt(1 + ln s / ln L0), which is always taken here."""
    if rope.text("rope_type") == "default":
        return None
    # The key beside the rope's wins over the one among them, as in transformers, where Phi3 always has it.
    name = "original_max_position_embeddings"
    beside, inside = values.integer(name, None, least=2), rope.integer(name, None, least=2)
    if beside is None and original is not None and inside not in (None, original):
        raise UserError(
            f"{values.file}: {name}={inside} stands inside {rope.place} alone, where Phi3 of transformers does not see "
            f"it and takes {original}. Put the right number beside {rope.place}."
        )
    start = beside or original or inside or max_position
    if start < 2:
        raise values.refusal("max_position_embeddings", "above 1 with LongRoPE")
    ours = long_rope_factor(max_position / start, start)
    theirs, factor = rope.number("attention_factor", None), rope.number("factor", None, above=0)
    if theirs is None and factor is not None:
        theirs = long_rope_factor(factor, start)
    said = {"attention_factor": theirs} | {key: rope.number(key, None) for key in ("short_mscale", "long_mscale")}
    for key, value in said.items():
        if value is not None and not math.isclose(value, ours, rel_tol=1e-6):
            raise UserError(
                f"{values.file}: {key} {value} of LongRoPE is not sqrt(1 + ln({max_position / start:g}) / "
                f"ln({start})) = {ours:.9g}, the only one that phijax does."
            )
    both = [tuple(rope.numbers(key, above=0)) for key in ("short_factor", "long_factor")]
    return LongRope(*both, original_max_position=start)
