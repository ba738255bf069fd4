"""What a checkpoint says of itself besides model, weights and tokenizer, of whatever kind it is."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from etils import epath

from phijax.storage.strict_json import Fields

# Facts that stay true of weights that are written out again, or trained on with the same tokenizer.
TRAVELLING = ("architecture", "bos_id", "eos_id", "pad_id", "generation")


@dataclasses.dataclass(frozen=True)
class Facts:
    """None: the checkpoint says nothing of it.

    architecture: transformers' name of the class.
    tokenizer_folder: where the tokenizer's files are.
    bos_id, eos_id, pad_id: token ids as config.json or GGUF's keys name them.
    generation: what generation_config.json says, as it stands there.
    name: of the model, as people call it.
    step, identity: of a step of ours: its number, and what its manifest says that it belongs to.
    scores: of an export of ours: name of a loss -> [step, nats a token].
    quantization: of a quantised checkpoint of ours: the schemes by leaf, the method, the errors.
    gguf_kinds: how a GGUF file stores its matrices, by ggml's names.
    """

    architecture: str | None = None
    tokenizer_folder: epath.Path | None = None
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    generation: Mapping[str, Any] | None = None
    name: str | None = None
    step: int | None = None
    identity: Mapping[str, Any] | None = None
    scores: Mapping[str, list] | None = None
    quantization: Mapping[str, Any] | None = None
    gguf_kinds: tuple[str, ...] = ()

    def said(self, *names: str) -> dict[str, Any]:
        """Those of the facts `names` of which the checkpoint says something."""
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}


def carried(kept: Fields) -> dict[str, Any]:
    """The facts in what a manifest of ours keeps of an earlier checkpoint; the rest of it is not of this class.

    Raises: UserError for a fact of another type.
    """
    facts = {name: kept.text(name, None) for name in ("name", "architecture")}
    facts |= {name: kept.integer(name, None) for name in ("bos_id", "eos_id", "pad_id")}
    facts |= {name: kept.object(name).values for name in ("generation", "scores") if kept.has(name)}
    for name, score in facts.get("scores", {}).items():
        if not (isinstance(score, list) and [type(value) for value in score] == [int, float]):
            raise kept.object("scores").refusal(name, "a step and a loss")
    return {name: value for name, value in facts.items() if value is not None}
