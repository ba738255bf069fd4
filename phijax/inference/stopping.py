"""One row's continuation on the host: tokens become text, never half a character; stop texts over token borders."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Literal

from phijax.text.stream import TextStream

Finish = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True)
class Result:
    """What a prompt was continued with.

    text: without what stopped it. tokens: with the stop token, if one did.
    logprobs: natural logarithms, a token each, under the model before temperature and filters.
    finish_reason: "stop": a stop token or text; "length": max_tokens, or the model's length, was reached.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: Finish


class Continuation:
    """Grows token by token; `add` says which text has become certain."""

    def __init__(
        self,
        stream: TextStream | None,
        *,
        stop: Sequence[str],
        stop_ids: Collection[int],
        max_tokens: int,
        known: int,
    ):
        """`stream`: None: no text is made. `known`: ids from here on are rows of the model without a token."""
        self._stream, self._known = stream, known
        self._stop, self._stop_ids, self._max_tokens = tuple(stop), frozenset(stop_ids), max_tokens
        self._given, self._held = "", ""  # text that was handed out; text that may still become part of a stop text
        self.tokens: list[int] = []
        self._logprobs: list[float] = []
        self.finish: Finish | None = None
        self.ended_by_text = False

    def add(self, token: int, logprob: float) -> str:
        """Takes the next token; returns the text that it makes certain, which may be empty."""
        assert self.finish is None
        self.tokens.append(token)
        self._logprobs.append(logprob)
        if token in self._stop_ids:
            return self._end("stop")
        if self._stream is not None and token < self._known:
            self._held += self._stream.push([token])
        places = [at for at in map(self._held.find, self._stop) if at >= 0]
        if places:
            self._held = self._held[: min(places)]
            self.finish, self.ended_by_text = "stop", True
            return self._give(len(self._held))
        if len(self.tokens) >= self._max_tokens:
            return self._end("length")
        return self._give(len(self._held) - self._may_begin_a_stop())

    @property
    def count(self) -> int:
        return len(self.tokens)

    def result(self) -> Result:
        return Result(self._given, tuple(self.tokens), tuple(self._logprobs), self.finish or "length")

    def _end(self, reason: Finish) -> str:
        if self._stream is not None:
            self._held += self._stream.finish()  # bytes that were to begin a character: U+FFFD
        self.finish = reason
        return self._give(len(self._held))

    def _give(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        self._given += text
        return text

    def _may_begin_a_stop(self) -> int:
        """Length of the longest end of the held text that begins one of the stop texts."""
        longest = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:size]):
                    longest = size
                    break
        return longest
