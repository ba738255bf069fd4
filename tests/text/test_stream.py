"""Text that streams: whole characters only, and in sum what decode gives."""

import random

import pytest
from text_samples import PLAIN, SPECIAL, random_text

from phijax.text.stream import TextStream


@pytest.fixture(params=["pieces", "byte_level"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def chunks(draw, ids):
    while ids:
        count = draw.randint(0, 3)
        yield ids[:count]
        ids = ids[count:]


def streamed(tokenizer, ids, draw, before=()):
    stream = TextStream(tokenizer, before)
    parts = [stream.push(chunk) for chunk in chunks(draw, list(ids))]
    return [*parts, stream.finish()]


def test_it_is_what_decode_gives_in_whole_characters(tokenizer):
    draw = random.Random(0)
    texts = [*PLAIN, *SPECIAL, *(random_text(draw) for _ in range(1000))]
    for text in texts:
        ids = tokenizer.encode(text)
        parts = streamed(tokenizer, ids, draw)
        assert "".join(parts) == tokenizer.decode(ids) == text
        assert not any("\ufffd" in part for part in parts)
        assert parts[-1] == ""


def test_any_ids_at_all(tokenizer):
    """Models write what they like: bytes that are no characters, control tokens, in any order."""
    draw = random.Random(1)
    for _ in range(2000):
        # Bytes more often than a model writes them: they lie at the front of both vocabularies.
        ids = [draw.randrange(260 if draw.random() < 0.7 else tokenizer.vocab_size) for _ in range(draw.randint(0, 12))]
        assert "".join(streamed(tokenizer, ids, draw)) == tokenizer.decode(ids)


def test_a_continuation_keeps_its_space(tokenizer):
    """The text of a continuation is what the whole has more than its beginning."""
    draw = random.Random(2)
    for text in PLAIN:
        ids = tokenizer.encode(text)
        for cut in range(len(ids)):
            before = tokenizer.decode(ids[:cut])
            if "\ufffd" in before:  # the beginning ends inside a character
                continue
            assert before + "".join(streamed(tokenizer, ids[cut:], draw, before=ids[:cut])) == text


def test_half_a_character_waits(tokenizer):
    ids = tokenizer.encode("🦜")  # not in the vocabulary: a token a byte
    stream = TextStream(tokenizer)
    parts = [stream.push([i]) for i in ids]
    assert len(ids) >= 4 and parts[-1] == "🦜" and set(parts[:-1]) == {""}
    stream = TextStream(tokenizer)
    assert stream.push(ids[:-1]) == "" and stream.finish() == "\ufffd"


def test_what_is_no_token(tokenizer):
    with pytest.raises(ValueError, match="is not in the tokenizer"):
        TextStream(tokenizer).push([tokenizer.vocab_size])
