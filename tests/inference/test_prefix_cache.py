"""The next turn of a conversation: what its cache holds is not computed again, and no bit is another."""

import dataclasses

import numpy as np
import pytest
from batch_models import GROUPED, ONE_HEAD, weights

from phijax.inference import programs
from phijax.inference.generator import Generator
from phijax.inference.prefix_cache import PrefixCache, shared
from phijax.inference.sampling import Sampling
from phijax.model.config import LongRope, ModelConfig

C = dataclasses.replace(GROUPED, max_position=2048)
SAMPLING = Sampling(temperature=0, max_tokens=8)


def words(count: int, seed: int = 0, c: ModelConfig = C) -> list[int]:
    return np.random.default_rng(seed).integers(0, c.vocab_size, count).tolist()


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """How many tokens of prompts each chunk had that was computed."""
    counts, prefill = [], programs.prefill

    def counting(*arguments):
        counts.append(int(arguments[8]))
        return prefill(*arguments)

    monkeypatch.setattr(programs, "prefill", counting)
    return counts


def conversation(generator: Generator, turns: list[list[int]], kept: PrefixCache | None, sampling=SAMPLING):
    """Each turn behind all before it and their answers -> results, with logits."""
    prompt, found = [], []
    for turn in turns:
        prompt = prompt + turn
        pieces = list(generator.stream([prompt], sampling, kept=kept, with_logits=True))
        found.append((pieces[-1].result, np.stack([piece.logits for piece in pieces])))
        prompt = prompt + list(pieces[-1].result.tokens)
    return found


def assert_same(got, expected):
    for (a, a_logits), (b, b_logits) in zip(got, expected, strict=True):
        assert a == b
        np.testing.assert_array_equal(a_logits, b_logits)


@pytest.mark.parametrize(
    "c, cache_dtype",
    [
        (C, "auto"),
        pytest.param(C, "int8", marks=pytest.mark.slow),
        pytest.param(dataclasses.replace(ONE_HEAD, max_position=2048), "auto", marks=pytest.mark.slow),
    ],
)
def test_turns_have_the_bits_that_they_have_alone(c, cache_dtype, computed):
    """The third turn needs a longer cache; of the first two nothing but the end of a chunk is computed again."""
    generator = Generator(c, weights(c), cache_dtype=cache_dtype)
    turns = [words(300, 0, c), words(40, 1, c), words(500, 2, c)]
    expected = conversation(generator, turns, None)
    assert sum(computed) == 300 + 348 + 856
    computed.clear()
    got = conversation(generator, turns, PrefixCache())
    assert_same(got, expected)
    assert sum(computed) == 300 + (348 - 256) + (856 - 256)


def test_what_is_no_continuation_begins_anew(computed):
    generator, kept = Generator(C, weights(C)), PrefixCache()
    for prompt, anew in (
        (words(700), 700),
        (words(700, 1), 700),  # another conversation
        (words(700, 1)[:600] + words(200, 2), 800 - 512),  # the last message was another
        (words(700, 1)[:300], 300 - 256),  # a shorter one: 256, 16, 16, 12
        (words(700, 1)[:300], 12),  # the same again: 256, 16, 16, and the last chunk
    ):
        computed.clear()
        (got,) = generator.generate([prompt], SAMPLING, kept=kept)
        assert sum(computed) == anew
        assert [got] == generator.generate([prompt], SAMPLING)


def test_of_a_stream_that_was_left_nothing_is_kept(computed):
    generator, kept, prompt = Generator(C, weights(C)), PrefixCache(), words(300)
    stream = generator.stream([prompt], SAMPLING, kept=kept)
    next(stream)
    stream.close()
    computed.clear()
    (got,) = generator.generate([prompt], SAMPLING, kept=kept)
    assert sum(computed) == 300 and [got] == generator.generate([prompt], SAMPLING)


@pytest.mark.parametrize("lengths", [(560, 60, 20), (560, 100, 20)], ids=["in an answer", "between two turns"])
def test_where_longrope_switches_the_cache_is_of_one_list(lengths):
    half = C.head_dim // 2
    rope = LongRope(
        short_factor=tuple(1 + 0.01 * i for i in range(half)),
        long_factor=tuple(1 + 0.5 * i for i in range(half)),
        original_max_position=630,
    )
    c = dataclasses.replace(C, long_rope=rope)
    generator = Generator(c, weights(C), long_rope="per_sequence")
    turns = [words(length, seed) for seed, length in enumerate(lengths)]
    assert_same(conversation(generator, turns, PrefixCache()), conversation(generator, turns, None))


TEXT = words(900)


@pytest.mark.parametrize(
    "before, ids, expected",
    [
        (TEXT[:700], TEXT[:700], 512),  # 256, 256, 188: all but the last chunk
        (TEXT[:700], TEXT[:800], 512),  # the third has 256 tokens now
        (TEXT[:348], TEXT[:340], 336),  # 256, 64, 16, 4
        (TEXT[:256], TEXT[:257], 256),
        (TEXT[:256], TEXT[:256], 0),  # its only chunk is its last
        (TEXT[:255], TEXT[:300], 0),  # place 255 was the answer's
        (TEXT[1:300], TEXT[:300], 0),
        ([], TEXT[:300], 0),
    ],
)
def test_shared(before, ids, expected):
    assert shared(before, ids) == expected
