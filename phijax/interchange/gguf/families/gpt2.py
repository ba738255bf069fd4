"""gpt2: learned positions, LayerNorm, biases; q, k, v fused; matrices as linear layers have them.

Sources: llama.cpp's conversion/gpt2.py, src/models/gpt2.cpp. Its loader takes the embedding where there is no head; its
activation is gelu's tanh form. Files of 2024 have a second copy of the embedding as head, and read so.
"""

import dataclasses

from phijax.interchange.gguf.families.family import Family
from phijax.interchange.gguf.keys import Keys
from phijax.interchange.model_fields import SIZES, ModelFields
from phijax.interchange.tensors import Row
from phijax.model.config import ModelConfig
from phijax.model.presets import PRESETS

ROWS = (
    Row("token_embd.weight", ("embedding",)),
    Row("position_embd.weight", ("position_embedding",)),
    Row("output_norm.weight", ("final_norm/scale",)),
    Row("output_norm.bias", ("final_norm/bias",)),
    Row("output.weight", ("head",)),
    Row("blk.{}.attn_norm.weight", ("blocks/attention_norm/scale",)),
    Row("blk.{}.attn_norm.bias", ("blocks/attention_norm/bias",)),
    Row("blk.{}.attn_qkv.weight", ("blocks/attention/q", "blocks/attention/k", "blocks/attention/v")),
    Row("blk.{}.attn_qkv.bias", ("blocks/attention/q_bias", "blocks/attention/k_bias", "blocks/attention/v_bias")),
    Row("blk.{}.attn_output.weight", ("blocks/attention/o",)),
    Row("blk.{}.attn_output.bias", ("blocks/attention/o_bias",)),
    Row("blk.{}.ffn_norm.weight", ("blocks/mlp_norm/scale",)),
    Row("blk.{}.ffn_norm.bias", ("blocks/mlp_norm/bias",)),
    Row("blk.{}.ffn_up.weight", ("blocks/mlp/up",)),
    Row("blk.{}.ffn_up.bias", ("blocks/mlp/up_bias",)),
    Row("blk.{}.ffn_down.weight", ("blocks/mlp/down",)),
    Row("blk.{}.ffn_down.bias", ("blocks/mlp/down_bias",)),
)
# Where nothing rotates, the rotation's numbers say nothing.
FIELDS = ModelFields(SIZES | {"rope_theta", "partial_rotary_factor"}, PRESETS["gpt2"])


def _read(keys: Keys) -> ModelConfig:
    dim, heads = keys.size("embedding_length"), keys.size("attention.head_count")
    config = dataclasses.replace(
        FIELDS.like,
        vocab_size=keys.vocabulary(),
        model_dim=dim,
        num_layers=keys.layers(),
        num_heads=heads,
        num_kv_heads=keys.size("attention.head_count_kv", heads),
        head_dim=dim // heads,
        ffn_dim=keys.size("feed_forward_length"),
        max_position=keys.size("context_length"),
        tied_head="output.weight" not in keys.file.tensors,
        norm_eps=keys.decimal("attention.layer_norm_epsilon"),
    )
    config.check()
    return config


def _write(c: ModelConfig) -> dict[str, int | float]:
    return {
        "context_length": c.max_position,
        "embedding_length": c.model_dim,
        "block_count": c.num_layers,
        "feed_forward_length": c.ffn_dim,
        "vocab_size": c.vocab_size,
        "attention.head_count": c.num_heads,
        "attention.layer_norm_epsilon": float(c.norm_eps),
    }


def _lacks(c: ModelConfig) -> str | None:
    if (c.num_kv_heads, c.num_heads * c.head_dim) == (c.num_heads, c.model_dim):
        return None
    return (
        f"it has {c.num_heads} heads of {c.head_dim} for queries, {c.num_kv_heads} for keys and a width of "
        f"{c.model_dim}; there are as many heads for keys as for queries, and together as wide as the model"
    )


FAMILY = Family(
    architecture="gpt2",
    classes=("GPT2LMHeadModel",),
    rows=ROWS,
    followed=frozenset(
        "context_length embedding_length block_count feed_forward_length vocab_size attention.head_count "
        "attention.head_count_kv attention.layer_norm_epsilon".split()
    ),
    neutral={"attention.causal": (True,), "use_parallel_residual": (False,)},
    read=_read,
    write=_write,
    fields=FIELDS,
    lacks=_lacks,
)
