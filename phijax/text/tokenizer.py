"""Text <-> token ids with a SentencePiece model and added tokens, as phi-3 has them: 32000 pieces, then 11 names."""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import sentencepiece
from etils import epath

from phijax.errors import UserError

MODEL_FILE = "tokenizer.model"
ADDED_TOKENS_FILE = "added_tokens.json"

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


class Tokenizer:
    """A SentencePiece model and the ids of the added tokens. Immutable.

    Encoding then decoding gives the same text, byte for byte, with two exceptions that Llama's tokenizer has too:
    U+2581 (its mark for a space) comes back as a space, and a model without byte fallback maps unknown characters to
    <unk>.
    """

    def __init__(self, model: bytes, added_tokens: Mapping[str, int] | None = None, where: str = "the tokenizer"):
        """`added_tokens` None: phi-3's eleven are put behind the model's pieces. Raises UserError, naming `where`."""
        self._model = model
        self._pieces = _load(model, where)
        self._num_pieces = self._pieces.get_piece_size()
        if added_tokens is None:
            added_tokens = {text: self._num_pieces + i for i, text in enumerate(PHI3_ADDED_TOKENS)}
        _check_added_tokens(added_tokens, self._pieces, where)
        self.added_tokens: Mapping[str, int] = MappingProxyType(dict(added_tokens))
        self._added_text = {i: text for text, i in added_tokens.items()}
        self.end_of_text: int = added_tokens[END_OF_TEXT]
        self.unknown: int = self._pieces.unk_id()
        self.vocab_size: int = max(self._num_pieces, *(i + 1 for i in added_tokens.values()))
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
        added_path = path / ADDED_TOKENS_FILE
        added_tokens = _read_added_tokens(added_path) if path.is_dir() and added_path.exists() else None
        return cls(model_path.read_bytes(), added_tokens, where=str(model_path))

    def save(self, folder: str | epath.PathLike) -> None:
        """Writes tokenizer.model and added_tokens.json: what `open` reads."""
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MODEL_FILE).write_bytes(self._model)
        (folder / ADDED_TOKENS_FILE).write_text(json.dumps(dict(self.added_tokens), indent=2) + "\n")

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

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; added tokens show as their names, and what lies between two of them is decoded on its own.

        Raises ValueError for an id that is no token.
        """
        parts: list[str] = []
        run: list[int] = []
        for i in map(int, ids):
            if 0 <= i < self._num_pieces:
                run.append(i)
                continue
            if i not in self._added_text:
                raise ValueError(f"token id {i} is not in the tokenizer, which has {self.vocab_size} ids")
            parts += [self._pieces.decode(run), self._added_text[i]]
            run = []
        return "".join(parts) + (self._pieces.decode(run) if run else "")

    def __reduce__(self):
        return Tokenizer, (self._model, dict(self.added_tokens))

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


def fingerprint(model: bytes, added_tokens: Mapping[str, int]) -> str:
    """sha256 over the model's bytes and the added tokens: equal exactly when every text gets the same ids."""
    added = json.dumps(dict(added_tokens), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(hashlib.sha256(model).digest() + added.encode()).hexdigest()


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


def _read_added_tokens(path: epath.Path) -> dict[str, int]:
    try:
        added = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(added, dict) or not all(type(i) is int for i in added.values()):
        raise UserError(f'{path} must hold one object of names and ids, as {{"{END_OF_TEXT}": 32000}}.')
    return added


def _check_added_tokens(
    added_tokens: Mapping[str, int], pieces: sentencepiece.SentencePieceProcessor, where: str
) -> None:
    if END_OF_TEXT not in added_tokens:
        raise UserError(
            f"The added tokens of {where} have no {END_OF_TEXT}, which must end every document.\n"
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
