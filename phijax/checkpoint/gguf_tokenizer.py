"""The tokenizer inside a GGUF file: its arrays -> a tokenizer of ours. The other way is gguf_vocabulary.py."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from phijax.checkpoint.gguf_file import GgufFile
from phijax.errors import UserError
from phijax.text.bpe import BpeTokenizer
from phijax.text.sentencepiece_model import (
    BPE,
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    SentencePieceModel,
)
from phijax.text.tokenizer import END_OF_TEXT, TextTokenizer, Tokenizer

PREFIX = "tokenizer.ggml."

# What ends an answer, by name: llama.cpp stops at these too, whichever id the file calls eos (phi-3's files of 2024
# name <|endoftext|>, and their answers end with <|end|>).
END_OF_TURN = ("<|end|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>")
_STOPS = (*END_OF_TURN, END_OF_TEXT)


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


def stop_ids(file: GgufFile) -> tuple[int, ...]:
    """Ids that end a text: those that the file names, and control tokens known by their names."""
    named = [file.metadata.get(f"{PREFIX}{key}_token_id") for key in ("eos", "eot", "eom")]
    tokens = file.metadata.get(PREFIX + "tokens")
    count = len(tokens) if isinstance(tokens, list) else 0
    if wrong := [i for i in named if i is not None and (type(i) is not int or not 0 <= i < max(count, 1))]:
        raise UserError(f"{file.path} names {wrong[0]!r} as the id that ends a text; it has {count} tokens.")
    by_name = {name: i for i, name in enumerate(tokens or ()) if name in _STOPS}
    return tuple(dict.fromkeys([*(i for i in named if i is not None), *by_name.values()]))


def _tokens(file: GgufFile) -> tuple[list[str], np.ndarray]:
    tokens = file.metadata.get(PREFIX + "tokens")
    types = file.metadata.get(PREFIX + "token_type")
    if not isinstance(tokens, list):
        raise UserError(f"{file.path} has no {PREFIX}tokens.")
    if types is None:
        types = np.full(len(tokens), NORMAL, np.int32)
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
    scores = file.metadata.get(PREFIX + "scores")
    if not isinstance(scores, np.ndarray) or scores.dtype.kind != "f" or len(scores) != len(tokens):
        raise UserError(f"{file.path}: {PREFIX}scores does not give one score to each of {len(tokens)} tokens.")
    own = np.flatnonzero(np.isin(types, (NORMAL, BYTE)))
    count = int(own[-1]) + 1 if len(own) else 0
    ids = {name: _id(file.metadata, f"{name}_token_id", default, count) for name, default in _OWN_IDS.items()}
    ids["eos"] = tokens.index("</s>") if "</s>" in tokens[:count] else ids["eos"]
    kinds = types[:count].tolist()
    for name, i in ids.items():
        if i >= 0:
            kinds[i] = UNKNOWN if name == "unknown" else CONTROL
    model = SentencePieceModel(
        pieces=tuple(tokens[:count]),
        scores=tuple(scores[:count].tolist()),
        types=tuple(kinds),
        model_type=BPE,
        byte_fallback=BYTE in kinds,
        add_dummy_prefix=bool(file.metadata.get(PREFIX + "add_space_prefix", True)),
        unk_id=ids["unknown"],
        bos_id=ids["bos"],
        eos_id=ids["eos"],
    )
    if ids["unknown"] < 0:
        raise UserError(f"{file.path}: no token stands for what is unknown ({PREFIX}unknown_token_id).")
    behind = range(count, len(tokens))
    if strange := [tokens[i] for i in behind if types[i] not in (CONTROL, USER_DEFINED, UNUSED)]:
        raise UserError(f"{file.path}: {strange[0]!r} stands behind the vocabulary without being an added token.")
    added = {tokens[i]: i for i in behind if types[i] != UNUSED}
    # llama.cpp's rule: only the model's name says whether special tokens swallow the whitespace behind them.
    is_phi3 = any(name in str(file.metadata.get("general.name", "")).lower() for name in ("phi-3", "phi3"))
    return Tokenizer(
        model.serialise(),
        added,
        where=str(file.path),
        strips_right=None if is_phi3 else (),
        end_of_text=_end_of_text(file, tokens) or "</s>",
    )


_OWN_IDS = {"unknown": 0, "bos": 1, "eos": 2}  # Llama's


def _id(metadata: Mapping[str, Any], key: str, default: int, count: int) -> int:
    """An id among the model's own pieces, or -1: eos may be an added token, as phi-3's is."""
    value = metadata.get(PREFIX + key, default)
    if type(value) is int and 0 <= value < count:
        return value
    return default if default < count else -1
