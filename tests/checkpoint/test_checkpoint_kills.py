"""Real processes: killed in mid-save, leaving in every way, two in one directory, two that save together."""

import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

import pytest
from checkpoint_case import bits, like, mesh_of, state, writer

from phijax.errors import UserError

CHILD = pathlib.Path(__file__).parent / "checkpoint_child.py"
ROOT = CHILD.parent.parent.parent


def start(directory, *arguments) -> subprocess.Popen:
    command = [sys.executable, str(CHILD), str(directory), *map(str, arguments)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    environment = {"PYTHONPATH": f"{ROOT}:{CHILD.parent}", "PATH": "", "HOME": "/tmp"}
    return subprocess.Popen(command, text=True, cwd=ROOT, env=environment, **pipes)


def read_until(process: subprocess.Popen, beginning: str) -> list[str]:
    """Lines of the child up to the first that begins so."""
    lines = []
    for line in process.stdout:
        lines.append(line.strip())
        if line.startswith(beginning):
            return lines
    raise AssertionError(f"no {beginning!r} in {lines}\n{process.stderr.read()}")


def kill(process: subprocess.Popen) -> list[str]:
    """SIGKILL; the lines that it had still written."""
    process.send_signal(signal.SIGKILL)
    rest, _ = process.communicate()
    return rest.splitlines()


def test_killed_in_mid_save_again_and_again(tmp_path):
    chance = random.Random(1)
    last = 0
    for life in range(3):
        process = start(tmp_path, "for_ever")
        try:
            # The child itself checks, bit by bit, that it resumes what it had saved.
            resumed = read_until(process, "resumed" if life else "saved step")
            if life:
                assert int(resumed[-1].split()[1]) >= last
                read_until(process, "saved step")
                time.sleep(chance.uniform(0, 0.3))
            else:
                _wait_for_temporary_folder(tmp_path)
        finally:
            lines = kill(process)
        saved = [int(line.split()[2]) for line in lines if line.startswith("saved step")]
        last = max([last, *saved])
    with writer(tmp_path) as (checkpoints, lines):  # the lock of the dead is taken over without being asked
        assert "taken over" in lines[0]
        step = checkpoints.latest_verified()
        assert step >= last
        mesh = mesh_of(8)  # and on another mesh
        assert bits(checkpoints.restore(step, like(state(0, mesh, 4096)))) == bits(state(step, mesh, 4096))


def _wait_for_temporary_folder(directory) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if any(directory.glob("*/*.orbax-checkpoint-tmp*")):
            return
    raise AssertionError("no save was seen under way")


@pytest.mark.parametrize(("how", "code"), [("return", 0), ("raise", 1), ("exit", 3)])
def test_leaving_right_after_save_commits_it(tmp_path, how, code):
    process = start(tmp_path, how)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    assert "saved step 1" in output
    assert not (tmp_path / "writer.lock").exists()
    with writer(tmp_path) as (checkpoints, lines):
        assert lines == []
        assert checkpoints.latest_verified() == 1


def test_second_run_in_a_directory_is_refused_and_names_the_first(tmp_path):
    first = start(tmp_path, "hold")
    try:
        read_until(first, "holding")
        second = start(tmp_path, "hold")
        _, errors = second.communicate(timeout=120)
        assert second.returncode != 0
        assert f"written by another run: process {first.pid} on host {socket.gethostname()}" in errors
        with pytest.raises(UserError, match=f"process {first.pid} "), writer(tmp_path):
            pass
        with writer(tmp_path, break_lock=True) as (_, lines):
            assert f"left by process {first.pid}" in lines[0]
    finally:
        first.communicate("", timeout=120)
    assert first.returncode == 0


def start_two(directory, what: str) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(directory, what, number, 2, port) for number in range(2)]


def test_two_processes_save_one_state_and_one_process_reads_it(tmp_path):
    both = start_two(tmp_path, "processes")
    results = [process.communicate(timeout=180) for process in both]
    for process, (output, errors) in zip(both, results, strict=True):
        assert process.returncode == 0, errors
        assert "all well" in output
        assert "refused: Step 1 cannot be saved" in output
    with writer(tmp_path) as (checkpoints, _):
        assert checkpoints.latest_verified() == 2
        mesh = mesh_of(8)
        assert bits(checkpoints.restore(2, like(state(0, mesh)))) == bits(state(2, mesh))


@pytest.mark.slow  # the survivor ends by heartbeat, after 10 s or more
@pytest.mark.parametrize("victim", [0, 1])
def test_one_of_two_processes_killed_in_mid_save(tmp_path, victim):
    both = start_two(tmp_path, "for_ever")
    read_until(both[0], "saved step 2")
    both[victim].kill()
    survivor = both[1 - victim]
    survivor.communicate(timeout=180)
    both[victim].communicate()
    assert survivor.returncode != 0
    with writer(tmp_path) as (checkpoints, _):
        step = checkpoints.latest_verified()
        assert step >= 2
        mesh = mesh_of(8)
        assert bits(checkpoints.restore(step, like(state(0, mesh, 4096)))) == bits(state(step, mesh, 4096))
        checkpoints.save(step + 1, state(step + 1, mesh, 4096))
        checkpoints.wait()
