"""Texts, and what runs preparations of them and reads what they left."""

import pathlib
import pydoc_data.topics

import pytest

from phijax.curation.preparation import make_plan, prepare

CHAPTERS = [text[:2000] for _, text in sorted(pydoc_data.topics.topics.items())][:60]
OTHERS = [
    "你好，世界。" * 20,
    "🎉👨‍👩‍👧 emoji\r\nand CRLF\r\n",
    "<|endoftext|> is only text here",
    "Привет, мир! " * 30,
]


def silent(doing, total, results):
    return results


def run(request, workers=1):
    return prepare(make_plan(request), workers, silent)


def contents(folder):
    folder = pathlib.Path(folder)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def leave_unfinished(request):
    def stop(doing, total, results):
        if doing == "writing shards":
            raise InterruptedError
        return results

    with pytest.raises(InterruptedError):
        prepare(make_plan(request), 1, stop)
