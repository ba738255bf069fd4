"""What is generated into docs/ is current, and says something of each key."""

import ast
import dataclasses
import doctest
import importlib.util
import pathlib
import re
import sys

from saved_run import save_run

from phijax import config
from phijax.model.presets import PRESETS
from phijax.text.train_tokenizer import train_tokenizer

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


def test_each_place_of_the_tour_exists():
    places = re.findall(r"`(phijax/[\w/]+\.py)(?::([\w.]+))?`", (DOCS / "tour.md").read_text())
    assert len(places) > 40
    for file, name in places:
        names = _defined(ast.parse((DOCS.parent / file).read_text()))
        assert not name or name in names, f"{file} has no {name}"


def _defined(module: ast.Module) -> set[str]:
    """Functions, classes, methods as Class.method, and constants of a module."""
    out = set()
    for node in module.body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            out |= {t.id for t in (node.targets if isinstance(node, ast.Assign) else [node.target])}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            out.add(node.name)
            out |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return out


def test_the_page_of_python_runs_as_it_stands(tmp_path, monkeypatch):
    """On a run with start weights: what they say means nothing, what is shown holds of any."""
    monkeypatch.chdir(tmp_path)
    text = (DOCS.parent / "WORKSPACE.md").read_text()
    model = dataclasses.replace(PRESETS["tiny"], vocab_size=2048)
    save_run(tmp_path / "build" / "tiny", model, train_tokenizer([text], 2048))
    page = doctest.DocTestParser().get_doctest((DOCS / "python.md").read_text(), {}, "python.md", None, 0)
    said = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(page, out=said.append)
    assert result.attempted > 10 and not result.failed, "".join(said)
