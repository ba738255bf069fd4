"""A process to be killed, or to end somehow, in mid-save: checkpoint_child.py DIRECTORY WHAT [NUMBER COUNT PORT]."""

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import jax

directory, what, *processes = sys.argv[1:]
if processes:
    number, count, port = map(int, processes)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", count, number, heartbeat_timeout_seconds=10)

from checkpoint_case import bits, like, mesh_of, state, writer  # noqa: E402

from phijax.checkpoint import manifest  # noqa: E402
from phijax.checkpoint.run_state import SaveFailed  # noqa: E402
from phijax.errors import UserError  # noqa: E402


def say(line: str) -> None:
    print(line, flush=True)


class Lines(list):
    """A log that is printed."""

    def append(self, line: str) -> None:
        say(line)


def save_for_ever(checkpoints) -> None:
    """Saves state(step) at each step, on from the newest, checking that what is restored is what was saved."""
    mesh = mesh_of(len(jax.devices()))
    step = checkpoints.latest_verified() or 0
    if step:
        restored = checkpoints.restore(step, like(state(0, mesh, 4096)))
        assert bits(restored) == bits(state(step, mesh, 4096))
        say(f"resumed {step}")
    while True:
        step += 1
        checkpoints.save(step, state(step, mesh, 4096))
        checkpoints.poll()


def save_and_leave(checkpoints, how: str) -> None:
    """Leaves right after the start of a save, as a loop does: with `wait` in `finally`."""
    try:
        checkpoints.save(1, state(1, mesh_of(2), 4096))
        if how == "raise":
            raise ValueError("the loop broke")
        if how == "exit":
            sys.exit(3)
    finally:
        checkpoints.wait()


def hold(checkpoints) -> None:
    say("holding")
    sys.stdin.read()


def across_processes(checkpoints) -> None:
    """Two processes: save twice, restore, agree on a refusal and on the failure of process 0."""
    mesh = mesh_of(len(jax.devices()))
    assert checkpoints.latest_verified() is None
    for step in (1, 2):
        checkpoints.save(step, state(step, mesh))
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2], "every process leaves wait only when the manifest is there"
    try:
        checkpoints.save(1, state(1, mesh))
        raise AssertionError("not refused")
    except UserError as error:
        say(f"refused: {str(error).splitlines()[0]}")
    assert checkpoints.latest_verified() == 2
    restored = checkpoints.restore(2, like(state(0, mesh)))
    for ours, theirs in zip(jax.tree.leaves(restored), jax.tree.leaves(state(2, mesh)), strict=True):
        for a, b in zip(ours.addressable_shards, theirs.addressable_shards, strict=True):
            assert bits(a.data) == bits(b.data)
    if jax.process_index() == 0:
        manifest.write = fail
    checkpoints.save(3, state(3, mesh))
    try:
        checkpoints.save(4, state(4, mesh))
        raise AssertionError("not stopped")
    except SaveFailed:
        say("all well")


def fail(*_, **__) -> None:
    raise OSError(28, "No space left on device")


with writer(directory, log=Lines(), keep_last=2) as (checkpoints, _):
    if what == "for_ever":
        save_for_ever(checkpoints)
    elif what == "hold":
        hold(checkpoints)
    elif what == "processes":
        across_processes(checkpoints)
    else:
        save_and_leave(checkpoints, what)
