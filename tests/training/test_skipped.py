"""Steps that change nothing: when the loop saves around them, what it says, and when they end the run."""

import dataclasses
import functools

import jax.numpy as jnp
import pytest
from recorded_loop import PACE, Recorded, run

from phijax.training.loop import Diverged, NothingLearned, Pace

LONG = Pace(total_steps=12, evaluate_every=100, save_every=3, max_skipped=4)


class Skipping(Recorded):
    """`bad`: steps whose update is not finite. `empty`: those without a token to predict."""

    def __init__(self, bad=(), empty=(), **how):
        super().__init__(**how)
        self._bad, self._empty = set(bad), set(empty)

    def program_of(self, step):
        inner = super().program_of(step)

        def program(state, batch):
            in_a_row, skipped = int(state.skipped_in_a_row), int(state.skipped)
            after, metrics = inner(state, batch)
            bad, empty = step in self._bad, step in self._empty
            in_a_row = in_a_row + bad if bad or empty else 0
            after = after.replace(skipped_in_a_row=jnp.int32(in_a_row), skipped=jnp.int32(skipped + (bad or empty)))
            return after, metrics | {"skipped_in_a_row": after.skipped_in_a_row, "weight": 0.0 if empty else 7.0}

        return program

    def saves(self) -> list[int]:
        return [int(event.split()[1]) for event in self.events if event.startswith("save ")]

    def event(self, name, **fields):
        if name == "skipped":
            self.events.append(f"skipped {fields['step']}: {fields['reason']}")
        else:
            super().event(name, **fields)


def test_no_step_is_saved_while_updates_are_skipped_and_a_due_save_follows_the_next_good_one():
    recorded = Skipping(bad={5, 6, 7})
    assert run(recorded, LONG).step == 12
    assert recorded.saves() == [3, 9, 12]  # 6 was due: 9 is both
    recorded = Skipping(bad={5, 6})
    run(recorded, LONG)
    assert recorded.saves() == [3, 8, 9, 12]
    assert all(extra["good"] for extra in recorded.extras.values())
    assert [text for text in recorded.said if "step 6 is not saved: the last update was not finite" in text]
    assert sum("not saved" in text for text in recorded.said) == 1, "once, not at each step"


def test_a_stop_while_updates_are_skipped_saves_nothing_and_says_so():
    recorded = Skipping(bad={3, 4}, stop_at=4)
    outcome = run(recorded, LONG)
    assert (outcome.step, outcome.stopped, outcome.saved) == (5, True, False)
    assert recorded.saves() == [3] and any("step 5 is not saved" in text for text in recorded.said)
    assert run(Skipping(bad={3}, stop_at=4), LONG).saved


def test_the_last_step_is_saved_but_not_called_good():
    """No later save could make up for it, and its weights are those of the last good update."""
    recorded = Skipping(bad={10, 11})
    assert run(recorded, LONG).step == 12
    assert recorded.saves() == [3, 6, 9, 12]
    assert [recorded.extras[step]["good"] for step in (9, 12)] == [True, False]
    assert any("step 12, the last, is saved but not called good" in text for text in recorded.said)
    diverged = Skipping(bad={8, 9, 10, 11})
    with pytest.raises(Diverged, match="up to step 11"):
        run(diverged, LONG)
    assert diverged.saves() == [3, 6]


def test_divergence_knows_the_last_good_step_of_its_start():
    with pytest.raises(Diverged, match="step 4 was the last good one") as error:
        run(Skipping(bad={5, 6, 8, 9}, empty={7}), LONG)
    assert error.value.last_good == 4
    with pytest.raises(Diverged, match="no step was good since the start at step 5") as error:
        run(Skipping(bad=set(range(5, 12))), LONG, first=5)
    assert error.value.last_good is None


def test_steps_without_tokens_are_said_and_keep_no_save_back():
    recorded = Skipping(empty={0, 5, 6, 11})
    assert run(recorded, LONG).step == 12
    assert recorded.saves() == [3, 6, 9, 12] and all(extra["good"] for extra in recorded.extras.values())
    said = [text for text in recorded.said if "holds no token to predict" in text]
    assert [text.split(" changed")[0] for text in said] == ["WARNING: step 0", "WARNING: step 5", "WARNING: step 11"]
    assert sum(event.startswith("skipped") for event in recorded.events) == 3  # a line for each row of them


def test_a_run_of_steps_without_tokens_ends_with_a_message():
    with pytest.raises(
        NothingLearned, match=r"(?s)4 steps in a row, up to step 5, had no token to predict.*step 1 was"
    ):
        run(Skipping(empty={2, 3, 4, 5}), LONG)
    with pytest.raises(NothingLearned, match="up to step 11"):  # seen at the very end
        run(Skipping(empty={8, 9, 10, 11}), LONG)
    short = dataclasses.replace(PACE, max_skipped=10)
    for nothing in (dict(empty=range(6)), dict(bad=range(6)), dict(bad={1, 3}, empty={0, 2, 4, 5})):
        with pytest.raises(NothingLearned, match="None of the run's 6 steps changed a weight"):
            run(Skipping(**nothing), short)
    assert run(Skipping(empty=range(5)), short).step == 6


def test_what_is_counted_has_the_name_that_the_objective_gives_it():
    recorded = Skipping(empty={2, 3, 4, 5})
    with pytest.raises(NothingLearned, match="up to step 5"):
        run(recorded, LONG, counted="pairs")
    assert "add 0 loss pairs skipped_steps skipped_in_a_row" in recorded.events


def test_many_rows_of_them_do_not_fill_the_screen():
    pace = dataclasses.replace(LONG, total_steps=60)
    recorded = Skipping(empty=range(0, 60, 2))
    run(recorded, pace)
    assert len(recorded.said) == 11 and "listed in events.jsonl" in recorded.said[-1]
    assert sum(event.startswith("skipped") for event in recorded.events) == 30


@pytest.mark.parametrize("stop_at", [None, 7])
def test_scores_go_with_the_step_they_are_of(stop_at):
    """With score_saves a save has its own evaluation, whatever the two paces; a stop does not wait for one."""
    values = iter([3.0, float("nan"), 2.0, 4.0, 1.0, 0.5])
    recorded = Skipping(bad={5}, stop_at=stop_at)
    recorded.evaluator = functools.partial(lambda values, params, frozen: {"heldout_loss/b": next(values)}, values)
    run(recorded, dataclasses.replace(LONG, evaluate_every=5, score_saves=True))
    scores = {step: extra["scores"] for step, extra in recorded.extras.items()}
    # Evaluated after 3 (a save), 5, 7 (the save that 6 owed), 9 and so on; what is not finite is no score.
    expected = {3: {"heldout_loss/b": 3.0}, 7: {"heldout_loss/b": 2.0}}
    assert scores == expected | ({8: {}} if stop_at else {9: {"heldout_loss/b": 4.0}, 12: {"heldout_loss/b": 0.5}})
