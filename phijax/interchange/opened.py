"""What an opened checkpoint is, of whatever kind; open.py makes it."""

import dataclasses
from collections.abc import Callable
from typing import Literal

from etils import epath

from phijax.interchange.facts import Facts
from phijax.interchange.weight_source import WeightSource
from phijax.model.config import ModelConfig
from phijax.text.tokenizer import TextTokenizer

Kind = Literal["phijax", "huggingface", "gguf"]


@dataclasses.dataclass(frozen=True)
class Opened:
    """A checkpoint, checked but not read.

    path: the folder or file that was recognised; of a run, the folder of its step.
    tokenizer: opens it when asked; raises UserError if there is none or it cannot be read.
    chat_template: the Jinja text that the checkpoint carries.
    begin: ids that stand before every text that is not a conversation; what begins a conversation, its template says.
    stop_ids: every id that ends a text, of generation_config.json or GGUF's eos and end-of-turn; () if it says none.
    facts: what else it says of itself, for whoever writes it out again.
    """

    path: epath.Path
    kind: Kind
    model: ModelConfig
    weights: WeightSource
    tokenizer: Callable[[], TextTokenizer]
    chat_template: str | None = None
    begin: tuple[int, ...] = ()
    stop_ids: tuple[int, ...] = ()
    facts: Facts = Facts()
