"""Text with the names of special tokens in it: cut at the names; whitespace that a token swallows is dropped."""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from typing import Literal

SPACE_MARK = "\u2581"  # stands for a space inside the pieces of SentencePiece, and in Hugging Face's Metaspace

# Where a tokenizer of Llama's kind puts a space of its own before text, so that a word has one form at the beginning
# and inside. "each": before each segment between special tokens, as phi-3's files say. The others are Hugging Face's
# Metaspace: "always" before each segment that begins with none, "first" before such a text alone, "never".
DummySpace = Literal["each", "always", "first", "never"]

# What Unicode calls White_Space, which is what Hugging Face's tokenizers strip; str.strip() would take \x1c-\x1f too.
_SPACES = "".join(map(chr, range(0x2000, 0x200B)))
WHITE_SPACE = f"\t\n\x0b\x0c\r \x85\xa0\u1680{_SPACES}\u2028\u2029\u202f\u205f\u3000"


@dataclasses.dataclass(frozen=True)
class Specials:
    """Names of tokens that stand for themselves in a text, their ids, and which of them swallow whitespace beside them.

    Read from a checkpoint's tokenizer files; phi-3's are in chat formats what brackets are in code.
    """

    ids: Mapping[str, int]
    strips_right: frozenset[str] = frozenset()
    strips_left: frozenset[str] = frozenset()

    @functools.cached_property
    def names(self) -> Mapping[int, str]:
        return {i: name for name, i in self.ids.items()}

    def cut(self, text: str) -> Iterator[str | int]:
        """Plain segments of `text` and ids of the special tokens between them, in order; empty segments are left out.

        The leftmost name is taken, and of those that begin at one place the longest.
        """
        parts = list(self.parts(text))
        names = [self.names[part] if isinstance(part, int) else None for part in parts]
        for before, part, behind in zip([None, *names], parts, [*names[1:], None], strict=False):
            if isinstance(part, str):
                part = part.lstrip(WHITE_SPACE) if before in self.strips_right else part
                part = part.rstrip(WHITE_SPACE) if behind in self.strips_left else part
            if part != "":
                yield part

    def parts(self, text: str) -> Iterator[str | int]:
        """The same with all whitespace."""
        start = 0
        for found in self._pattern.finditer(text) if self._pattern else ():
            if start < found.start():
                yield text[start : found.start()]
            yield self.ids[found[0]]
            start = found.end()
        if start < len(text):
            yield text[start:]

    def find(self, text: str) -> str | None:
        """The first name in `text`, or None."""
        found = self._pattern.search(text) if self._pattern else None
        return found[0] if found else None

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str] | None:
        longest_first = sorted(self.ids, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
