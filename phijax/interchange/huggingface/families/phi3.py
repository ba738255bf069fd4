"""Phi3ForCausalLM: q, k, v fused, gate and up fused; heads that rotate in part.

transformers 5.24, models/phi3/{configuration,modeling}_phi3.py.
"""

from collections.abc import Mapping
from typing import Any

from phijax.interchange.huggingface.families import rotary
from phijax.interchange.huggingface.families.family import Family
from phijax.interchange.tensors import Row
from phijax.model.config import ModelConfig
from phijax.storage.strict_json import Fields

LAYER = "model.layers.{}."
ROWS = (
    Row("model.embed_tokens.weight", ("embedding",)),
    Row(LAYER + "input_layernorm.weight", ("blocks/attention_norm/scale",)),
    Row(LAYER + "self_attn.qkv_proj.weight", ("blocks/attention/q", "blocks/attention/k", "blocks/attention/v")),
    Row(LAYER + "self_attn.o_proj.weight", ("blocks/attention/o",)),
    Row(LAYER + "post_attention_layernorm.weight", ("blocks/mlp_norm/scale",)),
    Row(LAYER + "mlp.gate_up_proj.weight", ("blocks/mlp/gate", "blocks/mlp/up")),
    Row(LAYER + "mlp.down_proj.weight", ("blocks/mlp/down",)),
    Row("model.norm.weight", ("final_norm/scale",)),
    Row("lm_head.weight", ("head",)),
)
ORIGINAL = 4096  # original_max_position_embeddings where config.json has none


def _read(values: Fields) -> ModelConfig:
    return rotary.read(values, partial=True, original=ORIGINAL)


def _write(c: ModelConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    rope = c.long_rope
    keys = rotary.write(c, given) | {
        "original_max_position_embeddings": rope.original_max_position if rope else c.max_position,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }
    if c.sliding_window is not None:
        keys["sliding_window"] = c.sliding_window
    if c.partial_rotary_factor != 1.0:
        keys["partial_rotary_factor"] = c.partial_rotary_factor
    if rope:
        # These three and no other: transformers before 4.50 refuses a fourth.
        keys["rope_scaling"] = {"type": "longrope", **rotary.lists(rope)}
    return keys


def _lacks(c: ModelConfig) -> str | None:
    if c.num_heads * c.head_dim == c.model_dim:
        return None
    return (
        f"Phi3ForCausalLM has heads of hidden_size / heads = {c.model_dim / c.num_heads:g}, these have {c.head_dim}: "
        f"take --format={'mistral' if rotary.windowed(c) else 'llama'}"
    )


FAMILY = Family(
    model_type="phi3",
    class_name="Phi3ForCausalLM",
    rows=ROWS,
    read=_read,
    write=_write,
    keys=rotary.KEYS,
    defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "sliding_window": None},
    fields=rotary.FIELDS,
    lacks=_lacks,
    neutral={"full_attn_mod": 1, "interpolate_factor": 1},  # of phi-4-mini
    derived=rotary.derived,
)
