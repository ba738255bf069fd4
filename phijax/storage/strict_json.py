"""JSON that anybody may have written: bounded before it is parsed, then asked for fields of a type and a range.

Python's parser takes NaN, whole numbers of any length, a key twice (the last one wins) and UTF-16; here none of them is
taken. Every refusal has one form: the file, the place in it, what stands there, what was expected.
"""

import dataclasses
import itertools
import json
import math
import re
import reprlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from etils import epath

from phijax.errors import UserError
from phijax.storage.regular_files import LONGEST, read_bounded

LARGEST = (1 << 31) - 1  # of a whole number, where a reader does not say otherwise: what an int32 holds
_DEEPEST = 32  # objects and lists inside each other; tokenizer.json has 8
_MOST_DIGITS = 40  # tokenizer_config.json of half the models has a model_max_length of 10^30
_SHOWN = 60  # characters of what stands in a file
_TOLD = 300  # characters of what a library says

_BRACKETS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_OTHERS = bytes(set(range(256)) - set(_BRACKETS))
_HALF_CHARACTER = re.compile(rb"\\u[dD][89a-fA-F]")

D = TypeVar("D")


class _Required:
    """The default of a field that must be there."""


_REQUIRED: Any = _Required()


def read(path: epath.PathLike, longest: int = LONGEST, **taken: bool) -> "Fields":
    """A file that holds one object of JSON; `taken` as of `parse`. Raises: UserError as `read_bounded` and `parse`."""
    path = epath.Path(path)
    return parse(read_bounded(path, longest), str(path), **taken)


def read_if_there(path: epath.Path, longest: int = LONGEST) -> "Fields":
    """As `read`; no fields at all where there is no such file."""
    return read(path, longest) if path.exists() else Fields({}, str(path))


def read_text(path: epath.Path, longest: int = LONGEST) -> str:
    """Text in UTF-8. Raises: UserError as `read_bounded`, and for what is none."""
    try:
        return read_bounded(path, longest).decode()
    except UnicodeError as error:
        raise UserError(f"{path} is not text in UTF-8: {error.reason}.") from error


def parse(data: bytes, file: str, **taken: bool) -> "Fields":
    """One object of JSON in UTF-8, a byte order mark before it or not.

    Args: taken: as of `parse_value`.
    Raises: UserError, naming `file`, for what is not JSON, holds a key twice, NaN or infinity, a number that float64
      does not hold or a half of a character, or nests deeper than any file does.
    """
    value = parse_value(data, file, **taken)
    if not isinstance(value, dict):
        raise UserError(f"{file} must hold one object of names and values, but holds {shown(value)}.")
    return Fields(value, file)


def parse_value(data: bytes, file: str, *, not_finite: bool = False, half_characters: bool = False) -> Any:
    """As `parse`, of a value of any type.

    Args:
      not_finite: Python's NaN and Infinity are read, as losses in files of ours have them; `number` refuses them.
      half_characters: those are read that files of ours have for names of files that are not UTF-8.
    """
    _refuse_depth(data, file)
    try:
        value = json.loads(
            data.decode("utf-8-sig"),  # editors put a byte order mark first
            object_pairs_hook=_without_repeats,
            parse_constant=float if not_finite else _no_number,
            parse_float=_decimal,
            parse_int=_whole,
        )
        if not half_characters and _HALF_CHARACTER.search(data):
            # Two of them make a character; one alone cannot be written to any file.
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeError as error:
        raise UserError(f"{file} is not JSON in UTF-8: {error.reason}.") from error
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from error
    return value


def _refuse_depth(data: bytes, file: str) -> None:
    """Before the parser, which calls itself for each level."""
    outside = data.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')[::2]  # of texts
    brackets = b"".join(outside).translate(None, _OTHERS)
    if any(depth > _DEEPEST for depth in itertools.accumulate(map(_BRACKETS.__getitem__, brackets))):
        raise UserError(f"{file} is not read: it has more than {_DEEPEST} objects and lists inside each other.")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{shown(twice)} stands twice in one object")
    return table


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


def _decimal(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {_cut(text)} is too large")
    return value


def _whole(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"the number {_cut(text)} has {len(text):,} digits")
    return int(text)


def shown(value: Any) -> str:
    """What stands in a file, for a message: at most 60 characters, none that moves a terminal's cursor."""
    # Of a large value only the beginning is put into words: a refusal must not take longer than reading did.
    return _cut(repr(value[: _SHOWN + 1]) if isinstance(value, str) else reprlib.repr(value))


def named(field: str) -> str:
    """The name of a field, for a message."""
    return _cut(printable(field))


def told(words: Any) -> str:
    """What a library says, for a message: it may quote a file."""
    return _cut(printable(str(words).replace("\n", " ")), _TOLD)


def printable(text: str) -> str:
    """As it is, or escaped where some of it moves a terminal's cursor or has no UTF-8."""
    return text if text.isprintable() else ascii(text)


def _cut(text: str, most: int = _SHOWN) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


@dataclasses.dataclass(frozen=True)
class Fields:
    """An object of a file, asked field by field. A field that is null counts as one that is not there.

    A field that is not there gives the `default`, unchecked; without a default it is refused, as is a value of another
    type or out of range: UserError, naming the file, the place (`rope.factors[3]`), the value and what it must be.
    True is no number, and a number is no text.

    file: what messages call the file. place: where the object stands in it, "" for the outermost.
    """

    values: Mapping[str, Any]
    file: str
    place: str = ""

    def integer(self, name: str, default: D = _REQUIRED, *, least: int = 0, most: int = LARGEST) -> int | D:
        return self._one(name, default, *_integer(least, most))

    def number(
        self, name: str, default: D = _REQUIRED, *, above: float = -math.inf, least: float = -math.inf
    ) -> float | D:
        """A finite number, > above and >= least."""
        value = self._one(name, default, *_number(above, least))
        return float(value) if type(value) is int else value

    def text(self, name: str, default: D = _REQUIRED) -> str | D:
        return self._one(name, default, *_TEXT)

    def boolean(self, name: str, default: D = _REQUIRED) -> bool | D:
        return self._one(name, default, *_BOOLEAN)

    def integers(self, name: str, default: D = _REQUIRED, *, least: int = 0, most: int = LARGEST) -> list[int] | D:
        return self._list(name, default, *_integer(least, most))

    def numbers(
        self, name: str, default: D = _REQUIRED, *, above: float = -math.inf, least: float = -math.inf
    ) -> list[float] | D:
        found = self._list(name, default, *_number(above, least))
        return list(map(float, found)) if self.has(name) else found

    def texts(self, name: str, default: D = _REQUIRED) -> list[str] | D:
        return self._list(name, default, *_TEXT)

    def object(self, name: str, default: D = _REQUIRED) -> "Fields | D":
        """An object inside this one; of the default {} an empty one."""
        found = self._one(name, default, *_OBJECT)
        return Fields(found, self.file, self._at(name)) if isinstance(found, Mapping) else found

    def items(self, name: str, default: D = _REQUIRED) -> list[Any] | D:
        """Of anything: for a reader that looks at each item itself."""
        return self._one(name, default, "a list", _is_list)

    def objects(self, name: str, default: D = _REQUIRED) -> "list[Fields] | D":
        """A list of objects."""
        found = self._list(name, default, *_OBJECT)
        if not self.has(name):
            return found
        return [Fields(each, self.file, f"{self._at(name)}[{i}]") for i, each in enumerate(found)]

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def only(self, *names: str) -> "Fields":
        """Itself. Raises: UserError for a field that is none of `names`."""
        if unknown := [name for name in self.values if name not in names]:
            raise UserError(f"{self.file}: {self._at(unknown[0])} is not known; there are {', '.join(names)}.")
        return self

    def refusal(self, name: str, expected: str) -> UserError:
        """For a rule of the reader's own: `expected` as in "NAME=VALUE must be EXPECTED."."""
        return self._refusal(self._at(name), self.values.get(name), expected)

    def _one(self, name: str, default: Any, expected: str, holds: Callable[[Any], bool]) -> Any:
        value = self.values.get(name)
        if value is None:
            if default is _REQUIRED:
                raise UserError(f"{self.file}: {self._at(name)} is missing; it must be {expected}.")
            return default
        if not holds(value):
            raise self.refusal(name, expected)
        return value

    def _list(self, name: str, default: Any, expected: str, holds: Callable[[Any], bool]) -> Any:
        whole = self._one(name, default, f"a list, each {expected}", _is_list)
        if self.has(name):
            for i, value in enumerate(whole):
                if not holds(value):
                    raise self._refusal(f"{self._at(name)}[{i}]", value, expected)
        return whole

    def _refusal(self, at: str, value: Any, expected: str) -> UserError:
        return UserError(f"{self.file}: {at}={shown(value)} must be {expected}.")

    def _at(self, name: str) -> str:
        return f"{self.place}.{named(name)}" if self.place else named(name)


def _integer(least: int, most: int) -> tuple[str, Callable[[Any], bool]]:
    return f"a whole number from {least:,} to {most:,}", lambda value: type(value) is int and least <= value <= most


def _number(above: float, least: float) -> tuple[str, Callable[[Any], bool]]:
    bounds = [f"above {above:g}"] * (above > -math.inf) + [f"of at least {least:g}"] * (least > -math.inf)

    def holds(value: Any) -> bool:
        # Compared as they are: float() of a whole number of 400 digits is an OverflowError.
        finite = type(value) in (int, float) and abs(value) <= sys.float_info.max
        return finite and value > above and value >= least

    return " ".join(["a finite number", *bounds]), holds


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)  # a tuple of what has not been through a file yet


_TEXT = "text", lambda value: isinstance(value, str)
_BOOLEAN = "true or false", lambda value: isinstance(value, bool)
_OBJECT = "an object of names and values", lambda value: isinstance(value, Mapping)
