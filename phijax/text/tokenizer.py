"""Text <-> token ids with a SentencePiece model and added tokens, as phi-3 has them: 32000 pieces, then 11 names."""

import functools
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import sentencepiece
from etils import epath

from phijax.errors import UserError
from phijax.text.decoding import decode_text
from phijax.text.huggingface_files import name_of_special, write_sentencepiece
from phijax.text.special_files import ADDED_TOKENS_FILE, JSON_FILE, OURS_FILE, read_folder_tokens
from phijax.text.specials import SPACE_MARK, Specials

MODEL_FILE = "tokenizer.model"

END_OF_TEXT = "<|endoftext|>"

# phi-3's order, ids 32000 to 32010 behind Llama-2's pieces.
PHI3_ADDED_TOKENS = (
    END_OF_TEXT,
    "<|assistant|>",
    "<|placeholder1|>",
    "<|placeholder2|>",
    "<|placeholder3|>",
    "<|placeholder4|>",
    "<|system|>",
    "<|end|>",
    "<|placeholder5|>",
    "<|placeholder6|>",
    "<|user|>",
)

# SentencePiece keeps some 100 bytes a character, so that a file of 1 GB in one piece would end the process; and short
# pieces stay in the cache: 3.4 MB/s against 1.6 in pieces of a million characters.
_LONGEST_PIECE_OF_TEXT = 1 << 13  # characters


class TextTokenizer(Protocol):
    """What every tokenizer has, whichever library is behind it. Immutable, and can be sent to another process."""

    vocab_size: int  # ids are 0 to vocab_size - 1; a model's matrix may have more rows
    end_of_text: int  # ends every document
    unknown: int | None
    added_tokens: Mapping[str, int]  # names behind the model's own pieces, as <|user|>
    specials: Specials  # every name that encode_with_specials knows: the added tokens and the model's own, as <s>
    strips_right: frozenset[str]  # those that swallow the whitespace behind them
    fingerprint: str  # equal exactly when every text gets the same ids

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: names of special tokens inside it are text as any other; nothing is put around it."""
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

    def save(self, folder: str | epath.PathLike) -> None:
        """Writes what `phijax.text.open.open_tokenizer` reads."""
        ...

    def save_huggingface(
        self, folder: str | epath.PathLike, *, chat_template: str | None = None, eos: int | None = None
    ) -> None:
        """Writes the files by which AutoTokenizer gives the same ids. `eos`: what generation stops at."""
        ...


class Tokenizer:
    """A SentencePiece model and the ids of the added tokens. Immutable.

    Encoding then decoding gives the same text, byte for byte, with two exceptions that Llama's tokenizer has too:
    U+2581 (its mark for a space) comes back as a space, and a model without byte fallback maps unknown characters to
    <unk>.
    """

    def __init__(
        self,
        model: bytes,
        added_tokens: Mapping[str, int] | None = None,
        where: str = "the tokenizer",
        *,
        strips_right: Collection[str] | None = None,
        strips_left: Collection[str] = (),
        end_of_text: str = END_OF_TEXT,
        every_segment: bool = True,
    ):
        """Raises UserError, naming `where`, for what is no tokenizer.

        Args:
          model: a SentencePiece model.
          added_tokens: names and ids; None: phi-3's eleven are put behind the model's pieces.
          strips_right: special tokens that swallow the whitespace behind them; None: as phi-3's files say today.
          strips_left: those that swallow the whitespace before them.
          end_of_text: the name of the token that ends every document.
          every_segment: `encode_with_specials` puts the dummy space before each segment between special tokens, as
            Hugging Face's tokenizer of phi-3 does; False: before the first of a text only.
        """
        self._model = model
        self._pieces = _load(model, where)
        self._num_pieces = self._pieces.get_piece_size()
        if added_tokens is None:
            added_tokens = {text: self._num_pieces + i for i, text in enumerate(PHI3_ADDED_TOKENS)}
        own = _own_specials(self._pieces)
        _check_added_tokens(added_tokens, self._pieces, own, end_of_text, where)
        self.added_tokens: Mapping[str, int] = MappingProxyType(dict(added_tokens))
        if strips_right is None:
            strips_right = phi3_strips_right(added_tokens, self._pieces)
        ids = MappingProxyType(own | dict(added_tokens))
        self.specials = Specials(ids, frozenset(strips_right), frozenset(strips_left))
        self.strips_right: frozenset[str] = self.specials.strips_right
        self._end_of_text, self._every_segment = end_of_text, every_segment
        self.end_of_text: int = self.specials.ids[end_of_text]
        self.unknown: int = self._pieces.unk_id()
        self.vocab_size: int = max(self._num_pieces, 1 + max(self.specials.ids.values()))
        self.fingerprint: str = fingerprint(model, added_tokens)

    @classmethod
    def open(cls, path: str | epath.PathLike) -> "Tokenizer":
        """Opens a folder with tokenizer.model, and added_tokens.json if it has one, or a bare SentencePiece model.

        Raises UserError when there is none or it cannot be read.
        """
        path = epath.Path(path)
        model_path = path / MODEL_FILE if path.is_dir() else path
        if not model_path.exists():
            raise UserError(
                f"No tokenizer at {path}: {model_path} does not exist.\n"
                f"Give a SentencePiece model, or a folder with {MODEL_FILE} (and {ADDED_TOKENS_FILE})."
            )
        said = read_folder_tokens(path) if path.is_dir() else None
        if said is None:
            return cls(model_path.read_bytes(), where=str(model_path))
        model = model_path.read_bytes()
        own = _own_specials(_load(model, str(model_path)))
        added = {name: i for name, i in said.ids().items() if own.get(name) != i}
        named = {*own, *added}
        opened = cls(
            model,
            added,
            where=str(model_path),
            strips_right=said.strips_right if said.strips_right is None else said.strips_right & named,
            strips_left=said.strips_left & named,
            end_of_text=END_OF_TEXT if END_OF_TEXT in added or not said.end else said.end,
            every_segment=said.every_segment,
        )
        if said.vocab_size not in (None, opened.vocab_size):
            raise UserError(
                f"{path} holds two tokenizers that differ: {MODEL_FILE} has {opened.vocab_size} ids with its added "
                f"tokens, {JSON_FILE} has {said.vocab_size}.\nRemove the one that does not belong to the model."
            )
        return opened

    def save(self, folder: str | epath.PathLike) -> None:
        """Writes tokenizer.model and added_tokens.json; special_tokens.json where tokens are not used as in phi-3."""
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MODEL_FILE).write_bytes(self._model)
        (folder / ADDED_TOKENS_FILE).write_text(json.dumps(dict(self.added_tokens), indent=2) + "\n")
        if self._unlike_phi3:
            (folder / OURS_FILE).write_text(json.dumps(self._unlike_phi3, indent=2) + "\n")

    def save_huggingface(
        self, folder: str | epath.PathLike, *, chat_template: str | None = None, eos: int | None = None
    ) -> None:
        """Writes what AutoTokenizer and llama.cpp's converter read, so that they give our ids.

        Args:
          chat_template: Jinja text that goes with it.
          eos: the id that generation stops at; None: that of the end of text.
        Raises UserError where `eos` is no special token.
        """
        write_sentencepiece(
            epath.Path(folder),
            model=self._model,
            added_tokens=self.added_tokens,
            specials=self.specials,
            every_segment=self._every_segment,
            eos=name_of_special(self.specials, self.end_of_text if eos is None else eos),
            pad=self._end_of_text,
            chat_template=chat_template,
        )

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: the names of added tokens inside it are text as any other; nothing is put around it.

        Raises ValueError for a lone surrogate, which is no text in UTF-8.
        """
        if not text.isascii():
            text.encode()  # SentencePiece would raise a RuntimeError that says nothing
        if len(text) <= _LONGEST_PIECE_OF_TEXT or not self._splits_at_newlines:
            return self._pieces.encode(text)
        first, *others = _cut_at_newlines(text, _LONGEST_PIECE_OF_TEXT)
        ids = self._pieces.encode(first)
        for part in others:  # each begins with a newline
            ids += self._pieces.encode(part)[self._dummy_before_newline :]
        return ids

    def encode_with_specials(self, text: str) -> list[int]:
        """Ids of text in which names of special tokens stand for those tokens. Never give it text of strangers.

        As Hugging Face reads phi-3's files: whitespace behind a token of `strips_right` is dropped, and each segment
        between two tokens gets its own dummy space.
        Raises ValueError for a lone surrogate.
        """
        ids: list[int] = []
        for part in self.specials.cut(text):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self.encode_segment(part, first=not ids)
        return ids

    def encode_segment(self, text: str, first: bool) -> list[int]:
        """Ids of the plain text between two special tokens; `first`: nothing is before it."""
        if first or self._every_segment or not self._has_dummy:
            return self.encode(text)
        # Behind a newline, which is a piece of its own, no dummy space is put.
        return self.encode("\n" + text)[self._dummy_before_newline + 1 :]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens show as their names, and what lies between two of them is decoded on its own.

        Raises ValueError for an id that is no token.
        """
        return decode_text(self, ids)

    def token_bytes(self, id: int, first: bool = False) -> bytes:
        """What `id` adds to the text; `first`: without the dummy space. Raises ValueError for what is no token."""
        if not 0 <= id < self.vocab_size or (text := self._bytes[id]) is None:
            raise ValueError(f"token id {id} is not in the tokenizer, which has {self.vocab_size} ids")
        # A space that was a byte of its own is no dummy.
        return text[1:] if first and text[:1] == b" " and not self._pieces_is_byte(id) else text

    def begins_behind(self, previous: int | None) -> bool:
        """Whether the id behind `previous` is the first of a segment, whose leading space is a dummy."""
        return self._has_dummy and (previous is None or (self._every_segment and previous in self.specials.names))

    def __reduce__(self):
        return _rebuild, (self._model, dict(self.added_tokens), self._unlike_phi3)

    @functools.cached_property
    def _unlike_phi3(self) -> dict[str, Any]:
        """Arguments by which this tokenizer differs from one that is made of model and added tokens alone."""
        given = {
            "strips_right": sorted(self.strips_right),
            "strips_left": sorted(self.specials.strips_left),
            "end_of_text": self._end_of_text,
            "every_segment": self._every_segment,
        }
        phi3 = {
            "strips_right": sorted(phi3_strips_right(self.added_tokens, self._pieces)),
            "strips_left": [],
            "end_of_text": END_OF_TEXT,
            "every_segment": True,
        }
        return {} if given == phi3 else given

    def _pieces_is_byte(self, id: int) -> bool:
        return id < self._num_pieces and self._pieces.is_byte(id)

    @functools.cached_property
    def _bytes(self) -> list[bytes | None]:
        """What each id adds to the text; None where an id between added tokens is no token."""
        table: list[bytes | None] = [None] * self.vocab_size
        for i in range(self._num_pieces):
            piece = self._pieces.id_to_piece(i)
            is_byte = self._pieces.is_byte(i)
            table[i] = bytes([int(piece[3:5], 16)]) if is_byte else piece.replace(SPACE_MARK, " ").encode()
        for name, i in self.specials.ids.items():
            table[i] = name.encode()
        return table

    @functools.cached_property
    def _has_dummy(self) -> bool:
        """Whether the model puts a space before a text."""
        return self._pieces.id_to_piece(self._pieces.encode("a")[0]).startswith(SPACE_MARK)

    @functools.cached_property
    def _dummy_before_newline(self) -> int:
        """How many ids come before a text's leading newline: one, the dummy space, where the model adds it."""
        return len(self._pieces.encode("\n")) - 1

    @functools.cached_property
    def _splits_at_newlines(self) -> bool:
        """Whether cutting before newlines leaves the ids as they are: no piece joins a newline with anything else.

        So it is in Llama's model and in those trained here, where training sees lines.
        """
        return not any("\n" in self._pieces.id_to_piece(i) for i in range(self._num_pieces))


def phi3_strips_right(added_tokens: Mapping[str, int], pieces: sentencepiece.SentencePieceProcessor) -> frozenset[str]:
    """phi-3's rule of July 2024, where a checkpoint says nothing: all but <|endoftext|>, and </s>."""
    end = pieces.eos_id()
    return frozenset(added_tokens) - {END_OF_TEXT} | ({pieces.id_to_piece(end)} if end >= 0 else frozenset())


def fingerprint(model: bytes, added_tokens: Mapping[str, int]) -> str:
    """sha256 over the model's bytes and the added tokens: equal exactly when every text gets the same ids."""
    added = json.dumps(dict(added_tokens), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(hashlib.sha256(model).digest() + added.encode()).hexdigest()


def _rebuild(model: bytes, added_tokens: dict[str, int], unlike_phi3: dict[str, Any]) -> Tokenizer:
    return Tokenizer(model, added_tokens, **unlike_phi3)


def _own_specials(pieces: sentencepiece.SentencePieceProcessor) -> dict[str, int]:
    """<unk>, <s> and </s>: what no text becomes, by name."""
    ids = range(pieces.get_piece_size())
    return {pieces.id_to_piece(i): i for i in ids if pieces.is_control(i) or pieces.is_unknown(i)}


def _load(model: bytes, where: str) -> sentencepiece.SentencePieceProcessor:
    try:
        # An empty model loads without an error and then prints one at every call.
        pieces = sentencepiece.SentencePieceProcessor(model_proto=model) if model else None
    except RuntimeError:
        pieces = None
    if pieces is None or pieces.get_piece_size() == 0:
        raise UserError(
            f"{where} is not a SentencePiece model ({len(model)} bytes).\n"
            "phi-3-mini, phi-3-medium, phi-3.5-mini and Llama-2 come with one, named tokenizer.model."
        )
    return pieces


def _check_added_tokens(
    added_tokens: Mapping[str, int],
    pieces: sentencepiece.SentencePieceProcessor,
    own: Mapping[str, int],
    end_of_text: str,
    where: str,
) -> None:
    if end_of_text not in added_tokens and end_of_text not in own:
        raise UserError(
            f"The added tokens of {where} have no {end_of_text}, which must end every document.\n"
            f"They are: {', '.join(added_tokens) or 'none'}. Add it to {ADDED_TOKENS_FILE} beside the model; "
            "without that file phi-3's eleven tokens are put behind the model's pieces."
        )
    num_pieces, seen = pieces.get_piece_size(), {}
    for text, i in added_tokens.items():
        if i in seen:
            raise UserError(f"{where}: the added tokens {seen[i]!r} and {text!r} have the same id {i}.")
        seen[i] = text
        if i < 0 or (i < num_pieces and pieces.id_to_piece(i) != text):
            raise UserError(
                f"{where}: the added token {text!r} has id {i}, which is a piece of the model ({num_pieces} pieces).\n"
                f"{ADDED_TOKENS_FILE} belongs to another model."
            )
        piece = pieces.piece_to_id(text)
        if piece != pieces.unk_id() and not pieces.is_control(piece):
            # A document about chat models would then hold control tokens.
            raise UserError(f"{where}: the model itself takes {text!r} out of plain text. Train or give another model.")


def _cut_at_newlines(text: str, length: int) -> list[str]:
    """Parts of about `length` characters, all but the first beginning with a newline. Joined, they are the text."""
    parts, start = [], 0
    while len(text) - start > length:
        cut = text.rfind("\n", start + 1, start + length)
        if cut < 0:
            cut = text.find("\n", start + length)
        if cut < 0:
            break
        parts.append(text[start:cut])
        start = cut
    return parts + [text[start:]]
