"""What a run can be for, `config.task`: what it minimises, and where its rows come from."""

import dataclasses
from collections.abc import Callable

from phijax.data.loader import open_shard_rows
from phijax.data.row_source import RowSource
from phijax.training.objectives import MakeObjective, next_token


@dataclasses.dataclass(frozen=True)
class Task:
    """Rows and objective that belong together: rows have the keys that the objective reads.

    make_objective: as training/objectives.next_token. open_rows: as data/loader.open_shard_rows.
    """

    make_objective: MakeObjective
    open_rows: Callable[..., RowSource]


TASKS = {"pretrain": Task(next_token, open_shard_rows)}
