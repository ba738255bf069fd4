"""A SentencePiece model taken apart says what the library says, and put together again gives the same ids."""

import pytest
import sentencepiece
from text_samples import CHAPTERS, PLAIN

from phijax.errors import UserError
from phijax.text.sentencepiece_model import Piece, PieceKind, interchangeable, put_together, take_apart
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


def test_models_are_interchangeable_where_what_decides_ids_is_equal(pieces, tmp_path):
    """Not by their bytes: a trainer writes down all of its settings, and we those that count."""
    model, found = pieces._model, take_apart(pieces._model).pieces
    again = put_together(found, dummy_space=True, where="a file")
    assert again != model and interchangeable(again, model) and interchangeable(model, again)
    assert not interchangeable(model, put_together(found, dummy_space=False, where="a file"))
    last = len(found) - 1
    for changed in (
        found[:last],
        found[:last] + (found[last]._replace(score=found[last].score - 1),),
        found[:last] + (found[last]._replace(text="another"),),
        found[:last] + (found[last]._replace(kind=PieceKind.USER_DEFINED),),
        tuple(p._replace(kind=PieceKind.NORMAL) if p.kind == PieceKind.BYTE else p for p in found),
    ):
        assert not interchangeable(model, put_together(changed, dummy_space=True, where="a file"))
    folded = train(tmp_path)
    assert interchangeable(folded, folded)
    assert not interchangeable(folded, put_together(take_apart(folded).pieces, dummy_space=True, where="a file"))


@pytest.mark.parametrize("setting", ["treat_whitespace_as_suffix", "escape_whitespaces"])
def test_spaces_that_lie_elsewhere_change_text(setting, pieces):
    """By protobuf, which is no dependency of ours."""
    messages = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    model = messages.ModelProto.FromString(pieces._model)
    if setting == "escape_whitespaces":
        model.normalizer_spec.escape_whitespaces = False
    else:
        model.trainer_spec.treat_whitespace_as_suffix = True
    assert take_apart(model.SerializeToString()).changes_text
    assert not take_apart(pieces._model).changes_text


def test_without_an_unknown_piece():
    with pytest.raises(UserError, match="a file has 1 tokens and none of kind 2"):
        put_together([Piece("a", 0.0, PieceKind.NORMAL)], dummy_space=True, where="a file")
