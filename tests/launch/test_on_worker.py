"""launch/on_worker.sh for real, in a home of its own: runs that outlive their connection, exit codes, stops."""

import os
import signal
import subprocess
import sys
import time

import pytest
from cloud_case import LAUNCH

# In place of Python with phijax: says what it was given, then does what its last argument says.
PROGRAM = f"""#!{sys.executable}
import signal, sys, time
print("started", *sys.argv[1:], flush=True)
what = sys.argv[-1]
if "-c" in sys.argv:
    sys.exit(0)
if what.startswith("exit="):
    sys.exit(int(what[5:]))
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit(75)))
open("alive", "a").write("x")
for i in range(600):
    print("step", i, flush=True)
    time.sleep(0.1)
"""

# A run of the tests under nohup ignores hangups, and so would everything that it starts.
HEARS_HANGUPS = """
import os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.execvp("bash", ["bash", *sys.argv[1:]])
"""


class Worker:
    def __init__(self, home):
        self.home = home
        (home / "phijax").mkdir(parents=True)
        (home / "python").write_text(PROGRAM)
        (home / "python").chmod(0o755)
        self.environment = os.environ | {"HOME": str(home), "PHIJAX_PYTHON": str(home / "python")}
        self.started = []

    def begin(self, *arguments, script=LAUNCH / "on_worker.sh"):
        child = subprocess.Popen(
            [sys.executable, "-c", HEARS_HANGUPS, script, *arguments],
            cwd=self.home,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.started.append(child)
        return child

    def call(self, *arguments):
        child = self.begin(*arguments)
        output, _ = child.communicate(timeout=60)
        return child.returncode, output

    def log(self, run="train"):
        path = self.home / "phijax-runs" / run / "log"
        return path.read_text() if path.exists() else ""

    def wait_for(self, text):
        deadline = time.monotonic() + 60
        while text not in self.log():
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.05)


@pytest.fixture
def worker(tmp_path):
    worker = Worker(tmp_path / "home")
    yield worker
    worker.call("stop", "--run=train")
    for child in worker.started:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


@pytest.mark.parametrize("code", [0, 1, 2, 75])
def test_the_exit_code_is_the_runs_own(worker, code):
    ended, output = worker.call("start", "--run=train", "--", "--config=a b.py", f"exit={code}")
    assert ended == code
    assert f"started -m phijax.main --config=a b.py exit={code}" in output
    assert worker.log() in output


def test_another_verb_and_the_log_of_the_life_before_is_kept(worker):
    worker.call("start", "--run=train", "--", "exit=1")
    worker.call("start", "--run=train", "--verb=preflight", "--", "exit=0")
    assert "phijax.preflight exit=0" in worker.log()
    kept = [path for path in (worker.home / "phijax-runs/train").iterdir() if path.name.startswith("log.")]
    assert len(kept) == 1 and "phijax.main exit=1" in kept[0].read_text()
    assert worker.call("log", "--run=train") == (0, worker.log())


def test_a_lost_connection_does_not_end_the_run_and_the_next_one_finds_it(worker):
    first = worker.begin("start", "--run=train", "--", "train")
    worker.wait_for("step 2")
    os.killpg(first.pid, signal.SIGHUP)  # what sshd does
    first.wait(timeout=30)
    worker.wait_for("step 10")
    second = worker.begin("start", "--run=train", "--", "train")
    while "step 12" not in second.stdout.readline():
        pass
    code, _ = worker.call("stop", "--run=train")
    rest, _ = second.communicate(timeout=60)
    assert code == 0 and second.returncode == 75 and "saved" in rest
    assert (worker.home / "phijax/alive").read_text() == "x"  # it was started once


def test_a_run_that_is_killed_is_a_crash(worker):
    first = worker.begin("start", "--run=train", "--", "train")
    worker.wait_for("step 2")
    os.kill(int((worker.home / "phijax-runs/train/run_pid").read_text()), signal.SIGKILL)
    assert first.wait(timeout=60) == 128 + signal.SIGKILL


def test_nothing_is_installed_under_a_run(worker):
    worker.begin("start", "--run=train", "--", "train")
    worker.wait_for("step 2")
    code, output = worker.call("install", "--ref=x", "--repository=y")
    assert code == 0 and "left as it is" in output


def test_a_script_that_is_copied_anew_under_a_run_changes_nothing_of_it(worker):
    """Bash reads a script as it goes, and scp writes into the file that is there."""
    for name in ("on_worker.sh", "shell.sh"):
        (worker.home / name).write_bytes((LAUNCH / name).read_bytes())
    (worker.home / "on_worker.sh").chmod(0o755)
    worker.begin("start", "--run=train", "--", "train", script=worker.home / "on_worker.sh")
    worker.wait_for("step 2")
    with open(worker.home / "on_worker.sh", "a") as file:
        file.write("\ntouch ~/overwritten\nexit 3\n")
    assert worker.call("stop", "--run=train")[0] == 0
    assert worker.started[0].wait(timeout=60) == 75
    assert not (worker.home / "overwritten").exists()


def test_nothing_is_checked_beside_a_run(worker):
    """Its chips are taken: a babysitter that is started again would take the failure for a verdict."""
    worker.begin("start", "--run=train", "--", "train")
    worker.wait_for("step 2")
    code, output = worker.call("start", "--run=preflight", "--verb=preflight", "--", "exit=2")
    assert code == 0 and "nothing is checked" in output
    assert worker.call("stop", "--run=train")[0] == 0
    worker.wait_for("saved")
    deadline = time.monotonic() + 30
    while worker.call("start", "--run=preflight", "--verb=preflight", "--", "exit=2")[0] != 2:
        assert time.monotonic() < deadline


def test_a_stop_where_nothing_runs_is_said(worker):
    code, output = worker.call("stop", "--run=train")
    assert code == 0 and "does not run here" in output


def git(*arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(["git", *identity, *map(str, arguments)], capture_output=True, text=True, check=True).stdout


def test_installing_a_commit(worker, tmp_path):
    """git for real; uv is noted, since what it would download is not ours to test."""
    source, tools, there = tmp_path / "repository", tmp_path / "tools", worker.home / "phijax/source"
    git("init", "--quiet", source)
    git("-C", source, "commit", "--quiet", "--allow-empty", "-m", "first")
    commit = git("-C", source, "rev-parse", "HEAD").strip()
    git("-C", source, "commit", "--quiet", "--allow-empty", "-m", "later")
    tools.mkdir()
    (tools / "python3").write_text(f'#!/usr/bin/env bash\necho "$*" >> {tools}/asked\n')
    (tools / "python3").chmod(0o755)
    (worker.home / "phijax/.venv/bin").mkdir(parents=True)
    (worker.home / "phijax/.venv/bin/python").symlink_to(worker.home / "python")
    worker.environment |= {"PATH": f"{tools}:{os.environ['PATH']}"}
    for _ in range(2):  # again: brought to the commit, whatever lies there
        code, output = worker.call("install", f"--ref={commit}", f"--repository={source}")
        assert code == 0, output
        assert git("-C", there, "rev-parse", "HEAD").strip() == commit
        git("-C", there, "commit", "--quiet", "--allow-empty", "-m", "by hand")
    assert f"{there}[tpu,gcs]" in (tools / "asked").read_text()
    (worker.home / "a.whl").touch()
    code, output = worker.call("install", "--wheel=a.whl")  # instead: what the run would start in is gone
    assert code == 0 and not there.exists(), output
