"""Rows that join a running batch and leave it: no answer changes by a bit, and nothing is compiled."""

import dataclasses

import jax
import numpy as np
import pytest
from batch_models import GROUPED, ONE_HEAD, weights
from compilation_count import compilations
from jax.sharding import NamedSharding, PartitionSpec

from phijax.inference import batch as batches
from phijax.inference.generator import Generator
from phijax.inference.sampling import Sampling


class Running:
    """A batch over a generator's weights, and what each of its rows was given."""

    def __init__(self, generator: Generator, slots: int, length: int):
        g = self.generator = generator
        self.slots = slots
        whole = NamedSharding(g.mesh, PartitionSpec())
        self.batch = batches.empty(g.model, g._empty_cache(slots, length), slots, whole)
        self.live: dict[int, str] = {}
        self.given: dict[str, list[tuple]] = {}

    def join(self, slot: int, name: str, ids: list[int], sampling: Sampling) -> None:
        g = self.generator
        frequencies = g._frequencies(len(ids))
        logits, cache = g._filled(ids, frequencies)
        ends = sampling.stop_ids
        row = batches.row(
            g.model, ids, frequencies=frequencies, limit=sampling.max_tokens, sampling=sampling, stop_ids=ends
        )
        self.batch, chosen = batches.enter(g._layout, self.batch, slot, row, cache, logits, own_bits=True)
        self.live[slot], self.given[name] = name, []
        self._take(jax.tree.map(lambda a: np.repeat(a, self.slots, axis=0), jax.device_get(chosen)), [slot])

    def step(self, times: int = 1) -> None:
        g = self.generator
        for _ in range(times):
            arguments = (g.model, g._layout, g._attention_factor, g._weights, self.batch, max(self.live) + 1)
            self.batch, chosen = batches.step(*arguments)
            self._take(jax.device_get(chosen), list(self.live))

    def leave(self, slot: int) -> None:
        self.batch = batches.leave(self.batch, slot)
        del self.live[slot]

    def _take(self, chosen, slots: list[int]) -> None:
        done = np.asarray(self.batch.rows.done)
        for slot in slots:
            self.given[self.live[slot]].append((int(chosen.tokens[slot]), chosen.logprobs[slot], chosen.logits[slot]))
            if done[slot]:
                del self.live[slot]


def ids(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, GROUPED.vocab_size, count).tolist()


def schedule(run: Running, prompts: dict[str, list[int]], samplings: dict[str, Sampling]) -> None:
    """A runs alone in the last slot, beside B, without B; C takes A's slot while D is there; each ends as it ends."""
    last = run.slots - 1

    def join(slot: int, name: str) -> None:
        run.join(slot, name, prompts[name], samplings[name])

    join(last, "a")
    run.step(2)
    join(last - 1, "b")
    run.step(2)
    run.leave(last - 1)  # cancelled
    run.step()
    join(0, "d")
    run.step(2)
    run.leave(last)
    join(last, "c")
    while run.live:
        run.step()


def alone(generator: Generator, prompt: list[int], sampling: Sampling) -> list[tuple]:
    pieces = generator.stream([prompt], [sampling], with_logits=True)
    return [(piece.token, np.float32(piece.logprob), piece.logits) for piece in pieces]


FIRST = {
    "a": Sampling(max_tokens=30, temperature=0),
    "b": Sampling(max_tokens=30, temperature=1, top_k=40, top_p=0.9, repetition_penalty=1.3, seed=1),
    "c": Sampling(max_tokens=4, temperature=1.4, seed=2),
    "d": Sampling(max_tokens=9, temperature=0.6, min_p=0.02, seed=3),
}
SECOND = {
    "a": Sampling(max_tokens=20, temperature=0.9, top_p=0.5, seed=2**32 - 1),
    "b": Sampling(max_tokens=20, temperature=0),
    "c": Sampling(max_tokens=12, temperature=0, repetition_penalty=1.5),
    "d": Sampling(max_tokens=5, temperature=2, min_p=0.05),
}


@pytest.mark.parametrize(
    ("c", "slots", "longest"),
    [(GROUPED, 2, 38), pytest.param(ONE_HEAD, 4, 270, marks=pytest.mark.slow)],
    ids=["grouped", "one kv head, window, tied, over two pieces"],
)
def test_rows_come_and_go_and_no_answer_changes_by_a_bit(c, slots, longest):
    g = Generator(c, weights(c))
    lengths = {"a": 30, "b": 5, "c": longest, "d": 17}
    length = 256 if longest < 200 else 512
    first = Running(g, slots, length)
    schedule(first, {name: ids(n, n) for name, n in lengths.items()}, FIRST)
    # Other texts, as long but for places of a chunk, and other settings.
    again = Running(g, slots, length)
    prompts = {name: ids(n + 3, n + 1) for name, n in lengths.items()}
    # One that ends by an id; which one it will be, the row says that has no such id.
    stop = alone(g, prompts["c"], SECOND["c"])[3][0]
    samplings = SECOND | {"c": dataclasses.replace(SECOND["c"], stop_ids=(stop, 2**30))}
    with compilations() as seen:
        schedule(again, prompts, samplings)
    assert seen == []
    for run, of, asked in ((first, {n: ids(k, k) for n, k in lengths.items()}, FIRST), (again, prompts, samplings)):
        for name, sampling in asked.items():
            expected, got = alone(g, of[name], sampling), run.given[name]
            assert 0 < len(got) <= len(expected) and (name in "ab" or len(got) == len(expected))
            for (token, logprob, logits), (their_token, their_logprob, their_logits) in zip(
                got, expected, strict=False
            ):
                assert (token, logprob) == (their_token, their_logprob)
                np.testing.assert_array_equal(logits[: c.vocab_size], their_logits)
    assert len(again.given["c"]) <= 4 and again.given["c"][-1][0] == stop


def test_a_row_that_is_longer_than_the_cache_is_refused():
    run = Running(Generator(GROUPED, weights(GROUPED)), 2, 256)
    with pytest.raises(AssertionError, match="longer than the cache"):
        run.join(0, "a", ids(30, 0), Sampling(max_tokens=227))
