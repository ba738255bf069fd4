"""phi3: q, k, v fused, gate and up fused, no rows permuted. Source: llama.cpp's conversion/phi.py."""

from phijax.interchange.gguf.families import rotary
from phijax.interchange.gguf.families.family import Family
from phijax.interchange.gguf.keys import Keys
from phijax.interchange.gguf.tokenizer import PHI3_NAMES
from phijax.interchange.tensors import Row
from phijax.model.config import ModelConfig
from phijax.model.rope import inverse_frequencies

ROWS = (
    Row("token_embd.weight", ("embedding",)),
    Row("output_norm.weight", ("final_norm/scale",)),
    Row("output.weight", ("head",)),
    Row("blk.{}.attn_norm.weight", ("blocks/attention_norm/scale",)),
    Row("blk.{}.attn_output.weight", ("blocks/attention/o",)),
    Row("blk.{}.ffn_norm.weight", ("blocks/mlp_norm/scale",)),
    Row("blk.{}.ffn_down.weight", ("blocks/mlp/down",)),
    Row("blk.{}.attn_qkv.weight", ("blocks/attention/q", "blocks/attention/k", "blocks/attention/v")),
    Row("blk.{}.ffn_up.weight", ("blocks/mlp/gate", "blocks/mlp/up")),
)


def _read(keys: Keys) -> ModelConfig:
    return rotary.read(keys, partial=True)


def _write(c: ModelConfig) -> dict[str, int | float]:
    keys = rotary.write(c) | {
        "rope.scaling.original_context_length": c.long_rope.original_max_position if c.long_rope else c.max_position,
        "attention.sliding_window": c.sliding_window or 0,
    }
    if c.long_rope:
        keys["rope.scaling.attn_factor"] = inverse_frequencies(c, c.max_position)[1]
    return keys


def _lacks(c: ModelConfig) -> str | None:
    if c.num_heads * c.head_dim == c.model_dim:
        return None
    return (
        f"it has {c.num_heads} heads of {c.head_dim} = {c.num_heads * c.head_dim} and a width of {c.model_dim}, "
        "which must be equal there"
    )


FAMILY = Family(
    architecture="phi3",
    classes=("Phi3ForCausalLM",),
    rows=ROWS,
    followed=rotary.FOLLOWED,
    neutral=rotary.NEUTRAL,
    read=_read,
    write=_write,
    fields=rotary.FIELDS,
    lacks=_lacks,
    named=PHI3_NAMES,  # llama.cpp's rule for whitespace after special tokens hangs on it
)
