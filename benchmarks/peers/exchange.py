"""What a peer is handed and hands back: a folder with cases.json; imports nothing that a peer's environment may lack.

cases.json: name -> {"model": a Hugging Face folder beside it, "kind", "tokens", "start", "documents", "answer"}. A case
is answered by float32 logits in the file `answer`.npy, or by a reason in `answer`.txt.
"""

import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """kind: "text", logits (T, V) of one forward pass; "row", the same of documents that share a row; "decode", logits
    (T - start, V) of the steps of cached decoding that are given tokens[start:], whatever they would choose themselves.
    """

    model: str
    kind: str
    tokens: list[int]
    answer: str
    start: int = 0
    documents: tuple[int, ...] = ()

    def ids(self) -> np.ndarray:
        return np.array([self.tokens], np.int32)

    def positions(self) -> np.ndarray:
        """(1, T), from 0 in every document."""
        return np.concatenate([np.arange(n, dtype=np.int32) for n in self.documents])[None]

    def segments(self) -> np.ndarray:
        """(1, T), the number of the document."""
        return np.repeat(np.arange(len(self.documents), dtype=np.int32), self.documents)[None]


class NotPossible(Exception):
    """The peer has no way to do this; the message says why, in a few words."""


def write_cases(folder: pathlib.Path, cases: dict[str, Case]) -> None:
    (folder / "cases.json").write_text(json.dumps({name: dataclasses.asdict(case) for name, case in cases.items()}))


def serve(load: Callable, answers: dict[str, Callable[[object, Case], np.ndarray]]) -> None:
    """Answers every case of the folder that the command line names: answers[kind](load(model's folder), case)."""
    folder = pathlib.Path(sys.argv[1])
    load = functools.lru_cache(maxsize=None)(load)
    for name, fields in json.loads((folder / "cases.json").read_text()).items():
        case = Case(**fields)
        answer = folder / case.answer
        try:
            logits = answers[case.kind](load(str(folder / case.model)), case)
            np.save(answer.with_suffix(".npy"), np.asarray(logits, np.float32))
        except NotPossible as error:
            answer.with_suffix(".txt").write_text(str(error))
        except Exception as error:  # a peer may fail in any way, which is a result too
            first = (str(error).strip() or "no message").splitlines()[0]
            answer.with_suffix(".txt").write_text(f"{type(error).__name__}: {first}")
        print(name, flush=True)
