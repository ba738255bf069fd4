"""How a model wants to be sampled: generation_config.json's settings <-> keys of a GGUF file."""

from collections.abc import Mapping
from typing import Any

from phijax.interchange.gguf.keys import shortest

PREFIX = "general.sampling."  # llama.cpp takes these where its user says nothing
# Of GGUF -> of transformers.
_NAMES = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


def settings_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json of a file's keys; empty where it has none. What is no number of use is passed over."""
    found = {}
    for key, name in _NAMES.items():
        value = metadata.get(PREFIX + key)
        if _is_of_use(value):
            found[name] = value if type(value) is int else shortest(value)
    if not found:
        return {}
    if found.get("temperature") == 0:  # the most likely token, which transformers says otherwise
        return {"do_sample": False, **{name: value for name, value in found.items() if name != "temperature"}}
    return {"do_sample": True, **found}


def keys_of(generation: Mapping[str, Any]) -> dict[str, int | float]:
    """Keys of a file; none where generation_config.json does not say that tokens are drawn."""
    if generation.get("do_sample") is not True:
        return {}
    found: dict[str, int | float] = {}
    for key, name in _NAMES.items():
        value = generation.get(name)
        if _is_of_use(value):
            found[PREFIX + key] = int(value) if key == "top_k" else float(value)
    return found


def _is_of_use(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1 << 31
