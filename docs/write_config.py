"""Writes docs/config.md, every key of a run's config, from the dataclasses that read it: python docs/write_config.py"""

import dataclasses
import inspect
import io
import pathlib
import tokenize
import typing
from collections.abc import Iterator
from typing import Any, Literal

from phijax.config import Config, keys

FILE = pathlib.Path(__file__).with_name("config.md")
HEAD = """# Every key of the config

There are {count} keys. This page is written by `python docs/write_config.py` from the dataclasses; a test
holds it current. An experiment file sets keys, as
`c.optimizer.learning_rate = 1e-3`; the command line overrides them, as `--config.optimizer.learning_rate=1e-3` or
`'--config.data.phases[0].steps=500'`. `[]` marks a list of records. An unknown key or a value of another type is
refused.
`phijax main --config=FILE --print_config` prints all of them with the values of an experiment.
"""


def text() -> str:
    """docs/config.md as it should be."""
    head = HEAD.replace("{count}", str(len(keys())))
    return head + "".join(_table(title, kind, prefix) for title, kind, prefix in _sections(Config, "", "A run"))


def _sections(kind: type, prefix: str, title: str) -> Iterator[tuple[str, type, str]]:
    """(title, dataclass, prefix of its keys), each before those within it."""
    yield title, kind, prefix
    for name, hint in typing.get_type_hints(kind).items():
        record = _record_of(hint)
        if dataclasses.is_dataclass(hint):
            yield from _sections(hint, f"{prefix}{name}.", f"`{prefix}{name}`")
        elif record:
            yield from _sections(record, f"{prefix}{name}[].", f"`{prefix}{name}[]`")


def _table(title: str, kind: type, prefix: str) -> str:
    said, hints = comments(kind), typing.get_type_hints(kind)
    rows = [
        f"| `{prefix}{field.name}` | {_type(hints[field.name])} | `{field.default!r}` | {_cell(said[field.name])} |\n"
        for field in dataclasses.fields(kind)
        if not dataclasses.is_dataclass(hints[field.name]) and not _record_of(hints[field.name])
    ]
    about = " ".join(inspect.getdoc(kind).split())
    about = "" if about.startswith("Section `") or kind is Config else f"{about}\n\n"
    return f"\n## {title}\n{about}| key | type | default | what it does |\n|---|---|---|---|\n{''.join(rows)}"


def comments(kind: type) -> dict[str, str]:
    """Field -> the comment at the end of its line, or the lines above it; the empty text where there is none."""
    out, above = {field.name: "" for field in dataclasses.fields(kind)}, ""
    for line in inspect.getsource(kind).splitlines():
        code, comment = _parted(line)
        name = code.split(":")[0].strip()
        if name in out:
            out[name] = comment or above
        above = f"{above} {comment}".strip() if comment and not code.strip() else ""
    return out


def _parted(line: str) -> tuple[str, str]:
    """Code and comment of a line; a mark inside a string begins no comment."""
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(line.strip()).readline))
    except (tokenize.TokenError, IndentationError):  # part of something longer, as of a docstring
        return line, ""
    comment = next((token.string for token in tokens if token.type == tokenize.COMMENT), "")
    return line.replace(comment, "") if comment else line, comment.lstrip("# ")


def _record_of(hint: Any) -> Any:
    return typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else None


def _type(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return ", ".join(f"`{value!r}`" for value in typing.get_args(hint))
    if options := typing.get_args(hint):
        return ", ".join(map(_type, options))
    return "`None`" if hint is type(None) else getattr(hint, "__name__", str(hint))


def _cell(comment: str) -> str:
    return comment.replace("|", "\\|")


if __name__ == "__main__":
    FILE.write_text(text())
    print(f"wrote {FILE}")
