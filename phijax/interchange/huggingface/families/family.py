"""What there is to say of one class of transformers; each file beside this one says it of its own."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from phijax.interchange.model_fields import ModelFields
from phijax.interchange.tensors import Row
from phijax.model.config import ModelConfig
from phijax.storage.strict_json import Fields


def _none_derived(name: str, shape: tuple[int, ...], c: ModelConfig) -> bool:
    return False


def _nothing_lacks(c: ModelConfig) -> None:
    return None


@dataclasses.dataclass(frozen=True)
class Family:
    """One class of transformers: its config.json both ways, and its tensors.

    model_type: transformers' name of it, under which --format and messages speak of it.
    rows: its tensors, in the order in which transformers declares them.
    read: what config.json says, with `defaults` where it is silent. Raises: UserError, naming the key, for what is
      missing, of the wrong type, or not computed here.
    write: a model's keys, with those given (they are the same for all classes) among them.
    fields: which of ModelConfig it says. lacks: what else a model of this class cannot be, as a reason.
    keys: those of config.json that `read` asks for. inert: those that change nothing that is computed.
    neutral: those that change nothing with this value.
    derived: whether a tensor of a file, by its name and shape, follows from config.json, as old files carry some.
    prefix: of all names but the head's, which files of the class without a head lack.
    mlx_rows: the tensors as mlx-lm declares them; None: as transformers does. mlx_lacks: what mlx-lm cannot have.
    """

    model_type: str
    class_name: str
    rows: tuple[Row, ...]
    read: Callable[[Fields], ModelConfig]
    write: Callable[[ModelConfig, Mapping[str, Any]], dict[str, Any]]
    keys: frozenset[str]
    defaults: Mapping[str, Any]
    fields: ModelFields
    lacks: Callable[[ModelConfig], str | None] = _nothing_lacks
    inert: frozenset[str] = frozenset()
    neutral: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    derived: Callable[[str, tuple[int, ...], ModelConfig], bool] = _none_derived
    prefix: str = ""
    mlx_rows: tuple[Row, ...] | None = None
    mlx_lacks: Callable[[ModelConfig], str | None] = _nothing_lacks

    def unwritable(self, c: ModelConfig) -> str | None:
        """Why a model cannot be written as this class; None if it can."""
        reason = self.fields.unsaid(c)
        return f"{self.class_name} computes otherwise: {reason}" if reason else self.lacks(c)

    @property
    def head_name(self) -> str:
        """The tensor of a head that is not tied."""
        return next(row.name for row in self.rows if row.leaves == ("head",))
