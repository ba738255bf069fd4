"""A SentencePiece model's file, taken apart and put together: what the library does not tell about its pieces.

The file is one protocol buffer message, sentencepiece_model.proto's ModelProto: field 1 a piece (1 text, 2 score,
3 kind), 2 the trainer's settings (3 model type, 24 spaces go behind words, 35 byte fallback), 3 the normalizer's
(1 name, 2 rules, 3 dummy space, 4 spaces are removed, 5 spaces are escaped).
"""

import dataclasses
import enum
import struct
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from phijax.errors import UserError


class PieceKind(enum.IntEnum):
    """SentencePiece's and GGUF's numbers for the same kinds."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Piece(NamedTuple):
    text: str
    score: float
    kind: PieceKind


@dataclasses.dataclass(frozen=True)
class PieceModel:
    """`pieces` in the order of their ids; `joins`: a BPE model (the other kind, unigram, has no merges).

    `dummy_space`: a space is put before every text. `changes_text`: characters are folded, spaces removed or put
    elsewhere. `byte_fallback`: what no piece holds becomes bytes.
    """

    pieces: tuple[Piece, ...]
    joins: bool
    dummy_space: bool
    changes_text: bool
    byte_fallback: bool


def take_apart(model: bytes) -> PieceModel:
    """The contents of a model that the library has loaded."""
    pieces, trainer, normalizer = [], {}, {}
    for field, value in _fields(model):
        if field == 1:
            piece = dict(_fields(value))
            score = struct.unpack("<f", piece.get(2, bytes(4)))[0]
            pieces.append(Piece(piece[1].decode(), score, PieceKind(piece.get(3, PieceKind.NORMAL))))
        elif field == 2:
            trainer = dict(_fields(value))
        elif field == 3:
            normalizer = dict(_fields(value))
    folds = normalizer.get(2) or normalizer.get(4, True)
    return PieceModel(
        tuple(pieces),
        joins=trainer.get(3, _UNIGRAM) == _BPE,
        dummy_space=bool(normalizer.get(3, True)),
        changes_text=bool(folds or trainer.get(24) or not normalizer.get(5, True)),
        byte_fallback=bool(trainer.get(35)),
    )


def charsmap(model: bytes) -> bytes:
    """The table by which a model folds characters; b"" where it has none."""
    normalizer = next((dict(_fields(value)) for field, value in _fields(model) if field == 3), {})
    return normalizer.get(2, b"")


def user_defined(model: bytes) -> dict[str, int]:
    """Pieces that a model takes out of every text whole -> their ids."""
    # Field 3, a piece's kind, is 4: most models have none, and need not be taken apart for it.
    if b"\x18\x04" not in model:
        return {}
    pieces = take_apart(model).pieces
    return {piece.text: i for i, piece in enumerate(pieces) if piece.kind == PieceKind.USER_DEFINED}


def with_control(model: bytes, ids: Collection[int]) -> bytes:
    """The model with these pieces as control pieces, which it makes of no text."""
    out, number, at = [], 0, 0
    while at < len(model):
        start = at
        key, at = _read_varint(model, at)
        length, at = _read_varint(model, at)
        content, at = model[at : at + length], at + length
        if key == (1 << 3 | 2) and number in ids:
            piece = dict(_fields(content))
            content = _text(1, piece[1].decode()) + b"\x15" + piece.get(2, bytes(4)) + _number(3, PieceKind.CONTROL)
            out.append(_message(1, content))
        else:
            out.append(model[start:at])
        number += key == (1 << 3 | 2)
    return b"".join(out)


def interchangeable(a: bytes, b: bytes) -> bool:
    """Whether two models are known to give every text the same ids, though their files differ in what decides none.

    Models with rules for characters are compared byte by byte.
    """
    if a == b:
        return True
    first = take_apart(a)
    return not first.changes_text and first == take_apart(b)


_UNIGRAM, _BPE = 1, 2


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field; numbers as they are, everything else as its bytes."""
    at = 0
    while at < len(message):
        key, at = _read_varint(message, at)
        kind = key & 7
        if kind == 0:
            value, at = _read_varint(message, at)
        else:
            length = {1: 8, 5: 4}.get(kind)
            if length is None:
                length, at = _read_varint(message, at)
            value = message[at : at + length]
            at += length
        yield key >> 3, value


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7


def put_together(pieces: Sequence[Piece], *, dummy_space: bool, where: str) -> bytes:
    """A SentencePiece BPE model with these pieces and Llama's settings: text is not folded, no space is lost.

    Raises UserError, naming `where`, when no piece stands for what is unknown.
    """
    unknown = next((i for i, piece in enumerate(pieces) if piece.kind == PieceKind.UNKNOWN), None)
    if unknown is None:
        raise UserError(f"{where} has {len(pieces)} tokens and none of kind 2, unknown: no SentencePiece vocabulary.")
    bytes_known = any(piece.kind == PieceKind.BYTE for piece in pieces)
    trainer = _number(3, _BPE) + _number(4, len(pieces)) + _number(35, bytes_known) + _number(40, unknown)
    normalizer = _text(1, "identity") + _number(3, dummy_space) + _number(4, False) + _number(5, True)
    out = [
        _message(1, _text(1, piece.text) + b"\x15" + struct.pack("<f", piece.score) + _number(3, piece.kind))
        for piece in pieces
    ]
    return b"".join([*out, _message(2, trainer), _message(3, normalizer)])


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(int(value))


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _text(field: int, value: str) -> bytes:
    return _message(field, value.encode())
