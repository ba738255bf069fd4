"""One process of a small run, started by test_processes.py: process_child.py SCENARIO ADDRESS COUNT INDEX."""

import os
import sys
import time

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

from phijax.errors import EXIT_RESTART, UserError
from phijax.parallel import processes
from phijax.parallel.stop_signal import StopSignal
from phijax.parallel.watchdog import Watchdog

LIMITS = processes.ProcessConfig(initialization_timeout=20, heartbeat_timeout=10, shutdown_timeout=20)


def tell(text):
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def steps(world, stop=None):
    """A training loop in little: a collective each step, as gradients are; runs until something ends it."""
    total = jax.pmap(lambda x: jax.lax.psum(x, "i"), "i")
    for step in range(100_000):
        value = total(jnp.ones((jax.local_device_count(),)))
        assert float(value[0]) == world.count
        tell(f"step {step}")
        yield step
        time.sleep(0.01)


def until_stopped(world):
    stop = StopSignal()
    for step in steps(world):
        if stop.agreed(step):
            tell(f"stopped after {step}")
            return EXIT_RESTART
    raise AssertionError("never stopped")


def one_raises(world):
    for step in steps(world):
        if world.index == 1 and step == 3:
            raise RuntimeError("the culprit's own words")


def user_error(world):
    time.sleep(world.index)  # process 0 must not take process 1 with it before that has said its say
    raise UserError("mesh.data=3 does not divide 2 devices.")


def missing_at_barrier(world):
    if world.index == 1:
        time.sleep(30)
    processes.barrier("checkpoint 7", 2)


def finishes(world):
    multihost_utils.sync_global_devices("here")
    processes.barrier("all here", 10)
    if world.index == 1:
        time.sleep(1)  # process 0 is done first and must wait
    tell("done")


def stuck(world):
    watchdog = Watchdog(0.5)
    for step in range(3):
        watchdog.beat(step)
    the_call_that_hangs()


def the_call_that_hangs():
    time.sleep(60)


def interrupted_twice(world):
    stop = StopSignal()
    for step in range(100_000):
        tell(f"step {step}")
        stop.agreed(step)
        time.sleep(0.02)


def main():
    scenario, address, count, index = sys.argv[1:]
    limits = LIMITS
    if scenario == "never_starts":
        limits = processes.ProcessConfig(initialization_timeout=2)
    if count == "1":
        world = processes.start(limits, environment={})
    else:
        world = processes.start(limits, address, int(count), int(index))
    return globals()[scenario](world)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    processes.guard(main)
