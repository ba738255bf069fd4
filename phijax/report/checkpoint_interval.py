"""How often to save: what a save costs against what a failure throws away."""

import math


def best_interval(save_seconds: float, failure_seconds: float) -> float:
    """Seconds of steps between two saves that lose least, to first order.

    Young 1974, "A first order approximation to the optimum checkpoint interval", eq. 9: sqrt(2 s M).

    Args:
      save_seconds: s, for which training stands still at a save. failure_seconds: M, mean time between failures.
    """
    return math.sqrt(2 * save_seconds * failure_seconds)


def expected_goodput(interval: float, *, save_seconds: float, failure_seconds: float, restart_seconds: float) -> float:
    """Share of wall time that makes lasting steps, when each life of M seconds ends with a failure.

    Of a life's M - R seconds of work, saves of s seconds come behind every `interval` seconds of steps, and the failure
    finds a cycle of both half done on average (Daly 2006, "A higher order estimate of the optimum checkpoint interval",
    section 2, for failures that are rare beside a cycle). 0 where a life is too short for a save.

    Args:
      restart_seconds: R, from a life's beginning to its first step.
    """
    if interval <= 0:
        return 0.0
    cycle = interval + save_seconds
    kept = failure_seconds - restart_seconds - cycle / 2
    return max(0.0, kept) / failure_seconds * interval / cycle
