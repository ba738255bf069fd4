"""The tokenizer inside a GGUF file: its arrays -> a tokenizer of ours. The other way is vocabulary.py."""

from typing import Any

import numpy as np

from phijax.errors import UserError
from phijax.interchange.gguf.file import GgufFile
from phijax.storage.strict_json import shown
from phijax.text.bpe import BpeTokenizer
from phijax.text.chat_formats import stops_by_names
from phijax.text.sentencepiece_model import Piece, PieceKind, put_together
from phijax.text.specials import looks_like_control
from phijax.text.tokenizer import END_OF_TEXT, TextTokenizer, Tokenizer

PREFIX = "tokenizer.ggml."

# What ends an answer, by name: llama.cpp stops at these too, whichever id the file calls eos (phi-3's files of 2024
# name <|endoftext|>, and their answers end with <|end|>).
END_OF_TURN = ("<|end|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>")
PHI3_NAMES = ("phi-3", "phi3")
NAMED_STOPS = (*END_OF_TURN, END_OF_TEXT)
NO_ID = 0xFFFFFFFF  # -1 as an unsigned number: some writers' word for "none"
STOPS_KEY = "phijax.stop_ids"  # all of them, where the format's three keys and the names do not say all


def open_tokenizer(file: GgufFile) -> TextTokenizer:
    """Raises: UserError where the file has none, or one of a kind that is not read."""
    kind = file.metadata.get(PREFIX + "model", "none")
    if kind in ("none", "no_vocab"):
        raise UserError(f"{file.path} has no tokenizer.")
    tokens, types = _tokens(file)
    if kind == "gpt2":
        merges = file.metadata.get(PREFIX + "merges")
        if not isinstance(merges, list):
            raise UserError(f"{file.path} has no {PREFIX}merges.")
        pre = str(file.metadata.get(PREFIX + "pre", "default"))
        end = _end_of_text(file, tokens)
        return BpeTokenizer.from_gguf(tokens, merges, types.tolist(), pre, str(file.path), end_of_text=end)
    if kind == "llama":
        return _sentencepiece(file, tokens, types)
    raise UserError(f"{file.path} has a tokenizer of kind {kind!r}; read are 'llama' (SentencePiece) and 'gpt2' (BPE).")


def stop_ids(file: GgufFile, vocab_size: int) -> tuple[int, ...]:
    """Ids that end a text: those that the file names, and control tokens known by their names."""
    more = file.metadata.get(STOPS_KEY)
    named = [token_id(file, f"{PREFIX}{key}_token_id", vocab_size) for key in ("eos", "eot", "eom")]
    for i in more.tolist() if isinstance(more, np.ndarray) else []:
        named.append(_checked(file, STOPS_KEY, i, vocab_size))
    tokens = file.metadata.get(PREFIX + "tokens")
    ids = {name: i for i, name in enumerate(tokens if isinstance(tokens, list) else ())}
    by_name = {name: ids[name] for name in (*NAMED_STOPS, *stops_by_names(ids)) if name in ids}
    return tuple(dict.fromkeys([*(i for i in named if i is not None), *by_name.values()]))


def token_id(file: GgufFile, key: str, vocab_size: int) -> int | None:
    """An id that the file names; None where it names none. Raises: UserError for what is the id of no token."""
    value = file.metadata.get(key)
    none = value is None or (type(value) is int and value in (-1, NO_ID))
    return None if none else _checked(file, key, value, vocab_size)


def _checked(file: GgufFile, key: str, value: Any, vocab_size: int) -> int:
    if type(value) is not int or not 0 <= value < vocab_size:
        raise UserError(f"{file.path}: {key}={shown(value)} is the id of no token; it has {vocab_size} tokens.")
    return value


def _tokens(file: GgufFile) -> tuple[list[str], np.ndarray]:
    tokens = file.metadata.get(PREFIX + "tokens")
    types = file.metadata.get(PREFIX + "token_type")
    if not isinstance(tokens, list):
        raise UserError(f"{file.path} has no {PREFIX}tokens.")
    if types is None:
        types = np.full(len(tokens), PieceKind.NORMAL, np.int32)
    if not isinstance(types, np.ndarray) or types.dtype.kind not in "iu" or len(types) != len(tokens):
        raise UserError(f"{file.path}: {PREFIX}token_type does not give one type to each of {len(tokens)} tokens.")
    return tokens, types


def _end_of_text(file: GgufFile, tokens: list[str]) -> str | None:
    """The name of what ends a document. A chat model's eos ends a turn, so <|endoftext|> comes first."""
    eos = file.metadata.get(PREFIX + "eos_token_id")
    if END_OF_TEXT in tokens:
        return END_OF_TEXT
    return tokens[eos] if type(eos) is int and 0 <= eos < len(tokens) else None


def _sentencepiece(file: GgufFile, tokens: list[str], types: np.ndarray) -> Tokenizer:
    """Pieces up to the last normal or byte token are the model's own; control tokens behind them were added."""
    where = str(file.path)
    scores = file.metadata.get(PREFIX + "scores")
    if not isinstance(scores, np.ndarray) or scores.dtype.kind != "f" or len(scores) != len(tokens):
        raise UserError(f"{where}: {PREFIX}scores does not give one score to each of {len(tokens)} tokens.")
    if strange := sorted(set(types.tolist()) - set(PieceKind)):
        raise UserError(f"{where}: {PREFIX}token_type holds {strange[0]}, which is no type of a token.")
    own = np.flatnonzero(np.isin(types, (PieceKind.NORMAL, PieceKind.BYTE)))
    count = int(own[-1]) + 1 if len(own) else 0
    unknown = _unknown(file, count)
    pieces = [Piece(tokens[i], float(scores[i]), _kind(tokens[i], i, types[i], unknown)) for i in range(count)]
    behind = range(count, len(tokens))
    added = {tokens[i]: i for i in behind if types[i] != PieceKind.UNUSED}
    symbols = {name for name, kind in zip(tokens, types, strict=True) if kind == PieceKind.USER_DEFINED}
    # llama.cpp's rule: only the model's name says whether special tokens swallow the whitespace behind them.
    is_phi3 = any(name in str(file.metadata.get("general.name", "")).lower() for name in PHI3_NAMES)
    return Tokenizer(
        put_together(pieces, dummy_space=bool(file.metadata.get(PREFIX + "add_space_prefix", True)), where=where),
        added,
        where=where,
        strips_right=None if is_phi3 else (),
        end_of_text=_end_of_text(file, tokens) or "</s>",
        symbols={name for name in symbols if not looks_like_control(name)},
    )


def _unknown(file: GgufFile, count: int) -> int:
    unknown = file.metadata.get(PREFIX + "unknown_token_id", 0)
    if type(unknown) is not int or not 0 <= unknown < count:
        raise UserError(f"{file.path}: {PREFIX}unknown_token_id={unknown!r} is none of its {count} pieces.")
    return unknown


def _kind(name: str, i: int, kind: int, unknown: int) -> PieceKind:
    """Files of 2024 flag <unk> as control, and </s> as a user's own symbol, which plain text would then become."""
    if i == unknown:
        return PieceKind.UNKNOWN
    control = name in ("<s>", "</s>") or (kind == PieceKind.USER_DEFINED and looks_like_control(name))
    return PieceKind.CONTROL if control else PieceKind(int(kind))
