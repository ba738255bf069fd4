"""A tokenizer.json by a stranger is first read, and made to encode, in a child: it can abort the library's process."""

import functools
import hashlib
from collections.abc import Collection, Mapping
from typing import Any

from phijax.errors import UserError
from phijax.storage.strict_json import told
from phijax.text import limited_child
from phijax.text.tokenizer_bounds import patterns_of

# Beyond what a file of its size needs: 200,000 tokens in 10 million bytes take 0.7 s and 130 MB.
_SECONDS, _SECONDS_A_MEGABYTE = 1, 1
_BYTES, _BYTES_A_BYTE = 128 << 20, 32

_TEXTS = (
    "",
    " \t\n\r\n\u00a0\u2028\u3000 ",
    "It's they'LL 1234567890 3.14159 x_y-z (a) [b] {c} <d> | ~ ^ \\ / ... !!! ???",
    "Gr\u00f6\u00dfe e\u0301 \ufb01 \uff26 \ufdfa \u0130 \u03a9 \u4f60\u597d \u0639 \u0928\u092e \U0001f468\u200d",
    "\x00\x01\x1b\x7f\ufeff\u200b\ufffd\U0010ffff",
)
_RUN = 500  # characters: bombs of nested repetitions need 30, those of cubic time some hundred
_RUNS_OF = "a0 \n.A\u4e00\u044f\u03b1\u0639\u0928\u00e9\U0001f642"
_MOST_RUNS = 64  # of characters that patterns name


def require_harmless(text: str, spec: Mapping[str, Any], where: str) -> None:
    """Raises: UserError where the library ends its process over `text`, or takes time or memory that no file needs.

    What held is remembered by its digest, so that a process pays once.

    Args: spec: what the text stands for, checked (`tokenizer_bounds`).
    """
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    if digest in _survived():
        return
    seconds, size = _SECONDS + (len(text) >> 20) * _SECONDS_A_MEGABYTE, _BYTES + _BYTES_A_BYTE * len(text)
    try:
        found = limited_child.ask("try_tokenizer", seconds=seconds, size=size, spec=text, texts=_texts(spec))
    except limited_child.Stopped as did:
        raise UserError(
            f"{where} is no tokenizer that can be used: tried in a process of its own, {did}.\n"
            "Published tokenizers do not: the file is damaged or meant to harm."
        ) from None
    if "refused" in found:
        raise UserError(f"{where} is no tokenizer that the package tokenizers can read: {told(found['refused'])}")
    remember([digest])


def survived() -> tuple[str, ...]:
    """Digests of what held in this process, for processes that it starts (`remember`)."""
    return tuple(_survived())


def remember(digests: Collection[str]) -> None:
    """Takes over what another process of ours has tried."""
    _survived().update(digests)


@functools.cache
def _survived() -> set[str]:
    return set()


def _texts(spec: Mapping[str, Any]) -> list[str]:
    """Odd ones; runs of one character, those that the patterns name among them, that nothing ends as expected."""
    named = dict.fromkeys(c for pattern in patterns_of(spec) for c in pattern)
    runs = [*_RUNS_OF, *list(named)[:_MOST_RUNS]]
    added = [str(token.get("content")) for token in (spec.get("added_tokens") or ())[:_MOST_RUNS]]
    return [*_TEXTS, *(f"{c * _RUN}\x00{c}" for c in dict.fromkeys(runs)), " ".join(added)]


def failure(error: BaseException, where: str, text: str) -> UserError | None:
    """What to tell of an error of the library while it encodes; None for what is none of its own."""
    if type(error) is not Exception and type(error).__name__ != "PanicException":  # of Rust: a BaseException
        return None
    return UserError(f"{where} cannot encode {text[:60]!r}: the package tokenizers fails with {told(error)}")
