"""A SentencePiece model file as plain data, both ways: what its library neither tells in full nor builds.

The file is one protocol buffer; field numbers are those of sentencepiece_model.proto. SentencePiece's own Python module
for it cannot be loaded beside transformers' copy: both claim one name in protobuf's pool.
"""

import dataclasses
import struct
from collections.abc import Iterator

# SentencePiece.Type; GGUF's tokenizer.ggml.token_type has the same numbers.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
UNIGRAM, BPE = 1, 2

_VARINT, _DOUBLE, _BYTES, _FLOAT = 0, 1, 2, 5  # wire types


@dataclasses.dataclass(frozen=True)
class SentencePieceModel:
    """pieces, scores, types: one an id. An id of -1: there is no such piece."""

    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    types: tuple[int, ...]
    model_type: int = BPE
    byte_fallback: bool = True
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = False
    treat_whitespace_as_suffix: bool = False
    folds_characters: bool = False  # a table that rewrites text (nmt_nfkc and the like); not kept
    unk_id: int = 0
    bos_id: int = 1
    eos_id: int = 2

    @classmethod
    def parse(cls, model: bytes) -> "SentencePieceModel":
        """Of a file that the library has accepted. Raises: ValueError where it is none."""
        pieces, trainer, normalizer = [], {}, {}
        for number, value in _fields(model):
            if number == 1:
                pieces.append(dict(_fields(value)))
            elif number == 2:
                trainer = dict(_fields(value))
            elif number == 3:
                normalizer = dict(_fields(value))
        return cls(
            pieces=tuple(piece[1].decode() for piece in pieces),
            scores=tuple(piece.get(2, 0.0) for piece in pieces),
            types=tuple(piece.get(3, NORMAL) for piece in pieces),
            model_type=trainer.get(3, UNIGRAM),
            byte_fallback=bool(trainer.get(35, 0)),
            add_dummy_prefix=bool(normalizer.get(3, 1)),
            remove_extra_whitespaces=bool(normalizer.get(4, 1)),
            treat_whitespace_as_suffix=bool(trainer.get(24, 0)),
            folds_characters=bool(normalizer.get(2, b"")),
            unk_id=_signed(trainer.get(40, 0)),
            bos_id=_signed(trainer.get(41, 1)),
            eos_id=_signed(trainer.get(42, 2)),
        )

    def serialise(self) -> bytes:
        """A file that SentencePiece loads."""
        out = bytearray()
        for piece, score, kind in zip(self.pieces, self.scores, self.types, strict=True):
            entry = _length_delimited(1, piece.encode()) + b"\x15" + struct.pack("<f", score) + _number(3, kind)
            out += _length_delimited(1, entry)
        trainer = _number(3, self.model_type) + _number(4, len(self.pieces)) + _number(35, self.byte_fallback)
        trainer += _number(24, self.treat_whitespace_as_suffix)
        for field, name_field, id in ((40, 45, self.unk_id), (41, 46, self.bos_id), (42, 47, self.eos_id)):
            trainer += _number(field, id)
            if id >= 0:
                trainer += _length_delimited(name_field, self.pieces[id].encode())
        trainer += _number(43, -1)  # pad_id
        normalizer = _length_delimited(1, b"identity") + _number(3, self.add_dummy_prefix)
        normalizer += _number(4, self.remove_extra_whitespaces) + _number(5, True)
        return bytes(out + _length_delimited(2, trainer) + _length_delimited(3, normalizer))


def _fields(message: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """(field number, value) of one message, nested ones as bytes."""
    at = 0
    while at < len(message):
        key, at = _read_varint(message, at)
        wire = key & 7
        if wire == _VARINT:
            value, at = _read_varint(message, at)
        elif wire == _BYTES:
            length, at = _read_varint(message, at)
            value, at = message[at : at + length], at + length
        elif wire in (_FLOAT, _DOUBLE):
            form = "<f" if wire == _FLOAT else "<d"
            size = struct.calcsize(form)
            if at + size > len(message):
                raise ValueError("the message ends inside a number")
            value, at = struct.unpack_from(form, message, at)[0], at + size
        else:
            raise ValueError(f"wire type {wire}")
        if at > len(message):
            raise ValueError("the message ends inside a field")
        yield key >> 3, value


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(message) or shift > 63:
            raise ValueError("no whole number")
        byte, at = message[at], at + 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # negative numbers take ten bytes
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3 | _VARINT) + _varint(int(value))


def _length_delimited(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | _BYTES) + _varint(len(value)) + value


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
