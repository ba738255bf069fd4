"""What was kept and what was not, and where: counted part by part, added up over units, the same however it was run."""

import bisect
import codecs
import collections
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from etils import epath

from phijax.curation.documents import Document, InputFile, Part

FIRST = 100  # documents of each reason whose line is kept; of all others the file
_NAMED = 3  # files in a message


class OfPart:
    """One part's counts; it takes `Document.line`s, which count from the beginning of the part."""

    def __init__(self):
        self.counts = collections.Counter(read=0, train=0, validation=0, tokens=0, unknown_tokens=0)
        self.lines = 0
        self.dropped: collections.Counter[str] = collections.Counter()
        self.first: dict[str, list[int]] = {}

    def saw_line(self) -> None:
        self.lines += 1

    def keep(self, split: str, tokens: int, unknown: int) -> None:
        self.counts.update({"read": 1, split: 1, "tokens": tokens, "unknown_tokens": unknown})

    def drop(self, document: Document) -> None:
        self.counts["read"] += 1
        self.dropped[document.dropped] += 1
        if self.dropped[document.dropped] <= FIRST:
            self.first.setdefault(document.dropped, []).append(document.line)


class Found:
    """One unit's: what its marker says. `skipped`: files that could not be read, and why."""

    def __init__(self):
        self.skipped: dict[str, str] = {}
        self._counts = OfPart().counts
        self._files: dict[str, collections.Counter[str]] = {}
        self._first: dict[str, list[tuple[str, int, int]]] = {}
        self._lines: list[tuple[str, int, int]] = []

    def add(self, part: Part, found: OfPart) -> None:
        name = part.file.name
        self._counts.update(found.counts)
        for reason, count in found.dropped.items():
            self._files.setdefault(reason, collections.Counter())[name] += count
            first = self._first.setdefault(reason, [])
            first += [(name, part.start, line) for line in found.first[reason]][: FIRST - len(first)]
        if part.stop < part.file.bytes:  # lines of later parts of the file are counted from the end of this one
            self._lines.append((name, part.start, found.lines))

    def to_json(self) -> dict[str, Any]:
        listed = {"files": self._files, "first": self._first, "lines": self._lines, "skipped": self.skipped}
        return {"counts": self._counts, **listed}


@dataclasses.dataclass(frozen=True)
class Total:
    """Of all units. places: reason -> "first": [{"file", "line"}], by name and line; "files": {name: how many}."""

    counts: dict[str, int]
    dropped: dict[str, int]
    places: dict[str, dict[str, Any]]
    skipped: dict[str, str]


def merged(units: Iterable[dict[str, Any]]) -> Total:
    """`Found.to_json` of all units, in any order."""
    counts, skipped = OfPart().counts, {}
    files: dict[str, collections.Counter[str]] = {}
    first: dict[str, list[tuple[str, int, int]]] = {}
    lines: dict[str, list[tuple[int, int]]] = {}
    for unit in units:
        counts.update(unit["counts"])
        skipped |= unit["skipped"]
        for reason, found in unit["files"].items():
            files.setdefault(reason, collections.Counter()).update(found)
            first[reason] = sorted([*first.get(reason, ()), *map(tuple, unit["first"][reason])])[:FIRST]
        for name, start, count in unit["lines"]:
            lines.setdefault(name, []).append((start, count))
    places = {
        reason: {
            "first": [_place(name, start, line, lines.get(name, ())) for name, start, line in first[reason]],
            "files": dict(sorted(files[reason].items())),
        }
        for reason in sorted(files)
    }
    dropped = {reason: files[reason].total() for reason in sorted(files)}
    return Total(dict(counts), dropped, places, dict(sorted(skipped.items())))


def said(places: dict[str, dict[str, Any]], reason: str) -> str:
    """Where the first documents of a reason lie, for people; "" where it is not known, as in older manifests."""
    if reason not in places:
        return ""
    first, files = places[reason]["first"][0], len(places[reason]["files"])
    line = f":{first['line']}" if first.get("line") else ""
    return f"{first['file']}{line}" + (f" and {files - 1} other file{'s' * (files > 2)}" if files > 1 else "")


def why_none(total: Total, files: Iterable[InputFile]) -> list[str]:
    """Why nothing of the input can be used, in lines: reasons, the most frequent first, with files."""
    lines, paths = [], {file.name: file.path for file in files}
    for reason, count in sorted(total.dropped.items(), key=lambda item: -item[1]):
        names = list(total.places[reason]["files"])
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        lines.append(f"{count} dropped: {reason}, in {', '.join(names[:_NAMED])}{more}")
        for path in (paths[name] for name in names[:_NAMED] if reason == "not UTF-8" and _is_utf_16(paths[name])):
            lines.append(f"  {path} is UTF-16. Make UTF-8 of it: iconv -f UTF-16 -t UTF-8 {path} > NEW_FILE")
    return [*lines, *(f"skipped: {name} {why}" for name, why in list(total.skipped.items())[:_NAMED])]


def _is_utf_16(path: str) -> bool:
    with epath.Path(path).open("rb") as file:
        return file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def _place(name: str, start: int, line: int, of_parts: Sequence[tuple[int, int]]) -> dict[str, Any]:
    if not line:
        return {"file": name}
    before = sorted(of_parts)
    return {"file": name, "line": line + sum(n for _, n in before[: bisect.bisect_left(before, (start, 0))])}
