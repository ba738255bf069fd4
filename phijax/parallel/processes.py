"""One run, many processes: start together, wait with limits, end without hanging.

A process of a jax.distributed run must not leave by an exception that reaches the interpreter's exit: JAX then waits
in a barrier for peers that wait in a collective for it (both hung for more than 170 s, jax 0.10.2). `guard` is the way
out.
"""

import contextlib
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import jax

from phijax.errors import EXIT_CRASH, EXIT_DONE, EXIT_RESTART, EXIT_USER_ERROR, RunFailure, StoppedUnsaved, UserError
from phijax.parallel import rendezvous
from phijax.parallel.rendezvous import ProcessFailure

LEAVING_SECONDS = 5.0  # how long who ends in an error waits for the others to come to the same
LAST_TO_LEAVE_SECONDS = 1.0


@dataclass(frozen=True)
class ProcessConfig:
    """Time limits of a run, in seconds. Each ends the run with a message; none is needed on one machine."""

    initialization_timeout: int = 300  # from the first process's start until all are here
    heartbeat_timeout: int = 30  # a silent process counts as dead after this
    shutdown_timeout: int = 300  # how long the first to finish waits for the last
    watchdog_seconds: int = 600  # a longer step is reported with all stacks; twice as long ends the run; 0: off

    def __post_init__(self):
        for name, value in vars(self).items():
            least = 0 if name == "watchdog_seconds" else 1
            if value < least:
                raise UserError(f"processes.{name}={value} must be {least} or more.")


@dataclass(frozen=True)
class Processes:
    """What this process is in the run. `coordinator_address` is None for a run of one process."""

    index: int = 0
    count: int = 1
    coordinator_address: str | None = None


def start(
    config: ProcessConfig,
    coordinator_address: str | None = None,
    process_count: int | None = None,
    process_id: int | None = None,
    environment: Mapping[str, str] = os.environ,
    write: Callable[[str], None] | None = None,
) -> Processes:
    """Starts jax.distributed when the run has several processes. Call it before anything touches a device.

    Arguments come first, then JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, then what JAX finds by
    itself on TPU pods (several slices too), SLURM, Open MPI and Kubernetes. Otherwise, and with process_count=1: one
    process, nothing is started. CPU processes talk by gloo, which is JAX's default.

    Raises:
      UserError: the three settings are incomplete or contradict each other.
      ProcessFailure: not all processes were here within config.initialization_timeout; the message names the missing.
    """
    write = write or to_stderr
    address, count, index, local_device_ids = _settings(
        coordinator_address, process_count, process_id, environment, config.initialization_timeout
    )
    if count == 1:
        return Processes()
    write(f"process {index} on {os.uname().nodename} (pid {os.getpid()}): waiting for {count} processes at {address}")
    start_time = time.monotonic()
    bound = rendezvous.gather(address, count, index, config.initialization_timeout, write)
    # gRPC sends even localhost through http_proxy, and then waits for ever.
    os.environ.setdefault("no_grpc_proxy", rendezvous.split_address(address)[0])
    try:
        jax.distributed.initialize(
            coordinator_address=address,
            num_processes=count,
            process_id=index,
            local_device_ids=local_device_ids,
            initialization_timeout=config.initialization_timeout,
            heartbeat_timeout_seconds=config.heartbeat_timeout,
            shutdown_timeout_seconds=config.shutdown_timeout,
            coordinator_bind_address=environment.get("JAX_COORDINATOR_BIND_ADDRESS", bound),
        )
    except Exception as error:
        raise ProcessFailure(f"all {count} processes were here, but jax.distributed did not start: {error}") from error
    write(f"process {index}: all {count} processes are here after {time.monotonic() - start_time:.1f} s")
    return Processes(index, count, address)


def _settings(
    address: str | None, count: int | None, index: int | None, environment: Mapping[str, str], timeout: int
) -> tuple[str, int, int, Any]:
    """(address, count, index, local device ids) from arguments, environment, cluster; ("", 1, 0, None) when alone."""
    address = address or environment.get("JAX_COORDINATOR_ADDRESS") or None
    count = count if count is not None else _integer(environment, "JAX_NUM_PROCESSES")
    index = index if index is not None else _integer(environment, "JAX_PROCESS_ID")
    local_device_ids = None
    if count == 1 and index in (None, 0):
        return "", 1, 0, None
    if None in (address, count, index):
        given = (address, count, index)
        address, count, index, local_device_ids = _detect(address, count, index, timeout)
        if given == (None, None, None) and (count is None or count == 1):
            return "", 1, 0, None
    values = dict(coordinator_address=address, process_count=count, process_id=index)
    absent = [name for name, value in values.items() if value is None]
    if absent:
        raise UserError(
            f"A run of several processes needs {' and '.join(absent)} as well.  "
            "For example: --coordinator_address=10.0.0.1:8476 --process_count=2 --process_id=0"
        )
    if count < 1 or not 0 <= index < count:
        raise UserError(f"process_id={index} with process_count={count}: ids run from 0 to process_count - 1.")
    try:
        rendezvous.split_address(address)
    except ValueError as error:
        raise UserError(f"coordinator_address: {error}. It is where process 0 listens, as 10.0.0.1:8476.") from error
    return address, count, index, local_device_ids


def _integer(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name) or None
    if text is not None and not text.isdigit():
        raise UserError(f"{name}={text!r} in the environment is not a number.")
    return None if text is None else int(text)


def _detect(address: str | None, count: int | None, index: int | None, timeout: int) -> tuple:
    """What JAX knows about the cluster it runs in. Not public: this is the only place that calls it."""
    from jax._src import clusters

    try:
        return clusters.ClusterEnv.auto_detect_unset_distributed_params(address, count, index, None, None, timeout)
    except Exception as error:
        raise UserError(
            f"The cluster could not be asked which process this is ({type(error).__name__}: {error}).  "
            "Give --coordinator_address, --process_count and --process_id, or --process_count=1."
        ) from error


# --- waiting for each other


def barrier(name: str, seconds: float, text: str = "") -> None:
    """Returns when every process has called it with this name; a name serves once in a run. Alone: returns at once.

    Args: text: what `announced` gives to all.
    Raises ProcessFailure, naming who did not come, after `seconds` or when a process has died meanwhile.
    """
    if not jax.distributed.is_initialized():
        return
    announce(name, text)
    client, _, count = world()
    try:
        client.wait_at_barrier(f"phijax/{name}", int(seconds * 1000))
    except Exception as error:
        here = announced(name)
        missing = [i for i in range(count) if i not in here]
        who = f"missing: {missing} of {count}" if here else "process 0 does not answer"
        raise ProcessFailure(f"barrier {name!r} was not passed within {seconds:g} s; {who}. ({error})") from error


def exchange(name: str, text: str, seconds: float) -> list[str]:
    """What every process says under `name`, by process index. Needs no device. Raises ProcessFailure as `barrier`."""
    if not jax.distributed.is_initialized():
        return [text]
    barrier(name, seconds, text)
    return [said for _, said in sorted(announced(name).items())]


def announce(name: str, text: str = "") -> None:
    """Tells the others that this process has come to `name`, once in a run; waits for nobody."""
    if jax.distributed.is_initialized():
        client, index, _ = world()
        client.key_value_set(f"phijax/{name}/{index}", text)


def announced(name: str) -> dict[int, str]:
    """Process index -> text of all who have come to `name`. Empty when process 0 is gone, who alone knows."""
    if not jax.distributed.is_initialized():
        return {}
    with contextlib.suppress(Exception):
        entries = world()[0].key_value_dir_get(f"phijax/{name}/")
        return {int(key.rsplit("/", 1)[1]): text for key, text in entries}
    return {}


def world() -> tuple[Any, int, int]:
    """(coordination client, process index, process count). Not public; jax.process_index would start a backend."""
    from jax._src import distributed

    state = distributed.global_state
    return state.client, state.process_id, state.num_processes


# --- the end


def finish(seconds: float = 300) -> None:
    """The last call of a run that went well: process 0 must not leave before the others, who talk through it."""
    if jax.distributed.is_initialized():
        barrier("finish", seconds)
        jax.distributed.shutdown()


def guard(main: Callable[[], int | None]) -> NoReturn:
    """Runs `main` and leaves with its exit code, so that no exception of one process lets the others hang.

    UserError: its message, code 2. RunFailure: its message, code 1. StoppedUnsaved: its message, code 75; Ctrl-C: code
    75. Anything else: the traceback, code 1.
    """
    try:
        code = main() or EXIT_DONE
        if code in (EXIT_DONE, EXIT_RESTART):
            finish()
    except (UserError, RunFailure) as error:
        code = EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_CRASH
        to_stderr("\n".join([f"error: {who()}{error}", *getattr(error, "__notes__", ())]))
        if not isinstance(error, ProcessFailure):
            _leave_together()
    except StoppedUnsaved as stopped:
        code = EXIT_RESTART
        to_stderr(f"{who()}{stopped}")
        _leave_together()
    except KeyboardInterrupt:
        code = EXIT_RESTART  # before the loop, which saves first
        to_stderr(f"{who()}stopped from the keyboard; the same command can be started again")
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else (EXIT_DONE if leaving.code is None else EXIT_CRASH)
        if leaving.code is not None and not isinstance(leaving.code, int):
            to_stderr(f"{who()}{leaving.code}")
    except BaseException:
        code = EXIT_CRASH
        to_stderr(f"{who()}{traceback.format_exc()}")
    exit_hard(code)


def _leave_together() -> None:
    """Most often all have come to the same end; JAX aborts whoever still lives when process 0 is gone."""
    if not jax.distributed.is_initialized():
        return
    with contextlib.suppress(Exception):
        barrier("leaving", LEAVING_SECONDS)
    if world()[1] == 0:
        time.sleep(LAST_TO_LEAVE_SECONDS)


def exit_hard(code: int) -> NoReturn:
    """Leaves with `code`. Under jax.distributed by os._exit: no barrier, only this process's own things are ended."""
    if not jax.distributed.is_initialized():
        sys.exit(code)
    leave_now(code)


def leave_now(code: int) -> NoReturn:
    """Ends this process and its children at once, whatever waits for it."""
    for worker in multiprocessing.active_children():
        worker.kill()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


def who() -> str:
    """Which process of how many speaks, to put before a line; nothing in a run of one."""
    if not jax.distributed.is_initialized():
        return ""
    _, index, count = world()
    return f"process {index} of {count}: "


def to_stderr(text: str) -> None:
    """A line for people."""
    # One write, or the lines of several processes on one terminal run into each other.
    sys.stderr.write(text.rstrip("\n") + "\n")
    sys.stderr.flush()
