"""GPT2LMHeadModel: learned positions, LayerNorm, biases, Conv1D's [in, out] matrices with q, k, v side by side.

transformers 5.24, models/gpt2/{configuration,modeling}_gpt2.py; mlx-lm 0.32, models/gpt2.py. Dropout acts in training
alone, and training here has none. The published files lack the prefix of all names and carry the attention's mask.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from phijax.interchange.huggingface.families.family import Family
from phijax.interchange.model_fields import SIZES, ModelFields
from phijax.interchange.tensors import Row
from phijax.model.config import ModelConfig
from phijax.model.presets import PRESETS
from phijax.storage.strict_json import Fields

PREFIX, LAYER = "transformer.", "transformer.h.{}."
ROWS = (
    Row("transformer.wte.weight", ("embedding",)),
    Row("transformer.wpe.weight", ("position_embedding",)),
    Row(LAYER + "ln_1.weight", ("blocks/attention_norm/scale",)),
    Row(LAYER + "ln_1.bias", ("blocks/attention_norm/bias",)),
    Row(
        LAYER + "attn.c_attn.weight",
        ("blocks/attention/q", "blocks/attention/k", "blocks/attention/v"),
        inputs_first=True,
    ),
    Row(LAYER + "attn.c_attn.bias", ("blocks/attention/q_bias", "blocks/attention/k_bias", "blocks/attention/v_bias")),
    Row(LAYER + "attn.c_proj.weight", ("blocks/attention/o",), inputs_first=True),
    Row(LAYER + "attn.c_proj.bias", ("blocks/attention/o_bias",)),
    Row(LAYER + "ln_2.weight", ("blocks/mlp_norm/scale",)),
    Row(LAYER + "ln_2.bias", ("blocks/mlp_norm/bias",)),
    Row(LAYER + "mlp.c_fc.weight", ("blocks/mlp/up",), inputs_first=True),
    Row(LAYER + "mlp.c_fc.bias", ("blocks/mlp/up_bias",)),
    Row(LAYER + "mlp.c_proj.weight", ("blocks/mlp/down",), inputs_first=True),
    Row(LAYER + "mlp.c_proj.bias", ("blocks/mlp/down_bias",)),
    Row("transformer.ln_f.weight", ("final_norm/scale",)),
    Row("transformer.ln_f.bias", ("final_norm/bias",)),
    Row("lm_head.weight", ("head",)),
)
# Linear layers there; it ties the head itself and has no other.
MLX_ROWS = tuple(
    row._replace(name=row.name.replace(PREFIX, "model."), inputs_first=False) for row in ROWS if row.leaves != ("head",)
)
_MASK = re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)")
_TANH = ("gelu_new", "gelu_pytorch_tanh")  # two names of one formula
# Where nothing rotates, the rotation's numbers say nothing.
FIELDS = ModelFields(SIZES | {"rope_theta", "partial_rotary_factor"}, PRESETS["gpt2"])


def _read(values: Fields) -> ModelConfig:
    dim, heads = values.integer("n_embd", least=1), values.integer("n_head", least=1)
    positions = values.integer("n_positions", least=1)
    if values.text("activation_function") not in _TANH:
        raise values.refusal("activation_function", f"{' or '.join(_TANH)}, which phijax computes")
    if not values.boolean("scale_attn_weights"):
        raise values.refusal("scale_attn_weights", "true: phijax divides scores by the root of a head's size")
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if values.boolean(key, False):
            raise values.refusal(key, "false: phijax does not do it")
    if dim % heads:
        raise values.refusal("n_embd", f"a multiple of n_head={heads}")
    if values.integer("n_ctx", positions, least=1) != positions:
        raise values.refusal("n_ctx", f"n_positions={positions}, or left out: readers differ in which they take")
    return dataclasses.replace(
        FIELDS.like,
        vocab_size=values.integer("vocab_size", least=1),
        model_dim=dim,
        num_layers=values.integer("n_layer", least=1),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=dim // heads,
        ffn_dim=values.integer("n_inner", 4 * dim, least=1),
        max_position=positions,
        tied_head=values.boolean("tie_word_embeddings"),
        norm_eps=values.number("layer_norm_epsilon", above=0),
    )


def _write(c: ModelConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "vocab_size": c.vocab_size,
        "n_positions": c.max_position,
        "n_ctx": c.max_position,  # mlx-lm and llama.cpp's converter ask for it
        "n_embd": c.model_dim,
        "n_layer": c.num_layers,
        "n_head": c.num_heads,
        "n_inner": None if c.ffn_dim == 4 * c.model_dim else c.ffn_dim,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": c.norm_eps,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "tie_word_embeddings": c.tied_head,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        **given,
    }


def _lacks(c: ModelConfig) -> str | None:
    if (c.num_kv_heads, c.num_heads * c.head_dim) == (c.num_heads, c.model_dim):
        return None
    return (
        f"GPT2LMHeadModel has as many heads for keys as for queries, of n_embd / n_head; this model has {c.num_heads} "
        f"and {c.num_kv_heads}, of {c.head_dim}, and a width of {c.model_dim}"
    )


def _mlx_lacks(c: ModelConfig) -> str | None:
    """mlx-lm takes neither a head of its own nor another width of the feed-forward layer than 4 n_embd."""
    if not c.tied_head:
        return "mlx-lm's GPT-2 always ties the head to the embedding, this model has a head of its own"
    if c.ffn_dim != 4 * c.model_dim:
        return f"mlx-lm's GPT-2 has a feed-forward width of 4 n_embd = {4 * c.model_dim}, this model of {c.ffn_dim}"
    return None


def _derived(name: str, shape: tuple[int, ...], c: ModelConfig) -> bool:
    """The causal mask and what masked scores become, as files before transformers 4.31 carry them."""
    found = _MASK.fullmatch(name)
    return found is not None and shape == ((1, 1, c.max_position, c.max_position) if found[1] == "bias" else ())


FAMILY = Family(
    model_type="gpt2",
    class_name="GPT2LMHeadModel",
    rows=ROWS,
    read=_read,
    write=_write,
    keys=frozenset(
        "vocab_size n_positions n_ctx n_embd n_layer n_head n_inner activation_function layer_norm_epsilon "
        "scale_attn_weights scale_attn_by_inverse_layer_idx add_cross_attention tie_word_embeddings".split()
    ),
    defaults={
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
    },
    fields=FIELDS,
    lacks=_lacks,
    # The last one says in which order, and how precisely, the same scores are computed.
    inert=frozenset(
        "attn_pdrop summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout "
        "n_special predict_special_tokens output_past reorder_and_upcast_attn".split()
    ),
    derived=_derived,
    prefix=PREFIX,
    mlx_rows=MLX_ROWS,
    mlx_lacks=_mlx_lacks,
)
