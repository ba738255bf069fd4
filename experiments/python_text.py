"""Real text that every CPython carries, nothing downloaded: python experiments/python_text.py --output=DIR

Some 2.2 MB of English prose: chapters of the language reference, and the docstrings of the standard library, written
to DIR/python_text.jsonl, a chapter or a module a document. For `python -m phijax.prepare --input=DIR`.
"""

import ast
import inspect
import json
import pathlib
import sysconfig
from collections.abc import Iterator

from absl import flags

from phijax import command
from phijax.errors import UserError

FLAGS = flags.FlagValues()
flags.DEFINE_string("output", None, "folder to write python_text.jsonl into", flag_values=FLAGS)

# Tests have docstrings for test runners, site-packages are not Python's, the rest is data or another tool's.
_NOT_READ = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data"}
_FEWEST_CHARACTERS = 200  # a module with less says nothing


def main(arguments: list[str]) -> None:
    if arguments or not FLAGS.output:
        raise UserError("Usage: python experiments/python_text.py --output=DIR")
    folder = pathlib.Path(FLAGS.output)
    folder.mkdir(parents=True, exist_ok=True)
    documents = [*chapters(), *modules(pathlib.Path(sysconfig.get_path("stdlib")))]
    path = folder / "python_text.jsonl"
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    print(f"{path}: {len(documents)} documents, {sum(len(document['text']) for document in documents):,} characters")


def chapters() -> Iterator[dict[str, str]]:
    """Chapters of the language reference, as `help()` shows them."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError("This Python comes without pydoc_data.topics; take one from python.org or conda.") from error
    for name in sorted(topics):
        yield {"id": f"topic/{name}", "text": topics[name].strip() + "\n"}


def modules(library: pathlib.Path) -> Iterator[dict[str, str]]:
    """The docstrings of each module of the standard library, each under the name of what it describes."""
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if _NOT_READ.isdisjoint(relative.parts):
            name = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
            text = "\n\n".join(f"{title}\n\n{text}" for title, text in _docstrings(path, name))
            if len(text) >= _FEWEST_CHARACTERS:
                yield {"id": f"module/{name}", "text": text + "\n"}


def _docstrings(path: pathlib.Path, module: str) -> Iterator[tuple[str, str]]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return  # some files are there to be wrong
    yield from _docstrings_below(tree, module)


def _docstrings_below(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        if text := ast.get_docstring(node, clean=False):
            yield name, inspect.cleandoc(text)
        for child in node.body:
            yield from _docstrings_below(child, f"{name}.{getattr(child, 'name', '')}")


if __name__ == "__main__":
    command.run(main, FLAGS)
