"""Real processes on this machine, ended in the ways that processes end."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from phijax.errors import EXIT_RESTART, UserError
from phijax.parallel import processes
from phijax.parallel.stop_signal import StopSignal
from phijax.parallel.watchdog import Watchdog

CHILD = Path(__file__).with_name("process_child.py")
ROOT = Path(__file__).parents[2]
LIMIT = 60  # seconds; every scenario ends far sooner, or it hangs


def free_address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


class Child:
    """A child process whose output is kept while it runs."""

    def __init__(self, scenario, address, count, index):
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
        environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(CHILD), scenario, address, str(count), str(index)]
        self.process = subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self.output = ""
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            with self._changed:
                self.output += line
                self._changed.notify_all()

    def wait_for(self, text):
        with self._changed:
            assert self._changed.wait_for(lambda: text in self.output, LIMIT), f"no {text!r} in:\n{self.output}"

    def end(self):
        """(exit code, output)."""
        code = self.process.wait(LIMIT)
        self._reader.join(LIMIT)
        return code, self.output


@pytest.fixture
def launch():
    started = []

    def launch(scenario, count=2, indices=None):
        address = free_address()
        children = [Child(scenario, address, count, i) for i in (range(count) if indices is None else indices)]
        started.extend(children)
        return children

    yield launch
    for child in started:
        if child.process.poll() is None:
            child.process.kill()
            child.process.wait()


def test_a_process_that_never_starts_is_named(launch):
    alone, other = *launch("never_starts", count=3, indices=[0]), *launch("never_starts", count=2, indices=[1])
    code, output = alone.end()
    assert code == 1
    assert re.match(r"process 0 on .*: waiting for 3 processes at 127\.0\.0\.1:", output)
    assert f"processes 1, 2 of 3 did not report within 2 s (here: 0 on {socket.gethostname()})" in output
    assert "Traceback" not in output
    code, output = other.end()
    assert code == 1
    assert "process 0 could not be reached at 127.0.0.1:" in output and "within 2 s" in output


def test_all_leave_together_when_done(launch):
    for code, output in [child.end() for child in launch("finishes")]:
        assert code == 0, output
        assert "all 2 processes are here" in output and "done" in output


def test_an_exception_in_one_ends_both_with_its_traceback(launch):
    first, culprit = launch("one_raises")
    code, output = culprit.end()
    assert code == 1
    assert "process 1 of 2: Traceback" in output and "RuntimeError: the culprit's own words" in output
    code, output = first.end()
    assert code not in (0, 75), output


def test_user_error_is_two_on_every_process(launch):
    for index, (code, output) in enumerate([child.end() for child in launch("user_error")]):
        assert code == 2
        assert f"process {index} of 2: mesh.data=3 does not divide 2 devices." in output
        assert "Traceback" not in output


@pytest.mark.parametrize("signalled, number", [(0, signal.SIGTERM), (1, signal.SIGTERM), (1, signal.SIGINT)])
def test_a_signal_to_one_stops_all_at_the_same_step(launch, signalled, number):
    children = launch("until_stopped")
    for child in children:
        child.wait_for("step 5\n")
    children[signalled].process.send_signal(number)
    stops = []
    for code, output in [child.end() for child in children]:
        assert code == 75, output
        (stop,) = re.findall(r"stopped after (\d+)", output)
        assert f"step {stop}\n" in output and f"step {int(stop) + 1}\n" not in output
        stops.append(stop)
    assert stops[0] == stops[1]


@pytest.mark.parametrize("killed", [0, 1])
def test_sigkill_of_one_ends_the_other(launch, killed):
    children = launch("until_stopped")
    for child in children:
        child.wait_for("step 5\n")
    children[killed].process.kill()
    code, output = children[1 - killed].end()
    assert code not in (0, 75), output
    assert children[killed].end()[0] == -signal.SIGKILL


def test_barrier_names_who_is_missing(launch):
    waiting, late = launch("missing_at_barrier")
    code, output = waiting.end()
    assert code == 1
    assert "barrier 'checkpoint 7' was not passed within 2 s; missing: [1] of 2" in output
    assert late.end()[0] not in (0, 75)


def test_watchdog_shows_the_stuck_call_then_ends_the_process(launch):
    (child,) = launch("stuck", count=1)
    code, output = child.end()
    assert code == 1
    assert "no progress after step 2" in output and "in the_call_that_hangs" in output
    assert output.rstrip().endswith("leaving")


def test_a_watchdog_that_pauses_counts_nothing(monkeypatch):
    lines = []
    monkeypatch.setattr(processes, "leave_now", lambda code: lines.append(f"left with {code}"))
    watchdog = Watchdog(0.2, lines.append)
    with watchdog.pause():  # before the first beat: it does not begin to count
        pass
    time.sleep(0.5)
    watchdog.beat(1)
    with watchdog.pause():
        time.sleep(0.5)
    assert lines == []
    while not lines:  # behind it silence counts again
        time.sleep(0.01)
    watchdog.close()
    assert "no progress after step 1" in lines[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_alone_a_signal_stops_after_the_step(launch, number):
    (child,) = launch("until_stopped", count=1)
    child.wait_for("step 5\n")
    child.process.send_signal(number)
    code, output = child.end()
    assert code == 75, output
    assert "stopped after" in output and "saving after this step" in output


def test_a_second_interrupt_kills(launch):
    (child,) = launch("interrupted_twice", count=1)
    child.wait_for("step 2\n")
    child.process.send_signal(signal.SIGINT)
    child.wait_for("SIGINT: saving")
    child.process.send_signal(signal.SIGINT)
    assert child.end()[0] == -signal.SIGINT


# --- settings; no process is started


def test_an_interrupt_before_the_loop_asks_to_be_started_again(capsys):
    with pytest.raises(SystemExit) as left:
        processes.guard(interrupted)
    assert left.value.code == EXIT_RESTART
    assert capsys.readouterr().err == "stopped from the keyboard; the same command can be started again\n"


def interrupted():
    raise KeyboardInterrupt


def settings(address=None, count=None, index=None, **environment):
    return processes._settings(address, count, index, environment, timeout=1)


def test_alone_nothing_is_started():
    assert processes.start(processes.ProcessConfig(), environment={}) == processes.Processes(0, 1, None)
    assert processes.start(processes.ProcessConfig(), process_count=1) == processes.Processes(0, 1, None)


def test_arguments_come_before_the_environment():
    environment = dict(JAX_COORDINATOR_ADDRESS="a:1", JAX_NUM_PROCESSES="4", JAX_PROCESS_ID="2")
    assert settings(**environment)[:3] == ("a:1", 4, 2)
    assert settings("b:2", 8, 7, **environment)[:3] == ("b:2", 8, 7)
    assert settings(count=1, **{}) == ("", 1, 0, None)


def test_slurm_is_found_by_itself(monkeypatch):
    slurm = dict(SLURM_JOB_ID="1000", SLURM_STEP_NODELIST="node[007-009]", SLURM_NTASKS="3", SLURM_PROCID="2")
    for name, value in (slurm | {"SLURM_LOCALID": "0"}).items():
        monkeypatch.setenv(name, value)
    assert settings() == ("node007:62440", 3, 2, [0])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(count=2), "needs coordinator_address and process_id as well"),
        (dict(address="a:1", index=0), "needs process_count as well"),
        (dict(address="a:1", count=2, index=2), "process_id=2 with process_count=2"),
        (dict(address="a", count=2, index=0), "coordinator_address: 'a' is not HOST:PORT"),
        (dict(JAX_NUM_PROCESSES="two"), "JAX_NUM_PROCESSES='two'"),
    ],
)
def test_incomplete_settings_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        settings(**arguments)


def test_stop_signal_is_asked_once_a_step():
    before = signal.getsignal(signal.SIGINT)  # ignored where the suite runs in a shell's background
    stop = StopSignal()
    try:
        assert not stop.agreed(0)
        with pytest.raises(ValueError, match="once a step"):
            stop.agreed(0)
    finally:
        stop.close()
    assert signal.getsignal(signal.SIGINT) is before
