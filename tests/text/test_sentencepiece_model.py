"""A SentencePiece model taken apart says what the library says, and put together again gives the same ids."""

import pytest
import sentencepiece
from text_samples import CHAPTERS, PLAIN

from phijax.errors import UserError
from phijax.text.sentencepiece_model import Piece, PieceKind, put_together, take_apart
from phijax.text.tokenizer import Tokenizer


def train(folder, **settings):
    settings = {"model_type": "bpe", "vocab_size": 800, "byte_fallback": True, "minloglevel": 2, **settings}
    prefix = str(folder / "m")
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CHAPTERS), model_prefix=prefix, **settings)
    return (folder / "m.model").read_bytes()


@pytest.mark.parametrize(
    ("settings", "joins", "dummy_space", "changes_text"),
    [
        (dict(normalization_rule_name="identity", remove_extra_whitespaces=False), True, True, False),
        (dict(normalization_rule_name="identity"), True, True, True),
        (dict(remove_extra_whitespaces=False), True, True, True),
        (dict(model_type="unigram", add_dummy_prefix=False), False, False, True),
    ],
)
def test_taken_apart(tmp_path, settings, joins, dummy_space, changes_text):
    model = train(tmp_path, user_defined_symbols=["<mine>"], pad_id=3, **settings)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    parts = take_apart(model)
    assert (parts.joins, parts.dummy_space, parts.changes_text) == (joins, dummy_space, changes_text)
    assert len(parts.pieces) == theirs.get_piece_size()
    for i, piece in enumerate(parts.pieces):
        assert (piece.text, piece.score) == (theirs.id_to_piece(i), theirs.get_score(i))
        assert (piece.kind == PieceKind.BYTE) == theirs.is_byte(i)
        assert (piece.kind == PieceKind.CONTROL) == theirs.is_control(i)
        assert (piece.kind == PieceKind.UNKNOWN) == theirs.is_unknown(i)
    assert [piece.text for piece in parts.pieces if piece.kind == PieceKind.USER_DEFINED] == ["<mine>"]


@pytest.mark.parametrize("dummy_space", [True, False])
def test_put_together(pieces, dummy_space):
    parts = take_apart(pieces._model).pieces
    model = put_together(parts, dummy_space=dummy_space, where="a file")
    again = Tokenizer(model, pieces.added_tokens)
    assert take_apart(model).pieces == parts and take_apart(model).dummy_space is dummy_space
    for text in [*PLAIN, *CHAPTERS]:
        if dummy_space:
            assert again.encode(text) == pieces.encode(text)
        assert again.decode(again.encode(text)) == text


def test_without_an_unknown_piece():
    with pytest.raises(UserError, match="a file has 1 tokens and none of kind 2"):
        put_together([Piece("a", 0.0, PieceKind.NORMAL)], dummy_space=True, where="a file")
