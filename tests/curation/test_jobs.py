"""Work over processes: what is done is not done again, killed workers are named, no worker outlives its parent."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from job_tasks import fill_the_disk, kill_itself, refuse, square, tasks_of

from phijax.curation import jobs, unfinished
from phijax.errors import UserError

HERE = pathlib.Path(__file__).parent


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_done_is_not_done_again(tmp_path, workers):
    tasks = tasks_of(square, tmp_path, 5)
    assert dict(jobs.run(tasks[:3], workers)) == {i: {"square": i**2} for i in range(3)}
    (tmp_path / "0").unlink()  # an output that is gone
    (tmp_path / "1").write_text("longer")  # or is another
    (tmp_path / "2").write_text("5")  # of the size that the marker says: it is believed
    results = dict(jobs.run(tasks, workers))
    assert results == {i: {"square": i**2} for i in range(5)}
    assert [(tmp_path / str(i)).read_text() for i in range(5)] == ["0", "1", "5", "9", "16"]


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_of_workers_arrive(tmp_path, workers):
    with pytest.raises(UserError, match=r"number \d is bad"):
        list(jobs.run(tasks_of(refuse, tmp_path), workers))
    with pytest.raises(UserError, match=r"could not be written: .*No space left on device"):
        list(jobs.run(tasks_of(fill_the_disk, tmp_path), workers))
    assert not list(tmp_path.glob("*.done"))


def test_a_killed_worker_is_named(tmp_path):
    with pytest.raises(UserError, match=r"A worker process was killed.*start the same command again"):
        list(jobs.run(tasks_of(kill_itself, tmp_path), 2))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_no_worker_outlives_its_parent(tmp_path, how):
    code = f"""
import pathlib, sys
sys.path.insert(0, {str(HERE)!r})
import job_tasks
if __name__ == "__main__":
    tasks = job_tasks.tasks_of(job_tasks.sleep_for_ever, pathlib.Path({str(tmp_path)!r}))
    list(job_tasks.jobs.run(tasks, 2))
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    parent = subprocess.Popen([sys.executable, script], env={**os.environ, "PYTHONPATH": str(HERE.parent.parent)})
    try:
        wait_until(lambda: len(list(tmp_path.glob("pid-*"))) == 2)
    finally:
        parent.send_signal(how)
        parent.wait()
    pids = [int(path.name[4:]) for path in tmp_path.glob("pid-*")]
    wait_until(lambda: not any(map(is_running, pids)))
    assert not [json.loads(path.read_text()) for path in tmp_path.glob("*.done")]


def test_who_was_killed_is_waited_for_to_the_last_worker(tmp_path):
    """What a worker writes after the next start has tidied up would stay in a finished folder."""
    script = tmp_path / "script.py"
    script.write_text(f"""
import pathlib, sys
sys.path.insert(0, {str(HERE)!r})
import job_tasks
if __name__ == "__main__":
    folder = pathlib.Path({str(tmp_path)!r})
    list(job_tasks.jobs.run(job_tasks.tasks_of(job_tasks.hold_the_interpreter, folder), 2, folder / "workers.lock"))
""")
    parent = subprocess.Popen([sys.executable, script], env={**os.environ, "PYTHONPATH": str(HERE.parent.parent)})
    wait_until(lambda: len(list(tmp_path.glob("pid-*"))) == 2)
    parent.kill()
    parent.wait()
    pids = [int(path.name[4:]) for path in tmp_path.glob("pid-*")]
    assert any(map(is_running, pids))
    unfinished.wait_for_workers(tmp_path)
    # The lock goes with a process's files, a moment before the process itself; asleep they would be for seconds more.
    wait_until(lambda: not any(map(is_running, pids)), seconds=2)


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"it did not happen within {seconds} s"
        time.sleep(0.05)


def is_running(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_long_marker_is_read_by_both_who_read_it(tmp_path):
    """Counts name the places of files in the input: 20 MB of them."""
    output = unfinished.unit_file(tmp_path, 0)
    output.write_text("text")
    done = unfinished.marker(output)
    counts = {"skipped": {}, "places": ["x" * 1000] * 20_000}
    done.write_text(json.dumps({"output_bytes": 4, "counts": counts}))
    assert dict(jobs.run([jobs.Task(refuse, (), output, done)], 1)) == {0: counts}
    unfinished.try_skipped_again(tmp_path, {0: ()})
    assert done.exists()
