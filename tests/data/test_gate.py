"""Up to where a run goes while its data are checked, and what it does with the verdict."""

import contextlib
import threading

import pytest
from etils import epath
from synthetic_shards import write_synthetic

from phijax.data.checking import DataCheck, Verdict
from phijax.data.gate import PATIENCE, SECONDS, Gate
from phijax.data.shards import Shards
from phijax.data.verification import ShardFile
from phijax.errors import RunFailure, StoppedUnsaved, UserError

GOOD = Verdict("data: all well")


class Check:
    """A DataCheck whose verdict comes after `waits` waits."""

    files = (ShardFile("a shard", 1000, "digest"),)
    read_bytes = 0

    def __init__(self, verdict: Verdict | None = None, waits: int = 0, told: int = 0):
        self._waits, self._told = waits, told
        self._coming = verdict
        self.begun: list[int] = []
        self.given_up = False
        self.now = 0.0

    @property
    def verdict(self):
        return self._coming if not self._waits else None

    def wait(self, seconds):
        if seconds and self._waits:
            self.now += seconds
            self._waits -= 1
        return self._coming is not None and not self._waits

    def begin(self, step):
        if self._told:
            self._told -= 1
            return False
        self.begun.append(step)
        return True

    def progress(self):
        return int(self.now), 0

    def give_up(self):
        self.given_up = True
        self._coming, self._waits = Verdict("", StoppedUnsaved, max(self.begun, default=-1)), 0


def gate_of(check: Check, first: int = 0, total: int = 300, asked=lambda: False, **more):
    lines, beats = [], []
    said = dict(asked_to_stop=asked, beat=beats.append, pause=contextlib.nullcontext, say=lines.append)
    return Gate(check, first_step=first, total_steps=total, clock=lambda: check.now, **said, **more), lines, beats


def waited(check: Check, call, step: int) -> bool:
    before = check.now
    call(step)
    return check.now > before


def test_one_step_in_a_hundred_is_begun_before_the_verdict_from_wherever_the_run_starts():
    check = Check(GOOD, waits=50)
    gate, lines, _ = gate_of(check, first=1000)
    assert "nothing is saved before that is done, nor a step from 1003 on begun" in lines[0]
    assert not any(waited(check, gate.before_step, step) for step in (1000, 1001, 1002))
    assert waited(check, gate.before_step, 1003)
    assert lines[-1] == "data: all well" and check.begun == [1000, 1001, 1002, 1003]


def test_a_run_of_few_steps_begins_none_before_the_verdict():
    check = Check(GOOD, waits=5)
    gate, _, beats = gate_of(check, total=99)
    assert waited(check, gate.before_step, 0)
    assert not beats  # the watchdog counts from the first: that step has still to be compiled


def test_no_step_is_begun_ten_minutes_after_the_start():
    check = Check(GOOD, waits=50)
    gate, _, beats = gate_of(check, total=10**6)
    check.now = SECONDS
    assert not waited(check, gate.before_step, 1)
    check.now += 1
    assert waited(check, gate.before_step, 2) and set(beats) == {2}


def test_a_save_waits_for_the_verdict():
    check = Check(GOOD, waits=50)
    gate, lines, _ = gate_of(check)
    gate.before_step(0)
    assert waited(check, gate.before_save, 0) and "step 0: waiting for the check of the data" in lines[1]
    assert lines[-1] == "data: all well" and not waited(check, gate.before_save, 1)


def test_a_verdict_that_is_there_is_said_once():
    gate, lines, _ = gate_of(Check(GOOD))
    for step in range(3):
        gate.before_step(step)
        gate.before_save(step)
    assert lines == ["data: all well"]


def test_all_processes_go_as_far_as_the_one_that_is_farthest():
    check = Check(Verdict("The shard x is another.", UserError, step=7), told=2)
    gate, _, _ = gate_of(check, first=5)
    for step in (5, 6, 7):
        gate.before_step(step)
    with pytest.raises(UserError, match=r"x is another\.\nWhat was trained since step 5 is not saved; mend that"):
        gate.before_step(8)


@pytest.mark.parametrize("problem", [UserError, RunFailure])
def test_with_a_problem_nothing_is_saved(problem):
    gate, _, _ = gate_of(Check(Verdict("The shard x.", problem, step=-1)))
    with pytest.raises(problem, match=r"The shard x\.\nNothing was trained; "):
        gate.before_save(0)


def test_a_run_that_is_asked_to_stop_does_not_wait_for_long():
    check = Check(None, waits=10**9)
    gate, _, _ = gate_of(check, asked=lambda: True)
    gate.before_step(0)
    with pytest.raises(StoppedUnsaved, match="What was trained since step 0 is not saved; the same command"):
        gate.before_save(0)
    assert PATIENCE <= check.now < PATIENCE + 2 and check.given_up
    soon = Check(GOOD, waits=3)
    gate, _, _ = gate_of(soon, asked=lambda: True)
    gate.before_save(0)  # and saves
    assert not soon.given_up


# --- the check itself, of one process


@pytest.fixture
def shards(tmp_path) -> Shards:
    return Shards.open(write_synthetic(tmp_path / "shards"))


def test_the_check_of_sound_files_is_remembered_and_passes(shards, tmp_path):
    for read, known in ((2, 0), (0, 2)):
        with DataCheck(shards.files(), epath.Path(tmp_path / "run")) as check:
            assert check.wait(10) and check.verdict.problem is None
        assert f"all 2 shards are what their manifests say: {read} read whole" in check.verdict.line
        assert (f"{known} as when last read whole" in check.verdict.line) == bool(known)


def test_a_check_that_cannot_be_remembered_still_passes(shards, tmp_path):
    (tmp_path / "run").write_text("no folder")
    with DataCheck(shards.files(), epath.Path(tmp_path / "run")) as check:
        assert check.wait(10) and check.verdict.problem is None
    assert "cannot be remembered" in check.verdict.line


def test_giving_up_and_leaving_end_the_threads(shards, tmp_path):
    path = tmp_path / "endless"
    with open(path, "wb") as opened:
        opened.truncate(1 << 41)
    files = [*shards.files(), ShardFile(str(path), 1 << 41, "0" * 64)]
    with DataCheck(files, epath.Path(tmp_path / "run")) as check:
        assert check.begin(4) and not check.wait(0)
        check.give_up()
        assert check.wait(10) and check.verdict.problem is StoppedUnsaved and check.verdict.step == 4
    with DataCheck(files, epath.Path(tmp_path / "run")) as check:
        pass
    with pytest.raises(RuntimeError, match="the run has left"):
        check.wait(10)
    for thread in threading.enumerate():
        if thread.name == "data check":
            thread.join(10)
            assert not thread.is_alive()
