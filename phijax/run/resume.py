"""Whether a run may go on where its workdir is, what of it stays as it was, and the history of its config."""

import contextlib
import json
import time
from typing import Any

from etils import epath

from phijax import config as configs
from phijax.config import Config
from phijax.data import loader
from phijax.data.row_source import RowSource
from phijax.errors import UserError
from phijax.interchange.native.source import model_of
from phijax.interchange.opened import Opened
from phijax.run import start
from phijax.storage import atomic, strict_json
from phijax.storage.regular_files import read_bounded
from phijax.storage.strict_json import Fields


def begin_of(rows: RowSource, before: dict[str, Any] | None, opened: Opened | None) -> int | None:
    """The id that segments begin with (rows.make_row): as the run's own steps say, else as texts of `opened` begin.

    Where neither says anything it is end-of-text.
    Args: before: the identity that the newest step was saved with. opened: the weights that a new run starts from.
    """
    if before is not None:
        return Fields(before, "The newest checkpoint").object("data").integer("begin", None)
    if opened is not None and len(opened.begin) == 1:
        with contextlib.suppress(UserError):  # a checkpoint without a tokenizer has no say in what its ids mean
            if next(iter(rows.shards.values())).made_with(opened.tokenizer()):
                return opened.begin[0]
    return rows.begin


def check_identity(before: dict[str, Any], now: dict[str, Any], step: int) -> None:
    """Whether the run in this workdir is this run. Raises: UserError naming the first difference."""
    old, new = (start.computed(model_of(f"The checkpoint of step {step}", one)) for one in (before, now))
    changed = configs.differences(old, new)
    if changed:
        key, (old, new) = next(iter(changed.items()))
        raise UserError(
            f"The checkpoint of step {step} is of another model: model.{key} was {old!r}, now {new!r}"
            + (f" (and {len(changed) - 1} more)" if len(changed) > 1 else "")
            + ".\nSet it back, or take another --workdir (--config.init_from takes over weights of an equal model)."
        )
    loader.check_resume(
        Fields(before, f"The checkpoint of step {step}").object("data").values,
        json.loads(json.dumps(now["data"])),
        step,
    )


def keep_config(config: Config, workdir: epath.Path, step: int, say) -> None:
    """Writes config.json; what differs from the last start is said, and added to config_history.jsonl.

    Of a start that nothing was kept of (step 0) there is nothing to compare with.
    """
    path, now = workdir / "config.json", configs.to_dict(config)
    if step and path.exists():
        changed = changes(config, workdir)
        if changed is None:
            say(f"{path} cannot be read; written anew")
        for key, (old, new) in (changed or {}).items():
            say(f"config: {key} was {old!r}, from step {step} on {new!r}")
        if changed:
            add_to_history(workdir, {"step": step, "changed": {k: list(v) for k, v in changed.items()}})
    atomic.write_json(path, now)


def changes(config: Config, workdir: epath.Path) -> dict[str, tuple[Any, Any]] | None:
    """What differs from the config of the last start: key -> (old, new). None if that cannot be read.

    A key that an older version did not know was at its default.
    """
    try:
        before = dict(strict_json.read(workdir / "config.json", half_characters=True).values)
    except UserError:
        return None
    return configs.differences(configs.filled(before), configs.to_dict(config))


def note_going_back(workdir: epath.Path, went_back: list[dict], fields: dict) -> None:
    """Before a step is set aside: what config_history.jsonl, and later events.jsonl, say of it."""
    went_back.append(fields)
    add_to_history(workdir, {"step": fields["went_back_to"], **fields})


def add_to_history(workdir: epath.Path, fields: dict) -> None:
    history = workdir / "config_history.jsonl"
    line = json.dumps({"time": time.time(), **fields}) + "\n"
    history.write_bytes((read_bounded(history, None) if history.exists() else b"") + line.encode())
