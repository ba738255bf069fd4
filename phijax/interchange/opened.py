"""What an opened checkpoint is, of whatever kind; open.py makes it."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from etils import epath

from phijax.interchange.weight_source import WeightSource
from phijax.model.config import ModelConfig
from phijax.text.tokenizer import TextTokenizer

Kind = Literal["phijax", "huggingface", "gguf"]
# Keys of `extra` that stay true of weights that are written out again, or trained on with the same tokenizer.
TRAVELLING = ("architecture", "bos_id", "eos_id", "pad_id", "generation")


@dataclasses.dataclass(frozen=True)
class Opened:
    """A checkpoint, checked but not read.

    path: the folder or file that was recognised; of a run, the folder of its step.
    tokenizer: opens it when asked; raises UserError if there is none or it cannot be read.
    chat_template: the Jinja text that the checkpoint carries.
    begin: ids that stand before every text that is not a conversation; what begins a conversation, its template says.
    stop_ids: every id that ends a text, of generation_config.json or GGUF's eos and end-of-turn; () if it says none.
    extra: facts for whoever writes it out again; keys that all kinds share: "architecture" (transformers' name of
      the class), "tokenizer_folder" (a path, or absent), "bos_id", "eos_id", "pad_id", "name", "generation" (what
      generation_config.json says, as it stands there).
    """

    path: epath.Path
    kind: Kind
    model: ModelConfig
    weights: WeightSource
    tokenizer: Callable[[], TextTokenizer]
    chat_template: str | None = None
    begin: tuple[int, ...] = ()
    stop_ids: tuple[int, ...] = ()
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
