"""The closed forms of phases, mixtures and epochs against an iterator that counts one row at a time."""

import collections
import dataclasses
import itertools

import pytest
from round_robin import sources_one_by_one

from phijax.data import mixture
from phijax.data.mixture import Phase, Source
from phijax.errors import UserError

WEIGHTS = [(1,), (1, 1), (3, 7), (1, 2, 4), (5, 1, 1), (2, 2, 2, 1), (1, 30)]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_closed_forms_equal_the_iterator(weights):
    seen = collections.Counter()
    for row, expected in enumerate(itertools.islice(sources_one_by_one(weights), 5 * sum(weights) + 3)):
        assert mixture.source_of_row(weights, row) == (expected, seen[expected])
        assert [mixture.rows_taken(weights, s, row) for s in range(len(weights))] == [
            seen[s] for s in range(len(weights))
        ]
        seen[expected] += 1


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_pattern_holds_exactly_the_weights_and_stays_close_to_them(weights):
    slots = mixture.pattern(weights)
    assert collections.Counter(slots) == dict(enumerate(weights))
    for taken in range(len(slots) + 1):
        for source, weight in enumerate(weights):
            assert abs(slots[:taken].count(source) - taken * weight / len(slots)) < len(weights)


def test_far_rows_cost_no_more_than_near_ones():
    row = 10**15
    source, before = mixture.source_of_row((3, 7), row)
    assert source == mixture.pattern((3, 7))[0] and before == 7 * 10**14


@pytest.mark.parametrize("num_rows", [1, 2, 3, 10, 97, 256, 1000])
def test_every_epoch_visits_every_row_once_in_an_order_of_its_own(num_rows):
    orders = []
    for epoch in range(3):
        cursors = range(epoch * num_rows, (epoch + 1) * num_rows)
        places = [mixture.shuffled(c, num_rows, seed=1, source_key="abc") for c in cursors]
        assert {e for e, _ in places} == {epoch}
        order = [row for _, row in places]
        assert sorted(order) == list(range(num_rows))
        orders.append(order)
    if num_rows >= 10:
        assert orders[0] != orders[1] != orders[2] != orders[0]
        assert orders[0] != sorted(orders[0])


def test_the_order_depends_on_seed_and_content():
    def order(**key):
        return [mixture.shuffled(c, 50, **key)[1] for c in range(50)]

    assert order(seed=1, source_key="abc") == order(seed=1, source_key="abc")
    assert order(seed=1, source_key="abc") != order(seed=2, source_key="abc")
    assert order(seed=1, source_key="abc") != order(seed=1, source_key="abd")


def test_the_order_is_the_one_of_earlier_versions():
    # A run that is resumed under a newer phijax or Grain must find its rows where they were.
    assert [mixture.shuffled(c, 10, seed=0, source_key="content") for c in range(10)] == [
        (0, row) for row in (4, 3, 9, 1, 6, 5, 8, 2, 7, 0)
    ]
    assert mixture.shuffled(123_456_789, 1_000_003, seed=7, source_key="content") == (123, 961_694)


def test_phase_of_step():
    phases = [Phase(steps=n, sequence_length=8, global_batch_size=1, mixture=(Source("a"),)) for n in (3, 1, 2)]
    assert [mixture.phase_of_step(phases, s) for s in range(6)] == [(0, 0)] * 3 + [(1, 3)] + [(2, 4)] * 2
    assert mixture.total_steps(phases) == 6
    with pytest.raises(IndexError, match="step 6 lies past the 6 steps"):
        mixture.phase_of_step(phases, 6)


GOOD = Phase(steps=1, sequence_length=8, global_batch_size=2, mixture=(Source("a", 1), Source("b", 2)))


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        (dataclasses.replace(GOOD, steps=0), r"data.phases\[1\].steps=0 must be at least 1"),
        (dataclasses.replace(GOOD, sequence_length=0), r"data.phases\[1\].sequence_length=0"),
        (dataclasses.replace(GOOD, global_batch_size=-4), r"data.phases\[1\].global_batch_size=-4"),
        (dataclasses.replace(GOOD, mixture=()), r"data.phases\[1\].mixture is empty"),
        (dataclasses.replace(GOOD, mixture=(Source(),)), r"data.phases\[1\].mixture: a source without a path"),
        (dataclasses.replace(GOOD, mixture=(Source("a", 0),)), "weight 0 of a"),
        (dataclasses.replace(GOOD, mixture=(Source("a"), Source("a", 2))), "names a twice"),
        (
            dataclasses.replace(GOOD, mixture=(Source("a", 300_000), Source("b", 700_000))),
            r"add up to 1,000,000; at most 100,000.*divide them all by 10\.",
        ),
    ],
)
def test_phases_that_describe_no_run_are_refused(phase, message):
    mixture.check_phases([GOOD, GOOD])
    with pytest.raises(UserError, match=message):
        mixture.check_phases([GOOD, phase])


def test_no_phases_are_refused():
    with pytest.raises(UserError, match=r"data.phases is empty"):
        mixture.check_phases([])
