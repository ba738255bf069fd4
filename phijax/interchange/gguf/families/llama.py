"""llama: every projection a tensor of its own; rows of q and k in the order of a rotation of neighbours.

Source: llama.cpp's conversion/llama.py.
"""

from phijax.interchange.gguf.families import rotary
from phijax.interchange.gguf.families.family import Family
from phijax.interchange.gguf.keys import Keys
from phijax.interchange.tensors import Row
from phijax.model.config import ModelConfig

ROWS = (
    Row("token_embd.weight", ("embedding",)),
    Row("output_norm.weight", ("final_norm/scale",)),
    Row("output.weight", ("head",)),
    Row("blk.{}.attn_norm.weight", ("blocks/attention_norm/scale",)),
    Row("blk.{}.attn_output.weight", ("blocks/attention/o",)),
    Row("blk.{}.ffn_norm.weight", ("blocks/mlp_norm/scale",)),
    Row("blk.{}.ffn_down.weight", ("blocks/mlp/down",)),
    Row("blk.{}.attn_q.weight", ("blocks/attention/q",), interleaved=True),
    Row("blk.{}.attn_k.weight", ("blocks/attention/k",), interleaved=True),
    Row("blk.{}.attn_v.weight", ("blocks/attention/v",)),
    Row("blk.{}.ffn_gate.weight", ("blocks/mlp/gate",)),
    Row("blk.{}.ffn_up.weight", ("blocks/mlp/up",)),
)


def _read(keys: Keys) -> ModelConfig:
    return rotary.read(keys, partial=False)


def _write(c: ModelConfig) -> dict[str, int | float]:
    return rotary.write(c) | {"attention.key_length": c.head_dim, "attention.value_length": c.head_dim}


def _lacks(c: ModelConfig) -> str | None:
    missing = {
        "a sliding window": c.sliding_window is not None,
        "LongRoPE's two lists": c.long_rope is not None,
        "heads that rotate in part": c.rotary_dim != c.head_dim,
    }
    named = [name for name, needed in missing.items() if needed]
    return f"it has {' and '.join(named)}" if named else None


FAMILY = Family(
    architecture="llama",
    classes=("LlamaForCausalLM", "MistralForCausalLM"),
    rows=ROWS,
    followed=rotary.FOLLOWED,
    neutral=rotary.NEUTRAL,
    read=_read,
    write=_write,
    fields=rotary.FIELDS,
    lacks=_lacks,
)
