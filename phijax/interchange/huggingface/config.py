"""config.json of transformers <-> ModelConfig. What changes the mathematics and is not done here is refused by name.

Keys and defaults: transformers 5.24, models/{phi3,llama,mistral}/configuration_*.py, modeling_rope_utils.py.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from phijax.errors import UserError
from phijax.interchange.huggingface.names import Layout
from phijax.model.config import LongRope, ModelConfig
from phijax.storage import strict_json
from phijax.storage.strict_json import Fields, shown

CONFIG_FILE = "config.json"
LONGEST_CONFIG = 10_000_000  # bytes; real ones have some thousand

ARCHITECTURES: dict[str, Layout] = {
    "Phi3ForCausalLM": "phi3",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
}
# What transformers takes where config.json is silent.
DEFAULTS: dict[Layout, dict[str, Any]] = {
    "phi3": {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "sliding_window": None},
    "llama": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    "mistral": {
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "num_key_value_heads": 8,
    },
}
PHI3_ORIGINAL = 4096  # Phi3Config's original_max_position_embeddings where config.json has none
USED = {
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
    "sliding_window",
    "tie_word_embeddings",
    "hidden_act",
}
# Keys that say nothing about what the model computes. Dropout acts in training alone, and training here has none.
INERT = frozenset(
    "architectures model_type transformers_version torch_dtype dtype use_cache initializer_range auto_map "
    "bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id tokenizer_class name_or_path prefix "
    "attention_dropout resid_pdrop embd_pdrop hidden_dropout pretraining_tp is_decoder return_dict "
    "output_attentions output_hidden_states id2label label2id problem_type finetuning_task task_specific_params "
    "max_length min_length do_sample temperature top_k top_p typical_p repetition_penalty length_penalty "
    "num_beams num_beam_groups num_return_sequences early_stopping diversity_penalty no_repeat_ngram_size "
    "is_llama_config unsloth_version unsloth_fixed transformers.js_config base_model_tp_plan model_name".split()
)
NEUTRAL = {"full_attn_mod": 1, "interpolate_factor": 1}  # of phi-4-mini: with these values they do nothing
ROPE_KEYS = {
    "type",
    "rope_type",
    "rope_theta",
    "partial_rotary_factor",
    "short_factor",
    "long_factor",
    "original_max_position_embeddings",
    "factor",
    "attention_factor",
    "short_mscale",
    "long_mscale",
}


def read_json(path: epath.Path) -> dict[str, Any]:
    """A small JSON object. Raises: UserError."""
    return dict(strict_json.read(path, LONGEST_CONFIG).values)


def parse(data: Mapping[str, Any], where: str) -> tuple[ModelConfig, str]:
    """-> the model, and the name of its class in transformers.

    Raises: UserError naming `where` and the key, for what is unknown, missing, of the wrong type, or not done here.
    """
    architecture = _architecture(data, where)
    layout = ARCHITECTURES[architecture]
    unknown = {key: value for key, value in data.items() if not _inert(key, value)}
    if unknown:
        raise UserError(_refusal(where, architecture, unknown))
    values = {**DEFAULTS[layout], **data}
    heads = _integer(values, "num_attention_heads", where)
    dim = _integer(values, "hidden_size", where)
    head_dim = _integer(values, "head_dim", where, dim // heads)
    max_position = _integer(values, "max_position_embeddings", where)
    if values.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UserError(f"{where}: hidden_act={shown(values['hidden_act'])}; phijax computes silu.")
    window = values.get("sliding_window")
    if layout == "llama" and window is not None:
        raise UserError(f"{where}: sliding_window={shown(window)} in a Llama, which has no window in transformers.")
    rope = _rope(values, layout, where)
    partial = rope.pop("partial_rotary_factor")
    theta = rope.pop("rope_theta")
    model = ModelConfig(
        vocab_size=_integer(values, "vocab_size", where),
        model_dim=dim,
        num_layers=_integer(values, "num_hidden_layers", where),
        num_heads=heads,
        num_kv_heads=_integer(values, "num_key_value_heads", where, heads),
        head_dim=head_dim,
        ffn_dim=_integer(values, "intermediate_size", where),
        max_position=max_position,
        rope_theta=_number("rope_theta", theta, where),
        partial_rotary_factor=_number("partial_rotary_factor", partial, where),
        sliding_window=None if window is None else _integer(values, "sliding_window", where),
        tied_head=_boolean(values, "tie_word_embeddings", where),
        norm_eps=_number("rms_norm_eps", values["rms_norm_eps"], where),
        long_rope=_long_rope(rope, values, layout, max_position, where),
    )
    try:
        model.check()
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return model, architecture


def _architecture(data: Mapping[str, Any], where: str) -> str:
    named = data.get("architectures") or []
    named = named if isinstance(named, list) else [named]
    by_type = {layout: name for name, layout in ARCHITECTURES.items()}
    name = named[0] if named else by_type.get(Fields(data, where).text("model_type", ""))
    if not isinstance(name, str) or name not in ARCHITECTURES:
        said = f"architectures={shown(named)}" if named else f"model_type={data.get('model_type')!r}"
        raise UserError(f"{where}: {said} is not known. phijax reads {', '.join(ARCHITECTURES)}.")
    if "model_type" in data and data["model_type"] != ARCHITECTURES[name]:
        raise UserError(f"{where}: architectures says {name}, model_type says {shown(data['model_type'])}.")
    return name


def _inert(key: str, value: Any) -> bool:
    if key in USED or key in INERT or key.startswith("_"):
        return True
    return value is None or value in (False, 0, "", [], {}) or NEUTRAL.get(key) == value


def _refusal(where: str, architecture: str, unknown: Mapping[str, Any]) -> str:
    listed = ", ".join(f"{strict_json.named(key)}={shown(value)}" for key, value in list(unknown.items())[:8])
    if "quantization_config" in unknown:
        return f"{where}: the weights are quantised (quantization_config). Take the checkpoint that is not, or a GGUF."
    return (
        f"{where}: {listed}: phijax does not know {'this key' if len(unknown) == 1 else 'these keys'} of a "
        f"{architecture} and would compute something else if it mattered.\nIf it does not, remove it from the file."
    )


def _rope(values: Mapping[str, Any], layout: Layout, where: str) -> dict[str, Any]:
    """Both spellings as one dict, with rope_theta, partial_rotary_factor and rope_type in it."""
    given = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        raise UserError(f"{where}: rope_scaling={shown(given)} is not an object.")
    if unknown := sorted(set(given) - ROPE_KEYS):
        raise UserError(
            f"{where}: rope_scaling has {', '.join(map(strict_json.named, unknown))}, which phijax does not do."
        )
    rope = {
        "rope_theta": values.get("rope_theta", 10000.0),
        "partial_rotary_factor": values.get("partial_rotary_factor") or 1.0,
        **given,
    }
    kind = rope.pop("rope_type", None) or rope.get("type") or "default"
    rope.pop("type", None)
    rope["rope_type"] = "longrope" if kind == "su" else kind
    if rope["rope_type"] not in ("default", "longrope"):
        raise UserError(
            f"{where}: rope_type={shown(kind)} is not done by phijax, which rotates by the default rule or by LongRoPE "
            "('longrope', 'su')."
        )
    if layout != "phi3" and rope["partial_rotary_factor"] != 1.0:
        raise UserError(f"{where}: partial_rotary_factor={rope['partial_rotary_factor']} is no key of this class.")
    return rope


def _long_rope(rope: dict, values: Mapping[str, Any], layout: Layout, max_position: int, where: str) -> LongRope | None:
    """The lists; refuses factors on cos and sin that differ from sqrt(1 + ln s / ln L0), which is always taken here."""
    if rope["rope_type"] == "default":
        return None
    # The key beside the rope dict wins over the one inside, as in transformers, where Phi3 always has it.
    beside, inside = (x.get("original_max_position_embeddings") for x in (values, rope))
    if not beside and layout == "phi3" and inside not in (None, PHI3_ORIGINAL):
        raise UserError(
            f"{where}: original_max_position_embeddings={inside} stands inside rope_scaling alone, where Phi3 of "
            f"transformers does not see it and takes {PHI3_ORIGINAL}. Put the right number beside rope_scaling."
        )
    original = beside or (PHI3_ORIGINAL if layout == "phi3" else inside or max_position)
    given = Fields({**rope, "original_max_position_embeddings": original}, where, "rope_scaling")
    lists = [given.numbers(name, above=0) for name in ("short_factor", "long_factor")]
    original = given.integer("original_max_position_embeddings", least=2)  # its logarithm is a divisor
    scale = max_position / original
    ours = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    theirs = given.number("attention_factor", None)
    if theirs is None and (factor := given.number("factor", None)) is not None:
        theirs = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    for name, value in (
        ("attention_factor", theirs),
        *((key, given.number(key, None)) for key in ("short_mscale", "long_mscale")),
    ):
        if value is not None and not math.isclose(value, ours, rel_tol=1e-6):
            raise UserError(
                f"{where}: {name} {value} of LongRoPE is not sqrt(1 + ln({scale:g}) / ln({original})) = {ours:.9g}, "
                "the only one that phijax does."
            )
    return LongRope(*map(tuple, lists), original_max_position=original)


def _integer(values: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    fields = Fields(values, where)
    return fields.integer(key, least=1) if default is None else fields.integer(key, default, least=1)


def _number(key: str, value: Any, where: str) -> float:
    return Fields({key: value}, where).number(key, above=0)


def _boolean(values: Mapping[str, Any], key: str, where: str) -> bool:
    return Fields(values, where).boolean(key, False)


def unwritable(model: ModelConfig, layout: Layout) -> str | None:
    """Why a model cannot be written in that layout; None if it can."""
    window = model.sliding_window is not None and model.sliding_window < model.max_position
    if layout == "phi3" and model.num_heads * model.head_dim != model.model_dim:
        return (
            f"Phi3ForCausalLM has heads of hidden_size / heads = {model.model_dim / model.num_heads:g}, these have "
            f"{model.head_dim}: take --format={'mistral' if window else 'llama'}"
        )
    if layout == "llama" and window:
        return (
            f"LlamaForCausalLM has no window, and beyond {model.sliding_window} tokens this model would be another: "
            "take --format=mistral, which has one, or hf"
        )
    if layout != "phi3" and model.partial_rotary_factor != 1.0:
        return f"{layout.capitalize()}ForCausalLM rotates whole heads, this model a part: take --format=hf (Phi3)"
    if layout != "phi3" and model.model_dim % model.num_heads:
        return f"transformers wants hidden_size={model.model_dim} to be a multiple of {model.num_heads} heads here"
    return None


def render(model: ModelConfig, layout: Layout, *, dtype: str, ids: Mapping[str, Any]) -> dict[str, Any]:
    """config.json for old and new readers: the keys of transformers 4, which 5 reads as well.

    Args:
      dtype: of most weights, "bfloat16".
      ids: bos_token_id, eos_token_id, pad_token_id, those that there are.
    """
    config: dict[str, Any] = {
        "architectures": [next(name for name, known in ARCHITECTURES.items() if known == layout)],
        "model_type": layout,
        "vocab_size": model.vocab_size,
        "hidden_size": model.model_dim,
        "intermediate_size": model.ffn_dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_position,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "tie_word_embeddings": model.tied_head,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": dtype,
        **ids,
    }
    render_layout: dict[Layout, Callable[[ModelConfig], dict[str, Any]]] = {
        "phi3": _phi3_keys,
        "llama": _llama_keys,
        "mistral": _mistral_keys,
    }
    return config | render_layout[layout](model)


def _phi3_keys(model: ModelConfig) -> dict[str, Any]:
    rope = model.long_rope
    keys: dict[str, Any] = {
        "original_max_position_embeddings": rope.original_max_position if rope else model.max_position,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }
    if model.sliding_window is not None:
        keys["sliding_window"] = model.sliding_window
    if model.partial_rotary_factor != 1.0:
        keys["partial_rotary_factor"] = model.partial_rotary_factor
    if rope:
        # These three and no other: transformers before 4.50 refuses a fourth.
        keys["rope_scaling"] = {"type": "longrope", **_lists(rope)}
    return keys


def _llama_keys(model: ModelConfig) -> dict[str, Any]:
    keys: dict[str, Any] = {"attention_bias": False, "mlp_bias": False, "head_dim": model.head_dim}
    return keys | _long_rope_keys(model)


def _mistral_keys(model: ModelConfig) -> dict[str, Any]:
    # Without the key a Mistral has a window of 4096: where there is none it must say null.
    return {"sliding_window": model.sliding_window, "head_dim": model.head_dim} | _long_rope_keys(model)


def _long_rope_keys(model: ModelConfig) -> dict[str, Any]:
    rope = model.long_rope
    if rope is None:
        return {}
    return {
        # transformers 4 looks for it here and would else take max_position_embeddings, 5 for the one inside.
        "original_max_position_embeddings": rope.original_max_position,
        "rope_scaling": {
            "rope_type": "longrope",
            "type": "longrope",
            "factor": model.max_position / rope.original_max_position,
            "original_max_position_embeddings": rope.original_max_position,
            **_lists(rope),
        },
    }


def _lists(rope: LongRope) -> dict[str, list[float]]:
    return {"short_factor": list(rope.short_factor), "long_factor": list(rope.long_factor)}
