"""Text <-> token ids with a SentencePiece model and added tokens, as phi-3 has them: 32000 pieces, then 11 names."""

import functools
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from etils import epath

from phijax.errors import UserError
from phijax.storage.regular_files import read_bounded
from phijax.storage.strict_json import shown
from phijax.text.decoding import decode_text
from phijax.text.huggingface_files import name_of_special, spec_of_model, write_sentencepiece
from phijax.text.pieces import (
    END_OF_TEXT,
    PHI3_ADDED_TOKENS,
    check_added_tokens,
    load_pieces,
    own_specials,
    phi3_strips_right,
)
from phijax.text.sentencepiece_model import interchangeable, user_defined, with_control
from phijax.text.special_files import ADDED_TOKENS_FILE, JSON_FILE, OURS_FILE, read_folder_tokens
from phijax.text.specials import SPACE_MARK, DummySpace, Specials, looks_like_control
from phijax.text.text_tokenizer import TextTokenizer
from phijax.text.tokenizer_bounds import LONGEST_FILE

__all__ = [
    "ADDED_TOKENS_FILE",
    "END_OF_TEXT",
    "JSON_FILE",
    "MODEL_FILE",
    "PHI3_ADDED_TOKENS",
    "TextTokenizer",
    "Tokenizer",
]

MODEL_FILE = "tokenizer.model"

# SentencePiece keeps some 100 bytes a character, so that a file of 1 GB in one piece would end the process; and short
# pieces stay in the cache: 3.4 MB/s against 1.6 in pieces of a million characters.
_LONGEST_PIECE_OF_TEXT = 1 << 13  # characters


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
        dummy_space: DummySpace = "each",
        symbols: Collection[str] = (),
        whole_words: Collection[str] = (),
        normalized: Collection[str] = (),
    ):
        """Raises UserError, naming `where`, for what is no tokenizer.

        Args:
          model: a SentencePiece model.
          added_tokens: names and ids; None: phi-3's eleven are put behind the model's pieces.
          strips_right: special tokens that swallow the whitespace behind them; None: as phi-3's files say today.
          strips_left: those that swallow the whitespace before them.
          end_of_text: the name of the token that ends every document.
          dummy_space: where the space goes that the model puts before text, if it does.
          symbols: added tokens that are found in plain text; of those the `normalized` as Hugging Face finds them:
            behind the dummy space or a space, which they swallow.
          whole_words: added tokens that are found only where no letter stands beside them.
        """
        self._model = model
        # Names for control are never taken out of text, and symbols are before the model sees it: neither is its own.
        mine = user_defined(model)
        taken = {i for name, i in mine.items() if name in symbols or looks_like_control(name)}
        self._pieces = load_pieces(with_control(model, taken) if taken else model, where)
        self._num_pieces = self._pieces.get_piece_size()
        if added_tokens is None:
            added_tokens = {text: self._num_pieces + i for i, text in enumerate(PHI3_ADDED_TOKENS)}
        own = {name: i for name, i in own_specials(self._pieces).items() if name not in symbols}
        check_added_tokens(added_tokens, self._pieces, {**own, **mine}, end_of_text, where, symbols)
        self.added_tokens: Mapping[str, int] = MappingProxyType(dict(added_tokens))
        if strips_right is None:
            strips_right = phi3_strips_right(added_tokens, self._pieces)
        right, left = frozenset(strips_right), frozenset(strips_left)
        ids = own | {name: i for name, i in added_tokens.items() if name not in symbols}
        words = frozenset(whole_words)
        self.specials = Specials(MappingProxyType(ids), *(flagged & ids.keys() for flagged in (right, left, words)))
        self.strips_right: frozenset[str] = self.specials.strips_right
        found = {name: i for name, i in {**mine, **added_tokens}.items() if name in symbols}
        flags = (right, left, words, frozenset(normalized))
        self.symbols = Specials(MappingProxyType(found), *(flagged & found.keys() for flagged in flags))
        self._retyped = sorted(name for name in mine if looks_like_control(name))
        self._end_of_text = end_of_text
        self._adds_space = self._pieces.id_to_piece(self._pieces.encode("a")[0]).startswith(SPACE_MARK)
        self._dummy_space: DummySpace = dummy_space if self._adds_space else "never"
        unlike = dummy_space != "each" or self.symbols.normalized
        if self._adds_space and unlike and not self._splits_at_newlines:
            raise UserError(
                f"{where}: its pieces join newlines with words, which leaves no way around the dummy space."
            )
        if end_of_text not in self.specials.ids:
            raise UserError(
                f"{where}: {shown(end_of_text)}, which ends every document, is said to be a symbol of text."
            )
        self.end_of_text: int = self.specials.ids[end_of_text]
        self.unknown: int = self._pieces.unk_id()
        self.vocab_size: int = max(self._num_pieces, 1 + max({**ids, **found}.values()))
        retyped = {"control": self._retyped} if self._retyped else {}
        self.fingerprint: str = fingerprint(model, added_tokens, self._unlike_phi3 | retyped)

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
            return cls(read_bounded(model_path, LONGEST_FILE), where=str(model_path))
        model = read_bounded(model_path, LONGEST_FILE)
        own = own_specials(load_pieces(model, str(model_path)))
        added = {name: i for name, i in said.ids().items() if own.get(name) != i}
        named, symbols = {*own, *added}, said.symbols - own.keys()
        opened = cls(
            model,
            added,
            where=str(model_path),
            strips_right=said.strips_right if said.strips_right is None else said.strips_right & named,
            strips_left=said.strips_left & named,
            end_of_text=END_OF_TEXT if END_OF_TEXT in added or not said.end else said.end,
            dummy_space=said.dummy_space,
            symbols=symbols,
            whole_words=said.whole_words & named,
            normalized=said.normalized & symbols,
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

    def huggingface_json(self) -> dict[str, Any] | None:
        """None for a model that is unigram or folds characters: merges cannot stand for it."""
        return spec_of_model(self._model, self.specials, self.symbols, self._dummy_space)

    def save_huggingface(
        self, folder: str | epath.PathLike, *, chat_template: str | None = None, eos: int | None = None
    ) -> None:
        """Writes what AutoTokenizer and llama.cpp's converter read, so that they give our ids.

        Args:
          chat_template: Jinja text that goes with it.
          eos: the id that generation stops at; None: that of the end of text.
        Raises UserError where `eos` is no special token, and for models that transformers has no like of.
        """
        write_sentencepiece(
            epath.Path(folder),
            model=self._model,
            added_tokens=self.added_tokens,
            specials=self.specials,
            symbols=self.symbols,
            dummy_space=self._dummy_space,
            eos=name_of_special(self.specials, self.end_of_text if eos is None else eos),
            pad=self._end_of_text,
            chat_template=chat_template,
        )

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: the names of special tokens inside it are text as any other; nothing is put around it.

        Symbols are found in it. Raises ValueError for a lone surrogate, which is no text in UTF-8.
        """
        return self.encode_segment(text, first=True)

    def _encode(self, text: str) -> list[int]:
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
        return self._encode_around(self._raw_names, text, first=True)

    def encode_segment(self, text: str, first: bool) -> list[int]:
        """Ids of the plain text between two special tokens; `first`: nothing is before it."""
        if not self.symbols.ids:
            return self._encode_run(text, first)
        return self._encode_around(self._raw_symbols, text, first)

    def _encode_around(self, names: Specials, text: str, first: bool) -> list[int]:
        """Ids of `names` and of what lies between them, where normalized symbols are looked for."""
        ids: list[int] = []
        for part in names.cut(text):
            if isinstance(part, int):
                ids.append(part)
            elif self.symbols.normalized:
                ids += self._encode_normalized(part, first and not ids)
            else:
                ids += self._encode_run(part, first and not ids)
        return ids

    def _encode_normalized(self, text: str, first: bool) -> list[int]:
        """As Hugging Face's tokenizers do: both text and names have their dummy space first, then names are found."""
        each = self._dummy_space == "each"
        parts = list(self._folded_symbols.cut(SPACE_MARK * each + text.replace(" ", SPACE_MARK)))
        if all(isinstance(part, str) for part in parts):
            return self._encode_run(text, first)
        ids: list[int] = []
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self._encode_bare(part) if each else self._encode_run(part, first and not ids)
        return ids

    def _encode_bare(self, text: str) -> list[int]:
        # Behind a newline, which is a piece of its own, no dummy space is put.
        return self._encode("\n" + text)[self._dummy_before_newline + 1 :]

    def _encode_run(self, text: str, first: bool) -> list[int]:
        """Ids of a text without added tokens."""
        allowed = self._dummy_space == "always" or (first and self._dummy_space == "first")
        if self._dummy_space == "each" or not self._adds_space or (allowed and text[:1] not in (" ", SPACE_MARK)):
            return self._encode(text)
        return self._encode_bare(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens show as their names, and what lies between two of them is decoded on its own.

        Raises ValueError for an id that is no token.
        """
        return decode_text(self, ids)

    def token_bytes(self, id: int, first: bool = False) -> bytes:
        """What `id` adds to the text; `first`: without the dummy space. Raises ValueError for what is no token."""
        if not 0 <= id < self.vocab_size or (text := self._bytes[id]) is None:
            raise ValueError(f"token id {id} is not in the tokenizer, which has {self.vocab_size} ids")
        if id in self.symbols.names:
            return text[1:] if first and self._swallows_space(id) else text
        # A space that was a byte of its own is no dummy.
        return text[1:] if first and text[:1] == b" " and not self._pieces_is_byte(id) else text

    def begins_behind(self, previous: int | None) -> bool:
        """Whether the id behind `previous` is the first of a segment, whose leading space is a dummy."""
        if self._dummy_space == "never":
            return False
        if previous is None or self._dummy_space == "first":
            return previous is None
        symbol = previous in self.symbols.names and not self._swallows_space(previous)
        return symbol or previous in self.specials.names

    def same_ids(self, other: TextTokenizer) -> bool:
        """Whether every text, chats too, is known to get the same ids. (GGUF has the pieces, not the model's bytes.)"""
        if not isinstance(other, Tokenizer) or self.added_tokens != other.added_tokens:
            return False
        return self._unlike_phi3 == other._unlike_phi3 and interchangeable(self._model, other._model)

    def __reduce__(self):
        return _rebuild, (self._model, dict(self.added_tokens), self._unlike_phi3)

    @functools.cached_property
    def _unlike_phi3(self) -> dict[str, Any]:
        """Arguments by which this tokenizer differs from one that is made of model and added tokens alone."""
        given = {
            "strips_right": sorted(self.strips_right),
            "strips_left": sorted(self.specials.strips_left),
            "end_of_text": self._end_of_text,
            "dummy_space": self._dummy_space,
        }
        if words := self.specials.whole_words | self.symbols.whole_words:
            given["whole_words"] = sorted(words)
        if self.symbols.ids:
            given |= {
                "strips_right": sorted(self.strips_right | self.symbols.strips_right),
                "strips_left": sorted(self.specials.strips_left | self.symbols.strips_left),
                "symbols": sorted(self.symbols.ids),
                "normalized": sorted(self.symbols.normalized),
            }
        phi3 = {
            "strips_right": sorted(phi3_strips_right(self.added_tokens, self._pieces)),
            "strips_left": [],
            "end_of_text": END_OF_TEXT,
            "dummy_space": "each" if self._adds_space else "never",
        }
        return {} if given == phi3 else given

    def _swallows_space(self, id: int) -> bool:
        """Whether the space before a symbol, which may be the dummy, is part of it."""
        return self._dummy_space == "each" and self.symbols.names.get(id) in self.symbols.normalized

    @functools.cached_property
    def _raw_symbols(self) -> Specials:
        return self.symbols.renamed({name: name for name in self.symbols.ids.keys() - self.symbols.normalized})

    @functools.cached_property
    def _raw_names(self) -> Specials:
        return self.specials.joined(self._raw_symbols)

    @functools.cached_property
    def _folded_symbols(self) -> Specials:
        """The normalized ones, by what the normalizer makes of their names."""
        mark = SPACE_MARK * (self._dummy_space == "each")
        return self.symbols.renamed({name: mark + name.replace(" ", SPACE_MARK) for name in self.symbols.normalized})

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
        for name, i in self.specials.joined(self.symbols).ids.items():
            table[i] = b" " * self._swallows_space(i) + name.encode()
        return table

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


def fingerprint(model: bytes, added_tokens: Mapping[str, int], unlike_phi3: Mapping[str, Any]) -> str:
    """sha256 over all that decides ids: equal exactly when every text, chats too, gets the same ids."""
    added = json.dumps(dict(added_tokens), sort_keys=True, ensure_ascii=True)
    if unlike_phi3:
        added += json.dumps(dict(unlike_phi3), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(hashlib.sha256(model).digest() + added.encode()).hexdigest()


def _rebuild(model: bytes, added_tokens: dict[str, int], unlike_phi3: dict[str, Any]) -> Tokenizer:
    return Tokenizer(model, added_tokens, **unlike_phi3)


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
