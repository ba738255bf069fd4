"""Text with the names of added tokens in it: cut at the names; whitespace that a token swallows is dropped."""

import dataclasses
import functools
import re
import unicodedata
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


# What publishers flag as no special token although no text may become it: phi-3's </s>, phi-4-mini's <|tool|>, GGUF
# files of 2024. By llama.cpp's rule (its converter's `does_token_look_special`) and its list of what ends a turn.
_CONTROL = re.compile(
    r"<[|\uff5c].*[|\uff5c]>|</?s>|<(unk|pad|mask|bos|eos|EOT|(start|end)_of_turn)>|_<EOT>|<unused\d+>"
    r"|\[(unk|pad|mask|bos|eos|cls|sep)\]|\[/?INST\]",
    re.DOTALL | re.IGNORECASE,
)


def looks_like_control(name: str) -> bool:
    """Whether a token is for control by its name alone, as <|user|>: then text of strangers never becomes it."""
    return _CONTROL.fullmatch(name) is not None


@dataclasses.dataclass(frozen=True)
class Specials:
    """Names of tokens that stand for themselves in a text, their ids, and where they are found.

    Read from a checkpoint's tokenizer files; phi-3's are in chat formats what brackets are in code. The flags are those
    of Hugging Face's added tokens:
    strips_right, strips_left: names that swallow whitespace beside them. whole_words: those that are found only where
      no letter or digit stands beside them. normalized: those that are looked for behind the normalizer.
    """

    ids: Mapping[str, int]
    strips_right: frozenset[str] = frozenset()
    strips_left: frozenset[str] = frozenset()
    whole_words: frozenset[str] = frozenset()
    normalized: frozenset[str] = frozenset()

    @functools.cached_property
    def names(self) -> Mapping[int, str]:
        return {i: name for name, i in self.ids.items()}

    def renamed(self, names: Mapping[str, str]) -> "Specials":
        """Those that are keys of `names`, under the names that stand there."""

        def of(flagged: frozenset[str]) -> frozenset[str]:
            return frozenset(names[name] for name in flagged if name in names)

        ids = {names[name]: i for name, i in self.ids.items() if name in names}
        flags = (self.strips_right, self.strips_left, self.whole_words, self.normalized)
        return Specials(ids, *map(of, flags))

    def joined(self, other: "Specials") -> "Specials":
        """All of both."""
        return Specials(
            {**self.ids, **other.ids},
            self.strips_right | other.strips_right,
            self.strips_left | other.strips_left,
            self.whole_words | other.whole_words,
            self.normalized | other.normalized,
        )

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
        for found in self._found(text):
            if start < found.start():
                yield text[start : found.start()]
            yield self.ids[found[0]]
            start = found.end()
        if start < len(text):
            yield text[start:]

    def find(self, text: str) -> str | None:
        """The first name in `text`, or None."""
        found = next(self._found(text), None)
        return found[0] if found else None

    def _found(self, text: str) -> Iterator[re.Match[str]]:
        for found in self._pattern.finditer(text) if self._pattern else ():
            before, behind = text[max(0, found.start() - 1) : found.start()], text[found.end() : found.end() + 1]
            if found[0] not in self.whole_words or not (_is_of_word(before) or _is_of_word(behind)):
                yield found

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str] | None:
        longest_first = sorted(self.ids, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _is_of_word(character: str) -> bool:
    r"""Whether a character, or none, is \w to the tokenizers package: a letter, a mark, a digit, what joins words."""
    if not character:
        return False
    kind = unicodedata.category(character)
    joins = character in "\u200c\u200d" or "\u24b6" <= character <= "\u24e9"
    return kind[0] in "LM" or kind in ("Nd", "Nl", "Pc") or joins
