"""Files changed by chance: 150 changes of each file that phijax reads (benchmarks/mutations.py)."""

import os
import pathlib
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).parent.parent


def attack(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "attack.py"), "mutations", *arguments]
    memory = {"TMPDIR": "/dev/shm"} if os.access("/dev/shm", os.W_OK) else {}  # what readers write is synced each time
    environment = {**os.environ, **memory, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_other_changes_of_files_by_strangers():
    ended = attack("--changes=400", "--seed=1", "--only=token")
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-4000:]


def test_every_change_opens_or_is_refused_by_one_message():
    ended = attack("--changes=150")
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-4000:]
    rows = [line.split(" | ") for line in ended.stdout.splitlines() if line.startswith("| ")][2:]
    assert len(rows) >= 30
    for name, opened, refused, failed in rows:
        assert int(opened) + int(refused) == 150 and failed == "0 |", name
