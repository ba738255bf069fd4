"""Ids -> text through bytes: a character may be spread over several tokens."""

from collections.abc import Iterable
from typing import Protocol


class TokenBytes(Protocol):
    """What decoding needs to know of a tokenizer."""

    def token_bytes(self, id: int, first: bool = False) -> bytes: ...

    def begins_behind(self, previous: int | None) -> bool: ...


def decode_bytes(tokenizer: TokenBytes, ids: Iterable[int], previous: int | None = None) -> bytes:
    """The bytes that `ids` add to a text whose last id is `previous` (None: they begin it)."""
    parts = []
    for i in map(int, ids):
        parts.append(tokenizer.token_bytes(i, first=tokenizer.begins_behind(previous)))
        previous = i
    return b"".join(parts)


def decode_text(tokenizer: TokenBytes, ids: Iterable[int]) -> str:
    """The text of `ids`. Bytes that are no UTF-8 become U+FFFD, one for each part that no character can begin with."""
    return decode_bytes(tokenizer, ids).decode("utf-8", errors="replace")
