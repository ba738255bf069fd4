"""The loop, with everything that it talks to replaced by what writes down the order of events."""

import dataclasses
import re

import pytest
from recorded_loop import PACE, Recorded, run

from phijax.training.loop import Diverged, Pace


def step_events(step: int) -> list[str]:
    names = "loss predicted_tokens skipped_steps skipped_in_a_row"
    return [f"before step {step}", f"beat {step}", f"step {step}", f"add {step} {names}"]


def evaluation(step: int) -> list[str]:
    return ["pause", "evaluate", f"beat {step}", "go on", f"add {step} heldout_loss"]


def rest(step: int) -> list[str]:
    return ["poll", f"agreed {step}"]


def saving(step: int) -> list[str]:
    """After `step`. The report is flushed before, so that what a checkpoint follows is on disk when it is."""
    started = {"step": step + 1}
    return [
        f"before save {step}",
        "flush",
        "pause",
        f"save {step + 1}",
        f"beat {step}",
        "go on",
        f"event save_started {started}",
    ]


def test_order_of_events():
    recorded = Recorded()
    outcome = run(recorded)
    expected = [*step_events(0), *rest(0)]
    expected += [*step_events(1), *evaluation(1), *rest(1)]
    expected += [*step_events(2), *rest(2), *saving(2)]
    expected += [*step_events(3), *evaluation(3), *rest(3)]
    expected += [*step_events(4), *rest(4)]
    expected += [*step_events(5), *evaluation(5), *rest(5), *saving(5), "wait"]
    assert recorded.events == expected
    assert (outcome.step, outcome.stopped, int(outcome.state.step)) == (6, False, 6)


def test_a_program_is_compiled_before_the_watchdog_counts_its_step():
    recorded = Recorded()
    of_step, recorded.program_of = recorded.program_of, lambda step: recorded.events.append("compile") or of_step(step)
    run(recorded)
    assert all(
        event == "compile"
        for event, after in zip(recorded.events, recorded.events[1:], strict=False)
        if after.startswith("beat") and not event.startswith(("save", "evaluate"))
    )


def test_the_last_step_is_evaluated_and_saved_whatever_the_pace():
    recorded = Recorded()
    run(recorded, Pace(total_steps=5, evaluate_every=100, save_every=100, max_skipped=3))
    assert recorded.events.count("evaluate") == 1
    assert [e for e in recorded.events if e.startswith("save")] == ["save 5"]


def test_all_evaluators_run_and_none_is_needed():
    recorded = Recorded()
    run(recorded, evaluators=2)
    assert recorded.events.count("evaluate") == 6
    recorded = Recorded()
    run(recorded, evaluators=0)
    assert [e for e in recorded.events if e.startswith("add")] == [step_events(s)[-1] for s in range(6)]


def test_goes_on_from_the_states_step():
    recorded = Recorded()
    assert run(recorded, first=4).step == 6
    assert [e for e in recorded.events if e.startswith("step")] == ["step 4", "step 5"]


def test_nothing_left_to_do():
    recorded = Recorded()
    outcome = run(recorded, first=6)
    assert (recorded.events, outcome.step, outcome.stopped) == (["wait"], 6, False)


def test_stop_saves_the_step_it_has_done_and_returns():
    recorded = Recorded(stop_at=3)
    outcome = run(recorded)
    assert (outcome.step, outcome.stopped, int(outcome.state.step)) == (4, True, 4)
    assert recorded.events[-len(saving(3)) - 1 :] == [*saving(3), "wait"]
    assert "step 4" not in recorded.events


def test_stop_where_a_save_is_due_saves_once():
    recorded = Recorded(stop_at=2)
    assert run(recorded).stopped
    assert [e for e in recorded.events if e.startswith("save")] == ["save 3"]


def test_a_stop_at_the_last_step_is_an_end():
    """Otherwise the run would be started again only to find nothing to do."""
    recorded = Recorded(stop_at=5)
    outcome = run(recorded)
    assert (outcome.step, outcome.stopped) == (6, False)
    assert [e for e in recorded.events if e.startswith("save")] == ["save 3", "save 6"]


def test_diverged_after_so_many_in_a_row_names_the_last_good_step():
    """Metrics are read a step late: the third bad update, of step 3, is seen while step 4 is under way."""
    recorded = Recorded(in_a_row={1: 1, 2: 2, 3: 3, 4: 4})
    with pytest.raises(Diverged, match=re.escape("3 updates in a row, up to step 3")) as error:
        run(recorded)
    assert "step 0 was the last good one" in str(error.value)
    assert recorded.events[-2:] == [step_events(4)[-1], "wait"]


def test_fewer_in_a_row_go_on():
    recorded = Recorded(in_a_row={0: 1, 1: 2, 3: 1, 4: 2})
    assert run(recorded).step == 6


def test_diverged_at_the_very_end_is_no_success():
    """The last step's metrics have no step after them in which they would be read."""
    recorded = Recorded(in_a_row={3: 1, 4: 2, 5: 3})
    with pytest.raises(Diverged, match=r"up to step 5.*step 2 was the last good one"):
        run(recorded)
    assert recorded.events[-1] == "wait"


def test_diverged_from_the_start_names_no_good_step():
    pace = dataclasses.replace(PACE, max_skipped=2)
    with pytest.raises(Diverged, match=r"up to step 1.*no step was good"):
        run(Recorded(in_a_row={0: 1, 1: 2, 2: 3}), pace)


@pytest.mark.parametrize("where", ["step 2", "add 2", "evaluate", "save", "flush", "poll", "agreed", "event"])
def test_saves_are_awaited_whatever_happens(where):
    recorded = Recorded(fail_in=where)
    with pytest.raises(OSError, match=f"{where}.* failed"):
        run(recorded)
    assert recorded.events[-1] == "wait"
