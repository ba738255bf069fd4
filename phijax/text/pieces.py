"""A SentencePiece model is loaded and checked against the tokens added to it; phi-3's eleven."""

import struct
from collections.abc import Collection, Mapping

import sentencepiece

from phijax.errors import UserError
from phijax.storage.strict_json import named, shown
from phijax.text.sentencepiece_model import charsmap, take_apart
from phijax.text.special_files import ADDED_TOKENS_FILE
from phijax.text.tokenizer_bounds import charsmap_growth, check_growth

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


def phi3_strips_right(added_tokens: Mapping[str, int], pieces: sentencepiece.SentencePieceProcessor) -> frozenset[str]:
    """phi-3's rule of July 2024, where a checkpoint says nothing: all but <|endoftext|>, and </s>."""
    end = pieces.eos_id()
    return frozenset(added_tokens) - {END_OF_TEXT} | ({pieces.id_to_piece(end)} if end >= 0 else frozenset())


def own_specials(pieces: sentencepiece.SentencePieceProcessor) -> dict[str, int]:
    """<unk>, <s> and </s>: what no text becomes, by name."""
    ids = range(pieces.get_piece_size())
    return {pieces.id_to_piece(i): i for i in ids if pieces.is_control(i) or pieces.is_unknown(i)}


def load_pieces(model: bytes, where: str) -> sentencepiece.SentencePieceProcessor:
    try:
        # An empty model loads without an error and then prints one at every call.
        pieces = sentencepiece.SentencePieceProcessor(model_proto=model) if model else None
    except (RuntimeError, UnicodeDecodeError):  # the second: of its message, which may quote a damaged piece
        pieces = None
    if pieces is None or pieces.get_piece_size() == 0:
        raise UserError(
            f"{where} is not a SentencePiece model ({len(model)} bytes).\n"
            "phi-3-mini, phi-3-medium, phi-3.5-mini and Llama-2 come with one, named tokenizer.model."
        )
    try:
        take_apart(model)  # the library looks at a piece only when it is asked for
    except (ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        raise UserError(f"{where} is damaged: its pieces cannot be read ({error}).") from error
    check_growth(charsmap_growth(charsmap(model)), where)
    return pieces


def check_added_tokens(
    added_tokens: Mapping[str, int],
    pieces: sentencepiece.SentencePieceProcessor,
    own: Mapping[str, int],
    end_of_text: str,
    where: str,
    symbols: Collection[str] = (),
) -> None:
    """`own`: names that the model has and makes of no text, or that are taken out of it before. Raises: UserError."""
    if end_of_text not in added_tokens and end_of_text not in own:
        raise UserError(
            f"The added tokens of {where} have no {named(end_of_text)}, which must end every document.\n"
            f"They are: {', '.join(map(named, added_tokens)) or 'none'}. Add it to {ADDED_TOKENS_FILE} beside the "
            "model; without that file phi-3's eleven tokens are put behind the model's pieces."
        )
    num_pieces, seen = pieces.get_piece_size(), {}
    for text, i in added_tokens.items():
        if i in seen:
            raise UserError(f"{where}: the added tokens {shown(seen[i])} and {shown(text)} have the same id {i}.")
        seen[i] = text
        if i < 0 or (i < num_pieces and pieces.id_to_piece(i) != text):
            raise UserError(
                f"{where}: the added token {shown(text)} has id {i}, a piece of the model, which has {num_pieces}.\n"
                f"{ADDED_TOKENS_FILE} belongs to another model."
            )
        piece = pieces.piece_to_id(text)
        if text not in symbols and piece != pieces.unk_id() and not pieces.is_control(piece):
            # A document about chat models would then hold control tokens.
            raise UserError(f"{where}: the model takes {shown(text)} out of plain text. Train or give another one.")
