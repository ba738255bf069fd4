import math
import mmap

import pytest

from phijax.report.meter import Meter, Speed, host_memory_bytes


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def pass_by(self, seconds):
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


def meter(clock, peak=1e6):
    # a phase of 1000 tokens a step until step 3, then one of 4000 with dearer tokens
    def tokens(step):
        return 1000 * min(step, 3) + 4000 * max(step - 3, 0)

    return Meter(tokens, lambda step: 30.0 if step < 3 else 60.0, peak, device_count=2, clock=clock)


def run(meter, clock, step, seconds):
    clock.pass_by(seconds)
    meter.step_done(step)


def test_speed_over_a_change_of_phase(clock):
    m = meter(clock)
    run(m, clock, 0, 50.0)  # compiles
    assert m.take() == Speed(None, None, None) and m.first_step_seconds == 50.0
    run(m, clock, 1, 1.0)
    run(m, clock, 2, 1.5)
    run(m, clock, 3, 2.5)
    # 1000 + 1000 + 4000 tokens in 5 s; 2 * 30_000 + 240_000 FLOPs of 5 s * 2 devices * 1e6
    assert m.take() == Speed(5 / 3, 1200.0, 0.03)
    assert m.take() == Speed(None, None, None)
    assert m.useful_seconds == 5.0
    assert m.tokens_after(3) == 7000


def test_a_pause_is_no_steps_time_and_takes_none(clock):
    m = meter(clock)
    run(m, clock, 0, 9.0)
    clock.pass_by(0.5)  # host work between steps is the next step's time
    m.pause()
    clock.pass_by(1000.0)
    m.resume()
    run(m, clock, 1, 1.0)
    assert m.take().step_seconds == pytest.approx(1.5, rel=1e-12)
    assert m.useful_seconds == pytest.approx(1.5, rel=1e-12)


def test_unknown_peak_means_unknown_mfu(clock):
    m = meter(clock, peak=None)
    run(m, clock, 0, 1.0)
    run(m, clock, 1, 1.0)
    assert m.take() == Speed(1.0, 1000.0, None)


def test_host_memory_grows_with_what_is_held():
    before = host_memory_bytes()
    # Pages that the process did not have (it may have freed as many before), and shares with nobody.
    held = mmap.mmap(-1, 50_000_000, flags=mmap.MAP_PRIVATE)
    held.write(b"x" * 50_000_000)
    assert 40_000_000 < host_memory_bytes() - before < 100_000_000
    assert held[0] and not math.isnan(before)
    held.close()
