"""The model card's section on what rounding to few bits cost: what `phijax quantize` wrote beside the weights."""

import math
from collections.abc import Mapping
from typing import Any

from etils import epath

from phijax.interchange.huggingface import config as huggingface_config
from phijax.interchange.native.source import QUALITY_FILE
from phijax.interchange.opened import Opened
from phijax.quantization import policy

# Key of quality.json -> what the card calls it, and how its number is written.
MEASURED = {
    "tokens": ("held-out tokens", "{:,.0f}"),
    "kl_mean": ("KL from the float model, mean, nats", "{:.5f}"),
    "kl_99th_percentile": ("the same, 99th percentile", "{:.4f}"),
    "perplexity_float": ("perplexity of the float model", "{:.4f}"),
    "perplexity_quantized": ("perplexity of this one", "{:.4f}"),
    "top1_agreement": ("the likeliest token is the same", "{:.2%}"),
}


def section(opened: Opened) -> str:
    """Its text, empty for a checkpoint that is not quantised. Raises: UserError for a damaged quality.json."""
    schemes = opened.weights.schemes
    if not schemes:
        return ""
    path = opened.path / QUALITY_FILE
    facts = huggingface_config.read_json(path) if path.exists() else {}
    kinds = {str(policy.kind_of(leaf)): policy.name_of(scheme) for leaf, scheme in schemes.items()}
    rows = [("weights", ", ".join(f"{kind} {scheme}" for kind, scheme in kinds.items()))]
    if isinstance(facts.get("method"), str):
        rows.append(("method", facts["method"]))
    measured = facts.get("quality")
    rows += _measured(measured) if isinstance(measured, dict) else [("quality", "not measured")]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"## Small weights\nSymmetric integers with float16 scales.\n\n| | |\n|---|---|\n{table}"


def _measured(quality: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    if isinstance(held_out := quality.get("held_out"), str):
        rows.append(("measured on", epath.Path(held_out).name))
    for key, (name, form) in MEASURED.items():
        value = quality.get(key)
        if isinstance(value, int | float) and math.isfinite(value):
            rows.append((name, form.format(value)))
    return rows
