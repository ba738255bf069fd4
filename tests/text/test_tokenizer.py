"""Text comes back as it was; phi-3's construction; what is refused."""

import json
import pickle
import pydoc_data.topics
import random

import pytest
import sentencepiece

import phijax.text.tokenizer as tokenizer_module
from phijax.errors import UserError
from phijax.text.tokenizer import PHI3_ADDED_TOKENS, Tokenizer
from phijax.text.train_tokenizer import train_tokenizer

CHAPTERS = sorted(pydoc_data.topics.topics.values())[:40]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(CHAPTERS, vocab_size=1000)


def test_construction_is_that_of_phi3(tokenizer, tmp_path):
    assert tokenizer.vocab_size == 1000
    assert list(tokenizer.added_tokens) == list(PHI3_ADDED_TOKENS)
    assert list(tokenizer.added_tokens.values()) == list(range(989, 1000))
    assert tokenizer.end_of_text == 989
    tokenizer.save(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    pieces = [theirs.id_to_piece(i) for i in range(259)]
    assert pieces == ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    assert tokenizer.encode("some text, as before") == theirs.encode("some text, as before")
    assert theirs.encode("a", out_type=str)[0].startswith("▁")  # the dummy space of Llama's models
    assert len(theirs.encode("1234567", out_type=str)) == 8  # a digit a piece, after the dummy space
    assert theirs.encode("\n", out_type=str) == ["▁", "<0x0A>"]  # Llama's newline is a byte


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "   leading and trailing   ",
        "\ttabs\t\tand   runs   of    spaces",
        "one\r\ntwo\r\n\r\nthree\n\n\n  four\r",
        "\nstarts with a newline",
        "Καλημέρα κόσμε, Привет, 你好，世界, こんにちは, مرحبا, नमस्ते, 안녕하세요, สวัสดี",
        "emoji 🎉 and joined 👨‍👩‍👧 and flags 🇪🇺, composed é and decomposed é",
        "\ufeffbyte order mark, nul \x00 and escape \x1b[31m, line\u2028separator, nbsp\u00a0",
        "<|endoftext|><|user|> <s> </s> <unk> <0x0A> are only text",
        "ﬁ ligature, ＦＵＬＬ width, ½",
        "x" * 20_000,
    ],
)
def test_text_comes_back_exactly(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_random_unicode_comes_back_exactly(tokenizer):
    draw = random.Random(0)
    ranges = [(0, 0x7F), (0x80, 0x24F), (0x370, 0x6FF), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF), (9, 13)]
    for _ in range(300):
        text = "".join(chr(draw.randint(*draw.choice(ranges))) for _ in range(draw.randint(0, 60)))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_llamas_mark_for_a_space_is_the_exception(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a▁b")) == "a b"


def test_names_of_added_tokens_in_text_do_not_become_them(tokenizer):
    added = set(tokenizer.added_tokens.values())
    for name in tokenizer.added_tokens:
        assert not added & set(tokenizer.encode(f"before {name} after"))
    assert 1 not in tokenizer.encode("<s>") and 2 not in tokenizer.encode("</s>")


def test_decode_shows_added_tokens(tokenizer):
    ids = [*tokenizer.encode("one"), tokenizer.end_of_text, *tokenizer.encode("two"), tokenizer.end_of_text]
    assert tokenizer.decode(ids) == "one<|endoftext|>two<|endoftext|>"
    for wrong in (1000, -1):
        with pytest.raises(ValueError, match="1000 ids"):
            tokenizer.decode([wrong])


def test_long_text_in_pieces_has_the_ids_of_the_whole(tokenizer, tmp_path, monkeypatch):
    tokenizer.save(tmp_path)
    whole = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    monkeypatch.setattr(tokenizer_module, "_LONGEST_PIECE_OF_TEXT", 50)
    texts = [*CHAPTERS[:5], "\n" * 200, "a\n" * 100, "  \n  " * 60, "no newline " * 30, "\r\n" * 80 + "x" * 300 + "\n"]
    for text in texts:
        assert tokenizer.encode(text) == whole.encode(text)


def test_long_text_where_pieces_hold_newlines(tmp_path, monkeypatch):
    """Models of others may join newlines with words: such a text must not be cut."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CHAPTERS),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=1000,
        model_type="bpe",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        byte_fallback=True,
        minloglevel=2,
    )
    whole = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert any("\n" in whole.id_to_piece(i) for i in range(1000))
    monkeypatch.setattr(tokenizer_module, "_LONGEST_PIECE_OF_TEXT", 50)
    tokenizer = Tokenizer.open(tmp_path / "tokenizer.model")
    for text in CHAPTERS[:5]:
        assert tokenizer.encode(text) == whole.encode(text)


def test_a_lone_surrogate_is_no_text(tokenizer):
    with pytest.raises(ValueError):
        tokenizer.encode("a\ud800b")


def test_the_same_text_trains_the_same_tokenizer(tokenizer, tmp_path):
    again = train_tokenizer(CHAPTERS, vocab_size=1000)
    assert again.fingerprint == tokenizer.fingerprint
    other = train_tokenizer(CHAPTERS[:20], vocab_size=1000)
    assert other.fingerprint != tokenizer.fingerprint
    tokenizer.save(tmp_path)
    assert Tokenizer.open(tmp_path).fingerprint == tokenizer.fingerprint
    assert pickle.loads(pickle.dumps(tokenizer)).fingerprint == tokenizer.fingerprint
    moved = {name: i + 1 for name, i in tokenizer.added_tokens.items()}
    (tmp_path / "added_tokens.json").write_text(json.dumps(moved))
    assert Tokenizer.open(tmp_path).fingerprint != tokenizer.fingerprint


def test_training_skips_no_line(tokenizer):
    # U+2585 is SentencePiece's own: it would skip the line, and then find no text at all.
    assert train_tokenizer(["words ▅ and " * 3], vocab_size=290).vocab_size == 290


def test_a_bare_model_gets_the_eleven_tokens(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    assert Tokenizer.open(tmp_path / "tokenizer.model").fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(
    ("vocab_size", "message"),
    [(200_000, r"Largest that it has: \d+"), (280, r"Smallest that does: \d+"), (100, "leaves no room")],
)
def test_vocab_size_that_the_text_cannot_have(vocab_size, message):
    with pytest.raises(UserError, match=message):
        train_tokenizer(CHAPTERS, vocab_size)


def test_training_on_nothing():
    with pytest.raises(UserError, match="no text to train"):
        train_tokenizer([""], 1000)


def test_what_ends_the_texts_ends_the_training():
    def texts():
        yield CHAPTERS[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_tokenizer(texts(), 1000)


@pytest.mark.parametrize(
    ("added_tokens", "message"),
    [
        ('{"<|user|>": 989}', "have no <|endoftext|>"),
        ('{"<|endoftext|>": 5}', "has id 5, a piece of the model"),
        ('{"<|endoftext|>": 989, "<|end|>": 989}', "the same id 989"),
        ('{"<|endoftext|>": "989"}', "<|endoftext|>='989' must be a whole number"),
        ("{", "is not JSON"),
        ('{"<|endoftext|>": 989, "the": 990}', "takes 'the' out of plain text"),
    ],
)
def test_wrong_added_tokens_are_refused(tokenizer, tmp_path, added_tokens, message):
    tokenizer.save(tmp_path)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    added_tokens = added_tokens.replace('"the"', json.dumps(pieces.id_to_piece(300)))
    (tmp_path / "added_tokens.json").write_text(added_tokens)
    message = message.replace("'the'", repr(pieces.id_to_piece(300)))
    with pytest.raises(UserError) as error:
        Tokenizer.open(tmp_path)
    assert message in str(error.value)


def test_a_model_whose_damage_shows_in_the_librarys_own_message(tokenizer, tmp_path):
    """A flipped bit: the piece's bytes are no UTF-8, nor is the message of the library, which quotes them."""
    tokenizer.save(tmp_path)
    data = (tmp_path / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(data.replace(b"<0x00>", b"<\xf8x00>", 1))
    with pytest.raises(UserError, match="is not a SentencePiece model"):
        Tokenizer.open(tmp_path)


@pytest.mark.parametrize("content", [b"", b"garbage", b'{"model": {"type": "BPE"}}'])
def test_what_is_no_sentencepiece_model_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match="is not a SentencePiece model"):
        Tokenizer.open(tmp_path)


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match="No tokenizer at"):
        Tokenizer.open(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"tokenizer.model does not exist"):
        Tokenizer.open(tmp_path)
