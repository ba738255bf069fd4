import pytest

from phijax.report.goodput import goodput


def start(time, step):
    return {"event": "start", "time": time, "step": step}


def progress(time, step, useful_seconds):
    return {"event": "progress", "time": time, "step": step, "useful_seconds": useful_seconds}


def test_one_life():
    events = [start(1000, 0), progress(1030, 10, 20.0), {"event": "saved", "time": 1031, "step": 10}]
    got = goodput(events, now=1040)
    assert (got.useful_seconds, got.wall_seconds, got.starts, got.fraction) == (20.0, 40, 1, 0.5)


def test_steps_done_again_and_the_time_between_lives_are_lost():
    events = [
        start(1000, 0),
        progress(1010, 10, 10.0),
        progress(1030, 30, 30.0),  # killed; the last checkpoint holds 10 steps
        start(1100, 10),
        progress(1120, 30, 15.0),
    ]
    got = goodput(events, now=1120)
    assert (got.useful_seconds, got.wall_seconds, got.starts) == (10.0 + 15.0, 120, 2)


def test_a_checkpoint_between_two_progress_events():
    events = [start(0, 0), progress(10, 10, 10.0), progress(40, 20, 40.0), start(50, 15), progress(60, 20, 5.0)]
    assert goodput(events, now=100).useful_seconds == 10.0 + 15.0 + 5.0


def test_going_back_undoes_every_life_after():
    events = [start(0, 0), progress(50, 50, 50.0), start(60, 50), progress(70, 60, 10.0), start(80, 30)]
    assert goodput(events, now=100).useful_seconds == 30.0
    assert goodput([*events, start(90, 0)], now=100).useful_seconds == 0.0


def test_lives_that_never_came_to_a_step():
    events = [start(0, 0), start(10, 0), start(20, 0), progress(40, 10, 12.0)]
    assert goodput(events, now=40) == goodput(events, now=40)
    assert goodput(events, now=40).fraction == pytest.approx(0.3)
    assert goodput(events, now=40).starts == 3


def test_a_clean_stop_loses_no_step():
    events = [start(0, 0), progress(20, 17, 16.0), {"event": "stopped", "time": 21, "step": 17}, start(30, 17)]
    assert goodput(events, now=40).useful_seconds == 16.0


def test_nothing_yet():
    assert goodput([], now=5).fraction == 0.0
    assert goodput([start(5, 0)], now=5).fraction == 0.0
