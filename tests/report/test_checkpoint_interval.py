"""How often to save: the formulas against a walk through every moment at which a failure can come."""

import numpy as np
import pytest

from phijax.report.checkpoint_interval import best_interval, expected_goodput

SAVE, FAILURE, RESTART = 2.0, 4000.0, 100.0


def walked(interval: float) -> float:
    """Mean share of a life that lasts, over 20,000 lives between 0.5 and 1.5 times the mean."""
    lives = FAILURE * np.linspace(0.5, 1.5, 20_001)
    saves = np.floor((lives - RESTART) / (interval + SAVE))
    return float(np.sum(saves * interval) / np.sum(lives))


@pytest.mark.parametrize("interval", [10.0, 60.0, 126.5, 400.0])
def test_the_formula_is_the_mean_of_all_lives(interval):
    got = expected_goodput(interval, save_seconds=SAVE, failure_seconds=FAILURE, restart_seconds=RESTART)
    # The walk ends on a grid of moments: a cycle's rounding at both ends.
    assert got == pytest.approx(walked(interval), abs=2e-3)


def test_no_other_interval_keeps_more():
    best = best_interval(SAVE, FAILURE)
    assert best == pytest.approx(126.5, abs=0.1)
    tried = np.linspace(0.3, 3, 271) * best
    keeps = [expected_goodput(x, save_seconds=SAVE, failure_seconds=FAILURE, restart_seconds=RESTART) for x in tried]
    assert tried[int(np.argmax(keeps))] == pytest.approx(best, rel=0.05)  # the formula's is of first order


def test_lives_too_short_for_a_save_keep_nothing():
    assert expected_goodput(60, save_seconds=5, failure_seconds=30, restart_seconds=10) == 0.0
