"""Text of an answer while it is being written."""

import codecs
from collections.abc import Iterable, Sequence

from phijax.text.tokenizer import TextTokenizer


class TextStream:
    """Turns ids into printable text as they come: never half a character, and all together what `decode` gives.

    `push` holds the bytes of an unfinished character back; `finish` gives what can no longer be finished, as U+FFFD.
    """

    def __init__(self, tokenizer: TextTokenizer, before: Sequence[int] = ()):
        """`before`: the ids that the new ones continue, so that "The capital is" gets " Paris" with its space."""
        self._tokenizer = tokenizer
        self._previous: int | None = int(before[-1]) if len(before) else None
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text that can be printed now. Raises ValueError for an id that is no token."""
        parts = []
        for i in map(int, ids):
            first = self._tokenizer.begins_behind(self._previous)
            parts.append(self._tokenizer.token_bytes(i, first=first))
            self._previous = i
        return self._decoder.decode(b"".join(parts))

    def finish(self) -> str:
        """What was held back."""
        return self._decoder.decode(b"", final=True)
