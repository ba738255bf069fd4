"""The lock file: who is refused, what is taken over, what is left. Two real runs: test_checkpoint_kills.py."""

import dataclasses
import json
import os

import pytest

from phijax.checkpoint import lock
from phijax.checkpoint.lock import LOCK_FILE, WriterLock
from phijax.errors import UserError


def acquire(directory, log=None, break_lock=False) -> WriterLock:
    return WriterLock(directory, break_lock=break_lock, log=(log if log is not None else []).append)


def write_lock(directory, **changes) -> None:
    owner = dataclasses.replace(lock._this_process(), token="other", **changes)
    (directory / LOCK_FILE).write_text(json.dumps(dataclasses.asdict(owner)))


def test_taken_once_and_released(tmp_path):
    with acquire(tmp_path) as held:
        assert held.held
        with pytest.raises(UserError, match=f"process {os.getpid()} "):
            acquire(tmp_path)
    assert not held.held and list(tmp_path.iterdir()) == []
    acquire(tmp_path).release()


def test_only_its_own_is_abandoned(tmp_path):
    lock.abandon(tmp_path)
    for changes in ({"pid": 2**22 + 1}, {"host": "elsewhere"}, {"started": 1}):
        write_lock(tmp_path, **changes)
        lock.abandon(tmp_path)
        assert (tmp_path / LOCK_FILE).exists(), changes
        (tmp_path / LOCK_FILE).unlink()
    acquire(tmp_path)
    lock.abandon(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changes", [{"pid": 2**22 + 1}, {"started": 1}, {"boot": "before the last restart"}])
def test_dead_owner_on_this_host_is_taken_over_with_a_line(tmp_path, changes):
    # A pid above the kernel's limit; a pid that lives but began at another time (a container's pid 1); another boot.
    write_lock(tmp_path, **changes)
    lines = []
    with acquire(tmp_path, lines):
        assert "left by process" in lines[0] and "taken over" in lines[0]


def test_owner_on_another_host_only_when_asked(tmp_path):
    write_lock(tmp_path, host="elsewhere", pid=2**22 + 1)
    with pytest.raises(UserError, match=r"(?s)on host elsewhere.*break_lock=True"):
        acquire(tmp_path)
    lines = []
    with acquire(tmp_path, lines, break_lock=True):
        assert "as break_lock asks" in lines[0]


def test_empty_lock_of_a_run_that_died_while_taking_it(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "EMPTY_LOCK_SECONDS", 0.1)
    (tmp_path / LOCK_FILE).write_text("")
    lines = []
    with acquire(tmp_path, lines):
        assert "a run that died while taking it" in lines[0]


def test_run_whose_lock_was_broken_stops_before_it_writes(tmp_path):
    first = acquire(tmp_path)
    with acquire(tmp_path, break_lock=True) as second:
        with pytest.raises(UserError, match="was taken over by"):
            first.confirm()
        second.confirm()
        first.release()  # not ours any more: stays
        assert (tmp_path / LOCK_FILE).exists()


def test_lock_removed_by_hand_is_written_again(tmp_path):
    lines = []
    with acquire(tmp_path, lines) as held:
        (tmp_path / LOCK_FILE).unlink()
        held.confirm()
        assert "is gone" in lines[0]
        with pytest.raises(UserError):
            acquire(tmp_path)


def test_a_process_that_looks_elsewhere_does_not_see_it(tmp_path):
    with acquire(tmp_path) as held:
        assert held.is_seen()
        held._path = tmp_path / "elsewhere" / LOCK_FILE  # as on a process that was given another --workdir
        assert not held.is_seen(0.2)
        held._path.parent.mkdir()
        write_lock(held._path.parent)  # of another run
        assert not held.is_seen()
