"""Files changed by chance, by their structure and by their bytes, and opened in forked children under limits.

What happens to each is one of: it opens; it is refused by one message; or it fails, which is a bug: another error, a
message that names no file, more than 2 s of processor time or 500 MB, something left behind. Change number N of a file
depends on the seed and N alone.
"""

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import re
import resource
import signal
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from phijax.errors import UserError

SECONDS, BYTES = 2, 500 << 20
WALL = 30  # seconds for one change: what waits takes no processor time
_RAW = "\x00raw\x00"  # stands for JSON that Python does not write

# What fields are set to, as it stands in a file.
_NUMBERS = "0 1 -1 2 7 1.5 -0.0 1e308 -1e308 1e-320 1e400 NaN Infinity -Infinity 2147483647 2147483648 4294967296"
_OTHERS = r"""null true false 9223372036854775807 18446744073709551616 [] {} [1] [[]] [null] {"a":1} {"a":{}} "" "x" "1"
"NaN" "true" "../../etc/passwd" "/dev/zero" "\u0000" "\ud800" "\u001b[2J" "\u202e" "\n" {"a":1,"a":1}"""
VALUES = [
    *_NUMBERS.split(),
    *_OTHERS.split(),
    "1" + "0" * 400,
    "-" + "9" * 5000,
    "[" * 200_000 + "]" * 200_000,
    '{"a":' * 200_000 + "1" + "}" * 200_000,
    '"' + "x" * 100_000 + '"',
    "[0" + ",0" * 10_000 + "]",
]
_EXTREMES = (0, 1, 2, 127, 128, 255, 1 << 15, 1 << 16, *((1 << n) - m for n in (31, 32, 62, 63, 64) for m in (0, 1)))


@dataclasses.dataclass(frozen=True)
class Reader:
    """Who reads a file, and how the file is made.

    file: the one that is changed. open: what is done with it; given the file's path, UserError refuses it.
    shape: how its structure is changed: "json", "lines" (of JSON), "text" (lines of any), "bits", "safetensors",
      "gguf".
    seal: makes a changed text whole again, where a digest would give every change away.
    """

    file: pathlib.Path
    open: Callable[[pathlib.Path], Any]
    shape: str = "json"
    seal: Callable[[bytes], bytes] | None = None


@dataclasses.dataclass
class Counts:
    """failed: number of a change -> what happened."""

    opened: int = 0
    refused: int = 0
    failed: dict[int, str] = dataclasses.field(default_factory=dict)


def attack(reader: Reader, seed: int, first: int, count: int) -> Counts:
    """Changes `first` to `first` + `count`, in children of this process, one by one. The file is put back."""
    original = reader.file.read_bytes()
    counts, number = Counts(), first
    ((unchanged, said),) = _in_child(reader, original, seed, [None])
    if unchanged != "opened":
        raise RuntimeError(f"{reader.file}, as it was, does not open: {said}")
    try:
        while number < first + count:
            for outcome, said in _in_child(reader, original, seed, range(number, first + count)):
                counts.opened += outcome == "opened"
                counts.refused += outcome == "refused"
                if outcome == "failed":
                    counts.failed[number] = said
                number += 1
    finally:
        reader.file.write_bytes(original)
    return counts


def _in_child(reader: Reader, original: bytes, seed: int, numbers: Sequence[int | None]) -> Iterator[tuple[str, str]]:
    """Outcomes of the changes, in order, up to the first that ended the child, which is an outcome too."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ours)
        _try_all(reader, original, seed, numbers, theirs)
    os.close(theirs)
    with os.fdopen(ours, "rb") as answers:
        done = 0
        for line in answers:
            done += 1
            yield tuple(json.loads(line))
    _, status = os.waitpid(child, 0)
    if done < len(numbers):
        code = os.waitstatus_to_exitcode(status)
        yield "failed", f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def _try_all(reader: Reader, original: bytes, seed: int, numbers: Sequence[int | None], answers: int) -> None:
    """In the child. Never returns. None among the numbers is the file as it was."""
    try:
        for stream in (0, 1, 2):
            os.dup2(os.open(os.devnull, os.O_RDWR), stream)
        used = int(re.search(r"VmSize:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1]) << 10
        resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        warnings.simplefilter("ignore")
        before = _listing(reader.file.parent)
        for number in numbers:
            chance = random.Random(f"{seed} {reader.file.name} {number}")
            reader.file.write_bytes(original if number is None else changed(original, reader, chance))
            spent = resource.getrusage(resource.RUSAGE_SELF)
            limit = int(spent.ru_utime + spent.ru_stime) + 1 + SECONDS
            resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
            signal.alarm(WALL)
            outcome = _outcome(reader)
            signal.alarm(0)
            if left := _listing(reader.file.parent) - before:
                outcome = ("failed", f"left behind: {sorted(left)[:3]}")
                before |= left
            os.write(answers, json.dumps(outcome).encode() + b"\n")
    finally:
        os._exit(0)


def _listing(folder: pathlib.Path) -> set[str]:
    return {os.path.join(at, name) for at, folders, files in os.walk(folder) for name in (*folders, *files)}


def _outcome(reader: Reader) -> tuple[str, str]:
    try:
        reader.open(reader.file)
    except UserError as error:
        said = str(error)
        known = any(name in said for name in reader.file.parts[-3:])
        bad = [c for c in said if not c.isprintable() and c != "\n"]
        if not known or bad or len(said) > 4000 or "Traceback" in said:
            return "failed", f"a message that is none: {said[:300]!r}"
        return "refused", said
    except BaseException as error:
        at = error.__traceback__
        while at.tb_next is not None:
            at = at.tb_next
        where = f"{os.path.basename(at.tb_frame.f_code.co_filename)}:{at.tb_lineno}"
        return "failed", f"{type(error).__name__}: {str(error)[:200]} ({where})"
    return "opened", ""


def changed(data: bytes, reader: Reader, chance: random.Random) -> bytes:
    """The file with one change, now and then with some."""
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        if chance.random() < 0.25:
            data = _bytes_changed(data, chance)
        else:
            data = _SHAPES[reader.shape](data, chance)
    if reader.seal is not None and chance.random() < 0.8:
        with contextlib.suppress(ValueError, RecursionError, AttributeError):
            data = reader.seal(data)
    return data


def _bytes_changed(data: bytes, chance: random.Random) -> bytes:
    """Bits flipped, cut off, a part left out or there twice."""
    at = chance.randrange(len(data) + 1) if chance.random() < 0.5 else chance.randrange(min(len(data), 200) + 1)
    size = chance.choice((1, 1, 2, 8, 64, 1000))
    kind = chance.randrange(5)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + data[at + size :]
    if kind == 2:
        return data[:at] + data[at : at + size] * 2 + data[at + size :]
    if kind == 3:
        return data[:at] + chance.randbytes(size) + data[at:]
    flipped = bytearray(data)
    if at < len(data):
        flipped[at] ^= 1 << chance.randrange(8)
    return bytes(flipped)


def _bit_flipped(data: bytes, chance: random.Random) -> bytes:
    """Half of them in the last eighth, where a tokenizer.model has its words; half of them what makes it no ASCII."""
    if not data:
        return data
    at = chance.randrange(len(data)) if chance.random() < 0.5 else len(data) - 1 - chance.randrange(len(data) // 8 + 1)
    flipped = bytearray(data)
    flipped[at] ^= 1 << (7 if chance.random() < 0.5 else chance.randrange(8))
    return bytes(flipped)


def _json_changed(data: bytes, chance: random.Random) -> bytes:
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return _bytes_changed(data, chance)
    places = [(tree, key) for key in (tree if isinstance(tree, dict) else ())]
    # Objects in turn, so that a vocabulary of thousands does not take all changes for itself.
    for holder, key in places:
        inner = holder[key]
        if isinstance(inner, dict | list) and len(places) < 2000:
            places += [(inner, k) for k in (list(inner) if isinstance(inner, dict) else range(len(inner)))[:40]]
    if not places:
        return _bytes_changed(data, chance)
    holder, key = chance.choice(places)
    kind, raw = chance.randrange(10), chance.choice(VALUES)
    if kind < 6:
        holder[key] = _RAW
    elif kind == 6:
        del holder[key]
    elif kind == 7:
        holder[key] = [holder[key]]
    elif kind == 8:
        other, place = chance.choice(places)
        with contextlib.suppress(IndexError, KeyError, TypeError):
            holder[key], other[place] = other[place], holder[key]
    elif isinstance(holder, dict):  # the key a second time, or one that nobody knows
        holder[f"{_RAW}{key}" if chance.random() < 0.5 else f"{key}x"] = holder[key]
    try:
        text = json.dumps(tree)
    except (ValueError, RecursionError):  # a value that was put into itself
        return _bytes_changed(data, chance)
    escaped = json.dumps(_RAW)[1:-1]
    return text.replace(f'"{escaped}"', raw).replace(escaped, "").encode("utf-8", "surrogatepass")


def _lines_changed(data: bytes, chance: random.Random) -> bytes:
    lines = data.split(b"\n")
    number = chance.randrange(len(lines))
    return b"\n".join([*lines[:number], _json_changed(lines[number], chance), *lines[number + 1 :]])


def _safetensors_changed(data: bytes, chance: random.Random) -> bytes:
    """The header as JSON, its length made to fit or not."""
    length = int.from_bytes(data[:8], "little")
    header = _json_changed(data[8 : 8 + length], chance)
    said = len(header) if chance.random() < 0.8 else chance.choice((*_EXTREMES, len(header) + 1))
    return (said % (1 << 64)).to_bytes(8, "little") + header + data[8 + length :]


def _gguf_changed(data: bytes, chance: random.Random) -> bytes:
    """A number in the header, mostly one behind the name of a key, is another; types, counts, lengths are such."""
    names = [match.end() for match in re.finditer(rb"[a-z0-9_]+(\.[a-z0-9_]+)+", data[: 1 << 16])]
    at = chance.choice(names or [0]) + chance.choice((0, 4, 8, 12)) if chance.random() < 0.7 else chance.randrange(4096)
    form = chance.choice("<B <H <I <Q <f <d".split())
    if form in ("<f", "<d"):
        value = chance.choice((float("nan"), float("inf"), -1.0, 0.0, 1e-38, 3e38))
    else:
        value = chance.choice(_EXTREMES) % (1 << 8 * struct.calcsize(form))
    written = struct.pack(form, value)
    return data[:at] + written + data[at + len(written) :]


def _text_changed(data: bytes, chance: random.Random) -> bytes:
    """A line more, or another one; now and then of characters that move a cursor."""
    lines, at = data.split(b"\n"), chance.randrange(data.count(b"\n") + 1)
    new = chance.choice(
        (b"", b"a", b"a b c", b"\xe2\x80\xae a", b"\x1b[2J x", b"\x00 \x00", b"x" * 100_000, chance.choice(lines))
    )
    return b"\n".join([*lines[:at], new, *lines[at + chance.randrange(2) :]])


_SHAPES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "json": _json_changed,
    "lines": _lines_changed,
    "text": _text_changed,
    "bits": _bit_flipped,
    "safetensors": _safetensors_changed,
    "gguf": _gguf_changed,
}


def table(found: dict[str, Counts]) -> str:
    """For people and docs/reliability.md."""
    lines = ["| file | opened | refused by a message | failed |", "| --- | --- | --- | --- |"]
    lines += [f"| {name} | {c.opened:,} | {c.refused:,} | {len(c.failed)} |" for name, c in found.items()]
    return "\n".join(lines)


def failures(found: dict[str, Counts], most: int = 20) -> str:
    """The kinds, each with the number of one change."""
    kinds: dict[tuple[str, str], list[int]] = collections.defaultdict(list)
    for name, counts in found.items():
        for number, said in counts.failed.items():
            kinds[name, said].append(number)
    return "\n".join(f"{name}: {said} (changes {numbers[:5]})" for (name, said), numbers in list(kinds.items())[:most])
