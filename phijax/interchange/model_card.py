"""README.md of an exported model: what it is, what it was trained on, how it scored; only what the checkpoint knows."""

import json
import math
import warnings
from typing import Any

from etils import epath

from phijax.errors import UserError
from phijax.interchange import quantization_card
from phijax.interchange.facts import TRAVELLING
from phijax.interchange.native.source import is_step_of_run
from phijax.interchange.opened import Opened
from phijax.model import params
from phijax.model.config import ModelConfig
from phijax.report.writers import HELD_OUT_LOSS, read_metrics
from phijax.storage.strict_json import Fields, printable

FILE = "README.md"


_TRANSFORMERS = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```"""
# Format of phijax export -> the hub's name of the library, and how the files are used.
USES = {
    "hf": ("transformers", _TRANSFORMERS),
    "compressed_tensors": (
        "transformers",
        f"With `pip install compressed-tensors`, or `vllm serve FOLDER`:\n\n{_TRANSFORMERS}",
    ),
    "mlx": ("mlx", 'With `pip install mlx-lm`:\n```sh\nmlx_lm.generate --model FOLDER --prompt "Hello"\n```'),
    "gguf": ("gguf", '```sh\nllama-cli --model FILE.gguf --prompt "Hello"\n```'),
}


def render(opened: Opened, class_name: str, format: str = "hf", tokenizer: str = "") -> str:
    """The card's text. `class_name`: transformers' name of what it is written as. `format`: a key of USES.

    `tokenizer`: how its files were checked.
    """
    name = printable(opened.facts.name or _source_name(opened))
    library, use = USES[format]
    parts = [
        f"---\nlibrary_name: {library}\npipeline_tag: text-generation\ntags:\n- phijax\n---",
        f"# {name}",
        _what(opened, class_name),
        f"## Use\n{use}",
        quantization_card.section(opened),
        _data(opened),
        _scores(opened),
        tokenizer and f"## Tokenizer\n{tokenizer}",
        "## Licence\nNot stated. The terms of the training data and of the weights that training began with apply.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _source_name(opened: Opened) -> str:
    """The workdir's name for a run's step, else the folder's or file's own."""
    of_run = opened.kind == "phijax" and is_step_of_run(opened.path)
    return opened.path.parent.parent.name if of_run else opened.path.stem


def _what(opened: Opened, class_name: str) -> str:
    c = opened.model
    rows = {
        "class": class_name,
        "parameters": f"{params.count(c):,}",
        "layers": c.num_layers,
        "width": c.model_dim,
        "heads": f"{c.num_heads} of {c.head_dim}, {c.num_kv_heads} for keys and values",
        "ffn width": c.ffn_dim,
        "vocabulary": f"{c.vocab_size:,}",
        "context": f"{c.max_position:,} tokens" + _positions(c),
    }
    if opened.facts.step is not None:
        rows["step"] = f"{opened.facts.step:,}"
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"Written by phijax from a {opened.kind} checkpoint.\n\n| | |\n|---|---|\n{table}"


def _positions(c: ModelConfig) -> str:
    window = f", each seeing {c.sliding_window:,}" if c.sliding_window and c.sliding_window < c.max_position else ""
    long = f", LongRoPE from {c.long_rope.original_max_position:,} on" if c.long_rope else ""
    return window + long


def _data(opened: Opened) -> str:
    data = Fields(opened.facts.identity or {}, str(opened.path)).object("data", Fields({}, ""))
    lines = []
    for number, phase in enumerate(data.objects("phases", [])):
        steps, length, rows = (phase.integer(name) for name in ("steps", "sequence_length", "global_batch_size"))
        tokens = steps * length * rows
        sources = [(printable(epath.Path(s.text("path")).name), s) for s in phase.objects("mixture")]
        mixture = ", ".join(
            f"{name} x {source.integer('weight')} (digest {source.text('digest')[:12]})" for name, source in sources
        )
        lines.append(
            f"- phase {number}: {steps:,} steps of {rows:,} rows of {length:,} tokens, {tokens:,} tokens in all; "
            f"{mixture}"
        )
    if not lines:
        return ""
    seed = data.integer("seed", None, most=2**32 - 1)
    return f"## Data\nWhat the run was set to read, seed {seed}:\n\n" + "\n".join(lines)


def _scores(opened: Opened) -> str:
    lines = [
        f"| {_shown(name)} | {step:,} | {value:.4f} | {math.exp(min(value, 700.0)):,.2f} |"
        for name, (step, value) in sorted(scores(opened).items())
    ]
    return (
        "## Scores\n| loss | step | nats a token | perplexity |\n|---|---|---|---|\n" + "\n".join(lines)
        if lines
        else ""
    )


def scores(opened: Opened) -> dict[str, list]:
    """Name of a loss -> [step, nats a token], its last of the run up to the step that was opened."""
    if opened.kind != "phijax" or not is_step_of_run(opened.path):
        return dict(opened.facts.scores or {})
    path = opened.path.parent.parent / "metrics.jsonl"
    try:
        rows = read_metrics(path) if path.exists() else []
    except UserError as error:
        warnings.warn(f"{error} No scores are taken from it.", stacklevel=2)
        return {}
    last: dict[str, list] = {}
    for row in rows:
        if row.get("step", opened.facts.step) < opened.facts.step:
            named = {k: v for k, v in row.items() if k == "loss" or k.startswith(HELD_OUT_LOSS)}
            last |= {name: [row["step"], value] for name, value in named.items() if isinstance(value, float)}
    return last


def _shown(name: str) -> str:
    return "training" if name == "loss" else f"held out, {name.removeprefix(HELD_OUT_LOSS)}"


def kept(opened: Opened) -> dict[str, Any]:
    """What an exported checkpoint of ours keeps of its source, as JSON."""
    facts = opened.facts.said("step", "identity", "name", *TRAVELLING) | {
        "source": opened.kind,
        "scores": scores(opened),
        "begin": list(opened.begin),
        "stop_ids": list(opened.stop_ids),
        "chat_template": opened.chat_template,
    }
    return json.loads(json.dumps(facts))
