"""What is generated into docs/ is current, and says something of each key."""

import dataclasses
import importlib.util
import pathlib
import sys

from phijax import config

DOCS = pathlib.Path(__file__).parent.parent / "docs"


def _writer():
    spec = importlib.util.spec_from_file_location("write_config", DOCS / "write_config.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_docs_of_the_config_are_current():
    assert (DOCS / "config.md").read_text() == _writer().text(), f"run {sys.executable} docs/write_config.py"


def test_each_key_has_its_row_and_says_what_it_does():
    rows = [line for line in _writer().text().splitlines() if line.startswith("| `")]
    assert sorted(row.split("`")[1] for row in rows) == sorted(config.keys())
    assert [row for row in rows if row.endswith("|  |")] == []


@dataclasses.dataclass(frozen=True)
class Example:
    """Two fields."""

    first: str = "#"  # a mark
    # Above its field.
    second: int = 1


def test_a_comment_stands_at_the_end_of_its_field_or_above_it():
    assert _writer().comments(Example) == {"first": "a mark", "second": "Above its field."}
