"""Where the rows of a run come from: what the loader and the run ask of it."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from phijax.data.mixture import Phase
from phijax.data.shards import Shards

Row = dict[str, np.ndarray]  # the keys that the objective reads, (T, ...)


class RowSource(Protocol):
    """All rows of a run. A row is a pure function of (seed, step, index) and, where `needs_params`, of the weights.

    It holds no position: the position of a run is its step. Data may be read by several threads at a time.
    """

    phases: Sequence[Phase]
    needs_params: bool  # rows of a step are made of the weights that the step begins with: never ahead of it
    shards: Mapping[str, Shards]  # path -> folder that rows are made of; all of one tokenizer, which is the run's
    begin: int | None  # what segments begin with (rows.make_row)

    @property
    def total_steps(self) -> int: ...

    def phase_at(self, step: int) -> Phase: ...

    def place(self, step: int, index: int) -> Any:
        """Where row `index` of `step` comes from, in the source's own terms."""
        ...

    def read(self, places: Sequence[Any], state: Any) -> list[Row]:
        """The rows at these places; each is decided by its place alone, and by `state`.

        Args:
          state: the training state (training/state.py) that the step begins with, which the step then overwrites:
            nothing of it may be kept. None where the source does not need it. Where there are several processes all
            call at the same step, each for its own rows.
        """
        ...

    def fingerprint(self) -> dict[str, Any]:
        """What decides the rows, as JSON: compared when the run is resumed (loader.check_resume) and by processes.

        `phases` is a list with steps, sequence_length, global_batch_size and mixture of each.
        """
        ...

    def beginning_with(self, begin: int | None) -> "RowSource":
        """The same rows under another rule of what segments begin with."""
        ...

    def summary(self) -> list[str]:
        """Lines on what is read, and how often."""
        ...

    def warnings(self) -> list[str]:
        """Lines on what may not be meant."""
        ...
