"""OUTPUT/unfinished: which pieces of the input are tokenized by now, so that a start goes on with what has changed.

plan.json names the units, each a number and the parts of files that are in it. When files change between two starts the
units of all others stay as they are; what is left of the input becomes new units, under numbers never used before.
Shards are made out of all units, so where a unit changes they are made again: the bytes are those of a first start.
"""

import dataclasses
import fcntl
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from phijax.curation.documents import InputFile, Part
from phijax.curation.jobs import LONGEST_MARKER
from phijax.errors import UserError
from phijax.storage import atomic, strict_json
from phijax.storage.strict_json import Fields

FOLDER = "unfinished"
PLAN_FILE = "plan.json"
WORKERS_LOCK = "workers.lock"
TOKENIZER = "tokenizer"
VERSION = 2  # of plan.json, and of what units hold
_LINES = 8
_LONGEST = 1 << 28  # bytes of plan.json

Units = dict[int, tuple[Part, ...]]


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is to be made now. settings: what decides the shards besides the input; `by_size`: those of them that go
    with its size. parts: the input's, in order; `group` makes units of them."""

    settings: Mapping[str, Any]
    by_size: Sequence[str]
    files: Sequence[InputFile]
    parts: Sequence[Part]
    group: Callable[[list[Part]], Sequence[tuple[Part, ...]]]


def claim(output: pathlib.Path) -> pathlib.Path:
    """The folder to work in, made where it was not there. Raises: UserError for an output that is something else."""
    work = output / FOLDER
    if output.exists() and not output.is_dir():
        raise UserError(f"--output={output} is a file; it must be a folder, new or empty.")
    if output.exists() and not work.exists() and (other := sorted({path.name for path in output.iterdir()} - {FOLDER})):
        raise UserError(f"--output={output} is in use: it holds {other[0]}. Give a new or empty folder.")
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output={output} cannot be written: {error}") from error
    return work


def unit_file(work: pathlib.Path, number: int) -> pathlib.Path:
    return work / f"unit-{number:05d}"


def marker(output: pathlib.Path) -> pathlib.Path:
    """Where it stands a unit is done."""
    return output.with_suffix(".done.json")


def go_on(work: pathlib.Path, wanted: Wanted, say: Callable[[str], None]) -> Units:
    """Writes plan.json, after what was begun and is of no use any more is removed. Returns the units of all input.

    Raises: UserError for an output that other settings have begun.
    """
    path = work / PLAN_FILE
    inputs = {file.name: [file.bytes, epath.Path(file.path).stat().mtime] for file in wanted.files}
    before = _read(path) if path.exists() else _Begun(settings=None, by_size=(), inputs=inputs, named={}, next=0)
    if before.settings is not None:
        by_size = set(wanted.by_size) & set(before.by_size)
        settings = {key: value for key, value in wanted.settings.items() if key not in by_size}
        refuse(work.parent, settings_that_differ(before.settings, settings))
    changes = inputs_that_differ(before.inputs, inputs)
    begun = _units_of(before.named, wanted)
    units = {n: parts for n, parts in begun.items() if parts and not any(part.file.name in changes for part in parts)}
    kept = {(part.file.name, part.start) for parts in units.values() for part in parts}
    if changes:
        lines = [*changes.values()]
        more = [f"  and {len(lines) - _LINES} more"] if len(lines) > _LINES else []
        say("\n".join(["The input has changed since the last start:", *(f"  {x}" for x in lines[:_LINES]), *more]))
        done = sum(marker(unit_file(work, n)).exists() for n in units)
        say(f"Goes on with that; {done} of {len(units)} pieces of what is as it was are tokenized already.")
        if wanted.settings["tokenizer"]["trained"] and (work / TOKENIZER).exists():
            say("The tokenizer stays the one that was trained before the change.")
    new = wanted.group([part for part in wanted.parts if (part.file.name, part.start) not in kept])
    if new or len(units) < len(begun) or not begun:
        _remove_all_but(work, units)
    units |= {before.next + i: tuple(parts) for i, parts in enumerate(new)}
    named = {n: [[part.file.name, part.start, part.stop] for part in parts] for n, parts in units.items()}
    plan = {"version": VERSION, "settings": wanted.settings, "by_size": wanted.by_size, "inputs": inputs}
    atomic.write_bytes(path, json.dumps({**plan, "units": named, "next": before.next + len(new)}).encode())
    return units


def try_skipped_again(work: pathlib.Path, units: Units) -> None:
    """A file that could not be read may be readable by now: its unit counts as not done. Nobody else may be at work."""
    for number in units:
        done = marker(unit_file(work, number))
        if done.exists() and _skipped_some(done):
            done.unlink()
            _remove_shards(work)


def _skipped_some(done: pathlib.Path) -> bool:
    """What a damaged marker says is not known: its unit is done again."""
    try:
        said = strict_json.read(done, LONGEST_MARKER, half_characters=True)
        return bool(said.object("counts").object("skipped").values)
    except UserError:
        return True


def wait_for_workers(work: pathlib.Path) -> None:
    """Until those of a start that was killed have noticed it: what they still write would be nobody's to remove."""
    with open(work / WORKERS_LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)


def settings_that_differ(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    wanted = json.loads(json.dumps(now))
    return [
        f"{key}: {str(there.get(key))[:200]} there, {value} now"
        for key, value in wanted.items()
        if there.get(key) != value
    ]


def inputs_that_differ(there: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Name -> a line that says what is another. Args: name -> what tells a file from another one of its name."""
    lines = {name: f"input {name}: not there" for name in now.keys() - there.keys()}
    lines |= {name: f"input {name}: there, gone now" for name in there.keys() - now.keys()}
    lines |= {name: f"input {name}: changed" for name in now.keys() & there.keys() if now[name] != there[name]}
    return dict(sorted(lines.items()))


def refuse(output: pathlib.Path, lines: Sequence[str]) -> None:
    """Raises: UserError, where there are lines."""
    if lines:
        shown = "\n".join(f"  {line}" for line in sorted(lines)[:_LINES])
        raise UserError(
            f"{output} was made from something else:\n{shown}\nGive another --output, or delete that folder first."
        )


@dataclasses.dataclass(frozen=True)
class _Begun:
    """What plan.json says. named: number of a unit -> name, start and stop of each part."""

    settings: Mapping[str, Any] | None
    by_size: Sequence[str]
    inputs: Mapping[str, Any]
    named: Mapping[int, list[tuple[str, int, int]]]
    next: int


def _read(path: pathlib.Path) -> _Begun:
    """Raises: UserError for a plan.json that is damaged."""
    try:
        plan = strict_json.read(path, _LONGEST, half_characters=True)
        units = plan.object("units") if plan.integer("version", 0) == VERSION else Fields({}, plan.file)
        return _Begun(
            settings=plan.object("settings").values if plan.has("settings") else None,
            by_size=plan.texts("by_size", ()),
            inputs=plan.object("inputs").values,
            named=dict(_unit(units, number) for number in units.values),
            next=plan.integer("next", 0),
        )
    except UserError as error:
        raise UserError(f"{error}\nRemove {path.parent}, and start again.") from error


def _unit(units: Fields, number: str) -> tuple[int, list[tuple[str, int, int]]]:
    parts = units.items(number)
    whole = all(isinstance(part, list) and [type(value) for value in part] == [str, int, int] for part in parts)
    if not whole or not re.fullmatch("[0-9]{1,9}", number):
        raise units.refusal(number, "a number, and parts of files: a name, and where they begin and end")
    return int(number), [tuple(part) for part in parts]


def _units_of(begun: Mapping[int, list[tuple[str, int, int]]], wanted: Wanted) -> Units:
    """Those of plan.json; () for one whose parts are not in the input, or are cut otherwise, by now."""
    parts = {(part.file.name, part.start, part.stop): part for part in wanted.parts}
    found = {}
    for number, named in begun.items():
        of_unit = [parts.get(name) for name in named]
        found[number] = tuple(of_unit) if all(of_unit) else ()
    return found


def _remove_all_but(work: pathlib.Path, units: Units) -> None:
    """Units that are none of these any more, and shards, which are made out of all units."""
    files = {unit_file(work, number) for number in units}
    kept = files | {marker(file) for file in files}
    # Markers first: killed in between, nothing counts as done that is not there.
    for path in sorted(work.glob("unit-*"), key=lambda path: not path.name.endswith(".json")):
        if path not in kept and path.suffix != ".tmp":
            path.unlink()
    _remove_shards(work)


def _remove_shards(work: pathlib.Path) -> None:
    for path in work.glob("shard-*.done.json"):
        path.unlink()
    for folder in (work.parent, work.parent / "train", work.parent / "validation"):
        for path in folder.glob("shard-*-of-*.arrayrecord"):
            path.unlink()
