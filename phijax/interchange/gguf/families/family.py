"""What there is to say of one architecture of GGUF files; each file beside this one says it of its own."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from phijax.interchange.gguf.keys import Keys
from phijax.interchange.model_fields import ModelFields
from phijax.interchange.tensors import Row
from phijax.model.config import ModelConfig


def _nothing_lacks(c: ModelConfig) -> None:
    return None


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture: its keys both ways, and its tensors. All keys are spoken of without the architecture's name.

    classes: transformers' names of what is written so; the first is what a file is said to be.
    rows: the tensors, in the order in which they are written.
    followed: keys that decide what is computed, and that `read` follows. neutral: keys and the values with which they
      change nothing.
    read: the model that a file describes. Raises: UserError for a key that is missing, no number that describes a
      model, or asks for other mathematics.
    write: a model's keys; whole numbers become uint32, others float32.
    fields: which of ModelConfig it says. lacks: what else llama.cpp would compute otherwise, as a reason.
    named: parts of general.name of which it must have one.
    """

    architecture: str
    classes: tuple[str, ...]
    rows: tuple[Row, ...]
    followed: frozenset[str]
    read: Callable[[Keys], ModelConfig]
    write: Callable[[ModelConfig], dict[str, int | float]]
    fields: ModelFields
    lacks: Callable[[ModelConfig], str | None] = _nothing_lacks
    neutral: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    named: tuple[str, ...] = ()

    def unwritable(self, c: ModelConfig) -> str | None:
        """Why a file of this architecture cannot hold a model; None if it can."""
        return self.fields.unsaid(c) or self.lacks(c)
