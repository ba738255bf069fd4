"""config.json of transformers <-> ModelConfig. What changes the mathematics and is not done here is refused by name.

What a class has of its own is in `families/`.
"""

from collections.abc import Mapping
from typing import Any

from etils import epath

from phijax.errors import UserError
from phijax.interchange.huggingface.families import FAMILIES
from phijax.interchange.huggingface.families.family import Family
from phijax.model.config import ModelConfig
from phijax.storage import strict_json
from phijax.storage.strict_json import Fields, shown

CONFIG_FILE = "config.json"
LONGEST_CONFIG = 10_000_000  # bytes; real ones have some thousand
BY_CLASS = {family.class_name: family for family in FAMILIES.values()}

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


def read_json(path: epath.Path) -> dict[str, Any]:
    """A small JSON object. Raises: UserError."""
    return dict(strict_json.read(path, LONGEST_CONFIG).values)


def parse(data: Mapping[str, Any], where: str) -> tuple[ModelConfig, Family]:
    """-> the model, and its class in transformers.

    Raises: UserError naming `where` and the key, for what is unknown, missing, of the wrong type, or not done here.
    """
    family = _family(Fields(data, where))
    if unknown := {key: value for key, value in data.items() if not _known(family, key, value)}:
        raise UserError(_refusal(where, family, unknown))
    model = family.read(Fields({**family.defaults, **data}, where))
    try:
        model.check()
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return model, family


def render(model: ModelConfig, family: Family, *, dtype: str, ids: Mapping[str, Any]) -> dict[str, Any]:
    """config.json for old and new readers.

    Args:
      dtype: of most weights, "bfloat16".
      ids: bos_token_id, eos_token_id, pad_token_id, those that there are.
    """
    named = {"architectures": [family.class_name], "model_type": family.model_type}
    given = {"initializer_range": 0.02, "use_cache": True, "torch_dtype": dtype, **ids}
    return named | family.write(model, given)


def _family(values: Fields) -> Family:
    named = values.values.get("architectures") or []
    named = named if isinstance(named, list) else [named]
    said = values.values.get("model_type")
    if named:
        family = BY_CLASS.get(named[0]) if isinstance(named[0], str) else None
    else:
        family = FAMILIES.get(said) if isinstance(said, str) else None
    if family is None:
        what = f"architectures={shown(named)}" if named else f"model_type={shown(said)}"
        raise UserError(f"{values.file}: {what} is not known. phijax reads {', '.join(BY_CLASS)}.")
    if "model_type" in values.values and said != family.model_type:
        raise UserError(f"{values.file}: architectures says {family.class_name}, model_type says {shown(said)}.")
    return family


def _known(family: Family, key: str, value: Any) -> bool:
    if key in family.keys or key in INERT or key in family.inert or key.startswith("_"):
        return True
    return value is None or value in (False, 0, "", [], {}) or (key in family.neutral and family.neutral[key] == value)


def _refusal(where: str, family: Family, unknown: Mapping[str, Any]) -> str:
    listed = ", ".join(f"{strict_json.named(key)}={shown(value)}" for key, value in list(unknown.items())[:8])
    if "quantization_config" in unknown:
        return f"{where}: the weights are quantised (quantization_config). Take the checkpoint that is not, or a GGUF."
    return (
        f"{where}: {listed}: phijax does not know {'this key' if len(unknown) == 1 else 'these keys'} of a "
        f"{family.class_name} and would compute something else if it mattered.\n"
        "If it does not, remove it from the file."
    )
