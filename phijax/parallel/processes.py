"""One run, many processes: start together, wait with limits, stop at one agreed step, end without hanging.

A process of a jax.distributed run must not leave by an exception that reaches the interpreter's exit: JAX then waits
in a barrier for peers that wait in a collective for it (both hung for more than 170 s, jax 0.10.2). `guard` is the way
out.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import jax
from jax.experimental import multihost_utils

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
    write = write or _to_stderr
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
    client, _, count = _world()
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
        client, index, _ = _world()
        client.key_value_set(f"phijax/{name}/{index}", text)


def announced(name: str) -> dict[int, str]:
    """Process index -> text of all who have come to `name`. Empty when process 0 is gone, who alone knows."""
    if not jax.distributed.is_initialized():
        return {}
    with contextlib.suppress(Exception):
        entries = _world()[0].key_value_dir_get(f"phijax/{name}/")
        return {int(key.rsplit("/", 1)[1]): text for key, text in entries}
    return {}


def _world() -> tuple[Any, int, int]:
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
        _to_stderr("\n".join([f"error: {_who()}{error}", *getattr(error, "__notes__", ())]))
        if not isinstance(error, ProcessFailure):
            _leave_together()
    except StoppedUnsaved as stopped:
        code = EXIT_RESTART
        _to_stderr(f"{_who()}{stopped}")
        _leave_together()
    except KeyboardInterrupt:
        code = EXIT_RESTART  # before the loop, which saves first
        _to_stderr(f"{_who()}stopped from the keyboard; the same command can be started again")
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else (EXIT_DONE if leaving.code is None else EXIT_CRASH)
        if leaving.code is not None and not isinstance(leaving.code, int):
            _to_stderr(f"{_who()}{leaving.code}")
    except BaseException:
        code = EXIT_CRASH
        _to_stderr(f"{_who()}{traceback.format_exc()}")
    exit_hard(code)


def _leave_together() -> None:
    """Most often all have come to the same end; JAX aborts whoever still lives when process 0 is gone."""
    if not jax.distributed.is_initialized():
        return
    with contextlib.suppress(Exception):
        barrier("leaving", LEAVING_SECONDS)
    if _world()[1] == 0:
        time.sleep(LAST_TO_LEAVE_SECONDS)


def exit_hard(code: int) -> NoReturn:
    """Leaves with `code`. Under jax.distributed by os._exit: no barrier, only this process's own things are ended."""
    if not jax.distributed.is_initialized():
        sys.exit(code)
    _leave_now(code)


def _leave_now(code: int) -> NoReturn:
    for worker in multiprocessing.active_children():
        worker.kill()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


def _who() -> str:
    if not jax.distributed.is_initialized():
        return ""
    _, index, count = _world()
    return f"process {index} of {count}: "


def _to_stderr(text: str) -> None:
    # One write, or the lines of several processes on one terminal run into each other.
    sys.stderr.write(text.rstrip("\n") + "\n")
    sys.stderr.flush()


# --- stopping on request


class StopSignal:
    """SIGTERM or Ctrl-C: every process learns at the same step that the run shall save and stop.

    Under jax.distributed JAX has its own SIGTERM handler and agrees on a step; it must be asked exactly once a step, on
    every process, or the signal is swallowed. Ctrl-C is turned into that SIGTERM. Alone, both set a flag here. A second
    Ctrl-C ends the process at once, which is as safe as SIGKILL: the last checkpoint stays. Main thread only.
    """

    def __init__(self, write: Callable[[str], None] | None = None):
        self._write = write or _to_stderr
        self._shared = jax.distributed.is_initialized()
        self._asked = False
        self._last_step: int | None = None
        self._previous = {signal.SIGINT: signal.signal(signal.SIGINT, self._on_signal)}
        if not self._shared:
            self._previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._on_signal)

    def agreed(self, step: int) -> bool:
        """True at the step after which all processes stop. Call it exactly once a step, on every process."""
        if self._last_step is not None and step <= self._last_step:
            raise ValueError(f"StopSignal was asked at step {self._last_step} already, now at {step}: once a step")
        self._last_step = step
        return multihost_utils.reached_preemption_sync_point(step) if self._shared else self._asked

    def asked(self) -> bool:
        """Whether any process was asked to stop, by now: for waits inside of a step, which `agreed` does not see."""
        if self._shared and not self._asked:
            with contextlib.suppress(Exception):  # no such key yet; JAX's own name for it is not public
                self._asked = bool(_world()[0].key_value_try_get("RECEIVED_PREEMPTION_NOTICE"))
        return self._asked

    def close(self) -> None:
        """Puts the handlers back that were there before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame) -> None:
        self._asked = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if self._shared:
                os.kill(os.getpid(), signal.SIGTERM)
        # os.write: a print here could run into the print that was interrupted.
        text = (
            f"\n{signal.Signals(number).name}: saving after this step, then stopping; the same command goes on from "
            "there. Ctrl-C now ends at once, unsaved: it then goes on from the last save.\n"
        )
        os.write(2, text.encode())


class Watchdog:
    """Notices a loop that has stopped moving: heartbeats do not, since they come from another thread.

    No `beat` for `seconds`: a line with step and process, and the stacks of all threads. Still none after as long
    again: exit code 1, at once. Counts from the first beat, and not while it pauses: a program may compile for long. 0
    is off.
    """

    def __init__(self, seconds: float, write: Callable[[str], None] | None = None):
        self._seconds = seconds
        self._write = write or _to_stderr
        self._beat: tuple[int, float] | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="phijax-watchdog", daemon=True)
        if seconds > 0:
            self._thread.start()

    def beat(self, step: int) -> None:
        """The loop has come to `step`; call it also around long work between steps."""
        self._beat = (step, time.monotonic())

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Nothing is counted inside; behind it silence counts anew, where it counted before."""
        before, self._beat = self._beat, None
        try:
            yield
        finally:
            if before is not None:
                self.beat(before[0])

    def close(self) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        warned_at = None
        while not self._closed.wait(self._seconds / 10):
            beat = self._beat
            if beat is None:
                continue
            step, at = beat
            silence = time.monotonic() - at
            if silence > 2 * self._seconds:
                self._write(f"{_who()}no progress after step {step} for {silence:.0f} s: leaving")
                _leave_now(EXIT_CRASH)
            if silence > self._seconds and warned_at != beat:
                warned_at = beat
                self._write(
                    f"{_who()}no progress after step {step} for {silence:.0f} s; all stacks follow, "
                    f"the process ends in {self._seconds:.0f} s unless it moves"
                )
                faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
