"""Filters against transformers' processors; draws against the probabilities that they should have."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phijax.errors import UserError
from phijax.inference.sampling import Sampling, Settings, choose, filtered, penalised

torch = pytest.importorskip("torch")
processors = pytest.importorskip("transformers.generation.logits_process")

VOCABULARY = 500


@functools.lru_cache(maxsize=1)
def logits() -> np.ndarray:
    values = np.random.default_rng(0).standard_normal((4, VOCABULARY)).astype(np.float32) * 3
    values[3, 7] = 20  # one token far above the rest
    return values


def theirs(temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """In the order of GenerationMixin._get_logits_processor: temperature, top-k, top-p, min-p."""
    scores, ids = torch.tensor(logits()), torch.zeros((4, 1), dtype=torch.long)
    steps = [processors.TemperatureLogitsWarper(temperature)]
    steps += [processors.TopKLogitsWarper(top_k)] if top_k else []
    steps += [processors.TopPLogitsWarper(top_p)] if top_p < 1 else []
    steps += [processors.MinPLogitsWarper(min_p)] if min_p else []
    for step in steps:
        scores = step(ids, scores)
    return torch.softmax(scores, -1).numpy()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.9])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(0, 1.0, 0.0), (1, 1.0, 0.0), (40, 1.0, 0.0), (0, 0.9, 0.0), (0, 1e-6, 0.0), (0, 1.0, 0.05), (30, 0.8, 0.1)]
    + [(600, 0.99, 0.0), (0, 1.0, 1.0)],
)
def test_filtered_distributions_are_those_of_transformers(temperature, top_k, top_p, min_p):
    settings = (
        np.full(4, value, kind) for value, kind in ((top_k, np.int32), (top_p, np.float32), (min_p, np.float32))
    )
    ours = filtered(jnp.asarray(logits()) / temperature, *settings)
    expected = theirs(temperature, top_k, top_p, min_p)
    got = np.asarray(jax.nn.softmax(ours))
    np.testing.assert_array_equal(got > 0, expected > 0)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_repetition_penalty_is_that_of_transformers(penalty):
    occurred = np.random.default_rng(1).integers(0, VOCABULARY, (4, 60))
    seen = np.zeros((4, VOCABULARY), bool)
    np.put_along_axis(seen, occurred, True, axis=1)
    expected = processors.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(occurred), torch.tensor(logits()))
    got = penalised(jnp.asarray(logits()), jnp.asarray(seen), np.full(4, penalty, np.float32))
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-6)


def rows_of(samplings, names) -> Settings:
    return jax.tree.map(lambda *parts: np.concatenate(parts), *map(Settings.of, samplings, names))


def zeros(count: int) -> np.ndarray:
    return np.zeros(count, np.int32)


def test_draws_have_their_probabilities_and_keep_to_the_filter():
    """20,000 rows draw once each from one distribution; the count of a token is within five deviations of its mean."""
    count = 20_000
    row = jnp.asarray(np.log([0.5, 0.25, 0.15, 0.07, 0.03]), jnp.float32)
    sampling = Sampling(temperature=1, top_k=3)
    tokens, logprobs = jax.jit(choose)(
        rows_of([sampling] * count, range(count)), jnp.tile(row, (count, 1)), np.zeros((count, 5), bool), zeros(count)
    )
    found = np.bincount(tokens, minlength=5)
    expected = np.array([0.5, 0.25, 0.15, 0, 0]) / 0.9 * count
    assert np.all(np.abs(found - expected) <= 5 * np.sqrt(expected))
    np.testing.assert_allclose(logprobs, row[tokens], rtol=1e-5)  # the model's own, whatever was filtered


def test_greedy_takes_the_first_of_the_likeliest():
    tokens, _ = choose(
        rows_of([Sampling(temperature=0)] * 4, range(4)),
        jnp.asarray(logits()),
        np.zeros((4, VOCABULARY), bool),
        zeros(4),
    )
    np.testing.assert_array_equal(tokens, logits().argmax(-1))


DIFFERENT = [
    {"temperature": 0},
    {"temperature": 0.7, "seed": 4},
    {"temperature": 1.3, "top_k": 7},
    {"temperature": 0.9, "top_p": 0.6, "seed": 9},
    {"temperature": 0, "repetition_penalty": 1.7},
    {"temperature": 1.1, "min_p": 0.1, "repetition_penalty": 0.6},
    {"temperature": 1, "top_p": 0},
    {"temperature": 2, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2, "seed": 2**32 - 1},
]


@pytest.mark.parametrize("one_by_one", [True, False])
def test_a_row_has_its_own_settings_whatever_its_neighbours_ask(one_by_one):
    """All together by one program, each alone by one; where rows are computed one by one, to the last bit."""
    rng = np.random.default_rng(5)
    rows = rng.standard_normal((len(DIFFERENT), VOCABULARY)).astype(np.float32) * 3
    seen = rng.random(rows.shape) < 0.3
    settings = rows_of([Sampling(**each) for each in DIFFERENT], range(len(DIFFERENT)))
    given = np.arange(len(DIFFERENT), dtype=np.int32)
    together = compiled(settings, rows, seen, given, np.int32(len(given)) if one_by_one else None)
    for i in range(len(DIFFERENT)):
        one, *rest = jax.tree.map(lambda a, i=i: np.repeat(a[i : i + 1], 2, axis=0), (settings, rows, seen, given))
        tokens, logprobs = compiled(one, *rest, np.int32(1) if one_by_one else None)
        assert tokens[0] == together[0][i]
        np.testing.assert_allclose(logprobs[0], together[1][i], rtol=0, atol=0 if one_by_one else 1e-6)
    assert len(set(together[0].tolist())) > 3


compiled = jax.jit(choose)


def choice(sampling: Sampling) -> list[int]:
    """A token for each of five rows; in the last two of 500 are close: 5e-7 apart, two steps of float32."""
    rows = np.concatenate([logits(), np.zeros((1, VOCABULARY), np.float32)])
    rows[4, 3], rows[4, 9] = 2.0, np.nextafter(np.nextafter(np.float32(2), 3), 3)
    rows = np.concatenate([rows, np.full((5, 12), -np.inf, np.float32)], axis=1)  # as where the vocabulary is padded
    tokens, logprobs = compiled(rows_of([sampling] * 5, range(5)), rows, np.zeros(rows.shape, bool), zeros(5))
    assert np.isfinite(logprobs).all()
    return tokens.tolist()


@pytest.mark.parametrize("kind", [float, np.float32])
@pytest.mark.parametrize("temperature", [1e-10, 1.1e-30, 1e-30, 1e-37, 1e-38, 1e-40, 1e-45, 1e-300])
def test_the_smallest_temperatures_take_the_likeliest(temperature, kind):
    """Whether the division would overflow, float32 holds them as subnormals, or not at all."""
    greedy = choice(Sampling(temperature=0))
    assert greedy[4] == 9
    for more in ({}, {"top_k": 2, "top_p": 0.9, "min_p": 0.1}):
        assert choice(Sampling(temperature=kind(temperature), seed=5, **more)) == greedy


@pytest.mark.parametrize(
    ("odd", "same"),
    [
        ({"top_k": 10**11}, {}),
        ({"top_k": np.int64(2**31)}, {}),
        ({"temperature": 1e39}, {"temperature": 1e20}),
        ({"temperature": np.float64(0.5)}, {"temperature": 0.5}),
        ({"temperature": np.float32(0.5), "top_k": np.int64(7)}, {"temperature": 0.5, "top_k": 7}),
        ({"top_p": 1 - 1e-12}, {}),
        ({"min_p": 1e-46}, {}),
        ({"repetition_penalty": 1 + 1e-12}, {}),
    ],
)
def test_numbers_at_the_edge_of_their_types_mean_what_they_say(odd, same):
    assert choice(Sampling(seed=3, **odd)) == choice(Sampling(seed=3, **same))


def test_the_likeliest_stays_whatever_top_p_rounds_to():
    assert choice(Sampling(temperature=1, top_p=1e-46)) == choice(Sampling(temperature=0))


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": -1},
        {"max_tokens": 2.5},
        {"max_tokens": True},
        {"max_tokens": "8"},
        {"max_tokens": None},
        {"temperature": -1},
        {"temperature": "hot"},
        {"temperature": "0.5"},
        {"temperature": np.array([0.5])},
        {"temperature": False},
        {"temperature": np.True_},
        {"temperature": 10**400},
        {"temperature": math.inf},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_k": 40.0},
        {"top_k": np.float32(40)},
        {"top_k": math.nan},
        {"top_p": -0.1},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"min_p": None},
        {"min_p": 1j},
        {"repetition_penalty": math.nan},
        {"seed": 2**32},
        {"seed": 0.0},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"repetition_penalty": 1e39},
        {"repetition_penalty": 1e-46},
        {"seed": -1},
        {"stop": ("",)},
        {"stop": ""},
        {"stop": None},
        {"stop": 5},
        {"stop": b"no"},
        {"stop": ["no", 5]},
        {"stop": {"no": 1}},
        {"stop_ids": [1.5]},
        {"stop_ids": "12"},
        {"stop_ids": b"12"},
        {"stop_ids": [True]},
        {"stop_ids": -1},
        {"stop_ids": None},
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_what_was_given_alone_or_as_numpy_has_it_is_what_it_says():
    given = Sampling(np.int64(3), np.float32(0.5), np.uint8(7), 1, jnp.float32(0), 1, np.int32(2), "no", np.int64(4))
    assert given == Sampling(3, 0.5, 7, 1.0, 0.0, 1.0, 2, ("no",), (4,))
    assert all(type(value) in (int, float, tuple) for value in dataclasses.astuple(given))
    several = Sampling(stop=["no", "never"], stop_ids=np.array([4, 5]))
    assert several == Sampling(stop=("no", "never"), stop_ids=(4, 5)) and hash(several)


def test_top_p_of_nothing_takes_the_likeliest():
    assert not Sampling(temperature=1, top_p=0).draws
    assert choice(Sampling(temperature=1, top_p=0.0)) == choice(Sampling(temperature=0))
