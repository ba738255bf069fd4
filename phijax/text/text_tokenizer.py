"""What every tokenizer has, whichever library is behind it."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from etils import epath

from phijax.text.specials import Specials


class TextTokenizer(Protocol):
    """What every tokenizer has, whichever library is behind it. Immutable, and can be sent to another process."""

    vocab_size: int  # ids are 0 to vocab_size - 1; a model's matrix may have more rows
    end_of_text: int  # ends every document
    unknown: int | None
    added_tokens: Mapping[str, int]  # names behind the model's own pieces, as <|user|>
    specials: Specials  # control tokens, which only encode_with_specials makes: added ones and the model's own, as <s>
    symbols: Specials  # added tokens that plain text becomes too, as runs of spaces or a chemist's CO2e
    strips_right: frozenset[str]  # of the control tokens, those that swallow the whitespace behind them
    fingerprint: str  # of the files' contents: where it is equal every text gets the same ids

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: names of special tokens inside it are text as any other; nothing is put around it.

        Symbols are found in it.
        """
        ...

    def encode_with_specials(self, text: str) -> list[int]:
        """Ids of text in which names of special tokens stand for those tokens. Never give it text of strangers."""
        ...

    def encode_segment(self, text: str, first: bool) -> list[int]:
        """Ids of the plain text between two special tokens; `first`: nothing is before it."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens show as their names. Raises ValueError for an id that is no token."""
        ...

    def token_bytes(self, id: int, first: bool = False) -> bytes:
        """What `id` adds to the text. `first`: without the dummy space that some tokenizers put before a text.

        Raises ValueError for an id that is no token.
        """
        ...

    def begins_behind(self, previous: int | None) -> bool:
        """Whether the id behind `previous` (None: nothing before it) is `first` in the sense of `token_bytes`."""
        ...

    def same_ids(self, other: "TextTokenizer") -> bool:
        """Whether every text, chats too, is known to get the same ids, be the files others."""
        ...

    def save(self, folder: str | epath.PathLike) -> None:
        """Writes what `phijax.text.open.open_tokenizer` reads."""
        ...

    def huggingface_json(self) -> dict[str, Any] | None:
        """The tokenizer.json that gives our ids; None where there can be none."""
        ...

    def save_huggingface(
        self, folder: str | epath.PathLike, *, chat_template: str | None = None, eos: int | None = None
    ) -> None:
        """Writes the files by which AutoTokenizer gives the same ids. `eos`: what generation stops at."""
        ...
