"""LlamaForCausalLM: every projection a tensor of its own; no window.

transformers 5.24, models/llama/{configuration,modeling}_llama.py.
"""

from collections.abc import Mapping
from typing import Any

from phijax.errors import UserError
from phijax.interchange.huggingface.families import rotary
from phijax.interchange.huggingface.families.family import Family
from phijax.interchange.tensors import Row
from phijax.model.config import ModelConfig
from phijax.storage.strict_json import Fields, shown

LAYER = "model.layers.{}."
ROWS = (
    Row("model.embed_tokens.weight", ("embedding",)),
    Row(LAYER + "input_layernorm.weight", ("blocks/attention_norm/scale",)),
    Row(LAYER + "self_attn.q_proj.weight", ("blocks/attention/q",)),
    Row(LAYER + "self_attn.k_proj.weight", ("blocks/attention/k",)),
    Row(LAYER + "self_attn.v_proj.weight", ("blocks/attention/v",)),
    Row(LAYER + "self_attn.o_proj.weight", ("blocks/attention/o",)),
    Row(LAYER + "post_attention_layernorm.weight", ("blocks/mlp_norm/scale",)),
    Row(LAYER + "mlp.gate_proj.weight", ("blocks/mlp/gate",)),
    Row(LAYER + "mlp.up_proj.weight", ("blocks/mlp/up",)),
    Row(LAYER + "mlp.down_proj.weight", ("blocks/mlp/down",)),
    Row("model.norm.weight", ("final_norm/scale",)),
    Row("lm_head.weight", ("head",)),
)


def _read(values: Fields) -> ModelConfig:
    if values.has("sliding_window"):
        window = shown(values.values["sliding_window"])
        raise UserError(f"{values.file}: sliding_window={window} in a Llama, which has no window in transformers.")
    return rotary.read(values)


def _write(c: ModelConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    keys = {"attention_bias": False, "mlp_bias": False, "head_dim": c.head_dim}
    return rotary.write(c, given) | keys | rotary.write_long_rope(c)


def _lacks(c: ModelConfig) -> str | None:
    if rotary.windowed(c):
        return (
            f"LlamaForCausalLM has no window, and beyond {c.sliding_window} tokens this model would be another: take "
            "--format=mistral, which has one, or hf"
        )
    return rotary.lacks_whole_heads(c, FAMILY.class_name)


FAMILY = Family(
    model_type="llama",
    class_name="LlamaForCausalLM",
    rows=ROWS,
    read=_read,
    write=_write,
    keys=rotary.KEYS,
    defaults={"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    fields=rotary.FIELDS,
    lacks=_lacks,
    derived=rotary.derived,
)
