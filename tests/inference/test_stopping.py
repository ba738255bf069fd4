"""Text of a row while it grows: stop texts over token borders, characters that several tokens share."""

import itertools

import numpy as np
import pytest

from phijax.inference.stopping import Continuation
from phijax.text.stream import TextStream


class Pieces:
    """A tokenizer whose ids stand for given bytes."""

    def __init__(self, *pieces: bytes):
        self.pieces, self.vocab_size = pieces, len(pieces)

    def token_bytes(self, id: int, first: bool = False) -> bytes:
        return self.pieces[id]

    def begins_behind(self, previous: int | None) -> bool:
        return previous is None


def grown(tokenizer: Pieces, ids, stop=(), stop_ids=(), max_tokens=100) -> tuple[list[str], Continuation]:
    row = Continuation(
        TextStream(tokenizer), stop=stop, stop_ids=stop_ids, max_tokens=max_tokens, known=tokenizer.vocab_size
    )
    texts = []
    for i in ids:
        if row.finish is None:
            texts.append(row.add(i, -1.0))
    return texts, row


def test_ids_of_rows_without_a_token_make_no_text():
    texts, row = grown(Pieces(b"a", b"b"), [0, 2, 1, 3])
    assert texts == ["a", "", "b", ""] and row.tokens == [0, 2, 1, 3]


def test_a_stop_text_over_token_borders_is_not_part_of_the_answer():
    tokenizer = Pieces(b"Hello ", b"EN", b"D of", b" it", b"E", b"ND")
    texts, row = grown(tokenizer, [0, 1, 3, 4, 5, 3], stop=["END"])
    assert texts == ["Hello ", "", "EN it", "", ""]  # what might begin the stop text waits
    assert row.result().text == "Hello EN it" and row.result().finish_reason == "stop"
    assert row.result().tokens == (0, 1, 3, 4, 5)


def test_the_earliest_of_several_stop_texts_ends_it():
    _, row = grown(Pieces(b"one two three"), [0], stop=["three", "two"])
    assert row.result().text == "one "


def test_half_a_character_waits_and_a_broken_one_is_marked():
    snow = "☃".encode()
    texts, row = grown(Pieces(snow[:1], snow[1:], b"!"), [0, 1, 2, 0], max_tokens=4)
    assert texts == ["", "☃", "!", "\ufffd"]
    assert row.result().finish_reason == "length"


def test_stop_ids_add_no_text_and_what_waited_is_given():
    texts, row = grown(Pieces(b"EN", b"<end>"), [0, 1], stop=["END"], stop_ids=[1])
    assert texts == ["", "EN"] and row.result().finish_reason == "stop" and row.result().tokens == (0, 1)


def test_ids_without_a_token_add_no_text():
    texts, _ = grown(Pieces(b"a"), [0, 7, 0])
    assert texts == ["a", "", "a"]


@pytest.mark.parametrize("seed", range(20))
def test_streamed_texts_joined_are_the_text_up_to_the_first_stop(seed):
    """Random pieces of an alphabet in which stop texts overlap themselves, against str.find on the whole."""
    rng = np.random.default_rng(seed)
    pieces = ["".join(p) for n in (1, 2, 3) for p in itertools.product("abé", repeat=n)]
    tokenizer = Pieces(*(piece.encode() for piece in pieces))
    ids = rng.integers(0, len(pieces), 40).tolist()
    stops = ["".join(rng.choice(list("abé"), rng.integers(2, 6))) for _ in range(3)]
    texts, row = grown(tokenizer, ids, stop=stops, max_tokens=40)
    whole = "".join(pieces[i] for i in ids)
    # The token that completes a stop text ends the answer; of several in it, the one that begins first.
    ends = [at + len(stop) for stop in stops if (at := whole.find(stop)) >= 0]
    expected = whole
    if ends:
        length = next(n for n in itertools.accumulate(len(pieces[i]) for i in ids) if n >= min(ends))
        expected = whole[: min(at for stop in stops if (at := whole[:length].find(stop)) >= 0)]
    assert "".join(texts) == row.result().text == expected
