"""MistralForCausalLM: Llama's tensors, and a sliding window.

transformers 5.24, models/mistral/{configuration,modeling}_mistral.py.
"""

from collections.abc import Mapping
from typing import Any

from phijax.interchange.huggingface.families import llama, rotary
from phijax.interchange.huggingface.families.family import Family
from phijax.model.config import ModelConfig


def _write(c: ModelConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    # Without the key a Mistral has a window of 4096: where there is none it must say null.
    keys = {"sliding_window": c.sliding_window, "head_dim": c.head_dim}
    return rotary.write(c, given) | keys | rotary.write_long_rope(c)


def _lacks(c: ModelConfig) -> str | None:
    return rotary.lacks_whole_heads(c, FAMILY.class_name)


FAMILY = Family(
    model_type="mistral",
    class_name="MistralForCausalLM",
    rows=llama.ROWS,
    read=rotary.read,
    write=_write,
    keys=rotary.KEYS,
    defaults={
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "num_key_value_heads": 8,
    },
    fields=rotary.FIELDS,
    lacks=_lacks,
    derived=rotary.derived,
)
