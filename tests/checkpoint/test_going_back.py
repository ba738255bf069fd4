"""Which steps stay, which one a run goes on from, and going back: once, at any instant, losing nothing."""

import json
import shutil

import jax.numpy as jnp
import pytest
from checkpoint_case import writer

from phijax.checkpoint import going_back, good, manifest, reading, steps
from phijax.errors import UserError
from phijax.interchange.native import source as native_source
from phijax.storage import durable


def tree(step: int, in_a_row: int = 0) -> dict:
    return {"step": jnp.int32(step), "skipped_in_a_row": jnp.int32(in_a_row)}


def save(directory, extras: dict[int, dict | None], **config) -> list[str]:
    """Saves each step of {step: extra}; returns what was logged."""
    with writer(directory, **{"keep_last": 9, **config}) as (checkpoints, lines):
        for step, extra in extras.items():
            checkpoints.save(step, tree(step), extra)
            checkpoints.wait()
    return lines


def scored(value: float | None) -> dict:
    return {"good": True, "scores": {} if value is None else {"heldout_loss/b": value}}


GOOD, BAD = {"good": True}, {"good": False}


def start(directory, total: int | None = None, repeated=True, **config) -> tuple[int, list[dict], list[str]]:
    """A start of the run: (step it goes on from, what it noted, what it logged)."""
    noted = []
    with writer(directory, **config) as (checkpoints, lines):
        step = checkpoints.latest_verified(total, lambda: repeated)
        checkpoints.go_on_from(step, noted.append)
    return step, noted, lines


def saved(directory) -> list[int]:
    return steps.list_folders(durable.absolute(directory)).steps


def names(directory) -> set[str]:
    return {path.name for path in directory.iterdir() if path.is_dir()}


def test_the_newest_good_step_stays_whatever_keep_last_says(tmp_path):
    save(tmp_path, {1: GOOD, 2: GOOD, 3: BAD, 4: BAD, 5: BAD}, keep_last=2)
    assert saved(tmp_path) == [2, 4, 5]
    save(tmp_path, {6: GOOD}, keep_last=1)
    assert saved(tmp_path) == [2, 6], "whether 6 is worth anything is seen at the next update"
    save(tmp_path, {7: GOOD}, keep_last=1)
    assert saved(tmp_path) == [6, 7]


def test_the_best_step_stays_too(tmp_path):
    values = {1: 3.0, 2: 2.0, 3: float("nan"), 4: None, 5: 2.5, 6: 4.0}
    how = dict(keep_last=1, keep_best="heldout_loss/b")
    lines = save(tmp_path, {step: scored(value) for step, value in values.items()}, **how)
    assert saved(tmp_path) == [2, 5, 6]
    assert [line for line in lines if "best so far" in line] == [
        "step 1 is the best so far by heldout_loss/b: 3",
        "step 2 is the best so far by heldout_loss/b: 2",
    ]
    save(tmp_path, {7: scored(1.0) | BAD, 8: scored(2.0), 9: scored(5.0)}, **how)
    assert saved(tmp_path) == [8, 9], "of equals the newest; one that is not good is not the best"
    save(tmp_path, {10: scored(6.0), 11: scored(6.0)}, keep_last=1, keep_best="heldout_loss/other")
    assert saved(tmp_path) == [10, 11], "by a metric that no step has, none is"


def test_steps_from_before_manifests_said_it_are_judged_by_their_state(tmp_path):
    with writer(tmp_path) as (checkpoints, _):
        for step, in_a_row in ((1, 0), (2, 0), (3, 4)):
            checkpoints.save(step, tree(step, in_a_row))
            checkpoints.wait()
    assert [good.is_good(durable.absolute(tmp_path) / str(step)) for step in (1, 2, 3)] == [True, True, False]
    step, noted, lines = start(tmp_path)
    assert step == 2 and noted == [{"went_back_to": 2, "set_aside": [3], "asked": False}]
    assert any("saved steps [3] are not good" in line and "Using step 2 instead" in line for line in lines)
    assert (tmp_path / "3" / "not_good.json").exists() and saved(tmp_path) == [1, 2]
    save(tmp_path, {3: GOOD})
    assert saved(tmp_path) == [1, 2, 3] and names(tmp_path) == {"1", "2", "3"}, "it took its place again"


def test_the_last_step_of_a_run_is_its_end_though_not_good_and_without_a_good_step_the_newest_is_taken(tmp_path):
    save(tmp_path, {3: GOOD, 6: BAD})
    assert start(tmp_path, total=6)[0] == 6 and saved(tmp_path) == [3, 6]
    assert start(tmp_path, total=9)[0] == 3 and saved(tmp_path) == [3]
    save(tmp_path / "bad", {3: BAD, 6: BAD})
    step, noted, lines = start(tmp_path / "bad", total=9)
    assert (step, noted) == (6, []) and any("no step is good" in line for line in lines)


def test_going_back_sets_aside_and_says_so_and_happens_once(tmp_path):
    save(tmp_path, dict.fromkeys((3, 6, 9, 12), GOOD))
    step, noted, lines = start(tmp_path, restore_step=6)
    assert step == 6 and noted == [{"went_back_to": 6, "set_aside": [9, 12], "asked": True}]
    assert names(tmp_path) == {"3", "6", "9.aside1", "12.aside1"} and sum("set aside as" in line for line in lines) == 2
    assert start(tmp_path, restore_step=6)[:2] == (6, []), "killed before its first save: nothing is left to do"
    save(tmp_path, {9: GOOD, 12: GOOD, 15: GOOD}, restore_step=6)
    assert manifest.read(tmp_path / "9")["extra"] == GOOD | {"restore_step": 6}
    step, noted, lines = start(tmp_path, restore_step=6)
    assert (step, noted) == (15, []) and any("went back to step 6 before" in line for line in lines)
    with pytest.raises(UserError, match=r"(?s)The config has changed.*leave restore_step out.*mv \S+/15 \S+\n"):
        start(tmp_path, restore_step=6, repeated=False)
    assert start(tmp_path)[:2] == (15, [])
    assert start(tmp_path, restore_step=12)[0] == 12, "another step is another wish"
    assert names(tmp_path) == {"3", "6", "9", "9.aside1", "12", "12.aside1", "15.aside1"}
    assert any("9.aside1" in line and "until you remove them" in line for line in start(tmp_path)[2])
    step, noted, _ = start(tmp_path, restore_step=6)
    assert (step, noted) == (12, []), "12 was made after going back to 6"


def test_it_happens_once_also_when_the_step_itself_was_rotated_away(tmp_path):
    save(tmp_path, dict.fromkeys((3, 6, 9), GOOD))
    start(tmp_path, restore_step=6)
    save(tmp_path, dict.fromkeys((9, 12, 15), GOOD), restore_step=6, keep_last=2)
    assert saved(tmp_path) == [12, 15]
    assert start(tmp_path, restore_step=6)[0] == 15
    assert names(tmp_path) == {"12", "15", "9.aside1"}, "what was set aside is nobody's to remove"
    assert (tmp_path / "9.aside1" / "manifest.json").exists()
    save(tmp_path, {18: GOOD})  # without the key
    with pytest.raises(UserError, match=r"restore_step=6: .* no such step. It has: 12, 15, 18; set aside: 9.aside1"):
        start(tmp_path, restore_step=6)
    with pytest.raises(UserError, match="no such step"):
        start(tmp_path / "empty", restore_step=6)


def test_killed_at_any_instant_the_same_command_ends_the_same(tmp_path, monkeypatch):
    save(tmp_path / "run", dict.fromkeys((3, 6, 9, 12), GOOD))
    rename, count = steps.set_aside_whole, 0

    def dying(folder):
        nonlocal count
        if count == allowed:
            raise KeyboardInterrupt
        count += 1
        return rename(folder)

    monkeypatch.setattr(steps, "set_aside_whole", dying)
    for allowed in (0, 1, 2):
        copy = shutil.copytree(tmp_path / "run", tmp_path / f"copy{allowed}")
        count, noted = 0, []
        try:
            going_back.set_aside_later(copy, 3, True, noted.append)
        except KeyboardInterrupt:
            assert noted, "it was written down before anything was moved"
        assert saved(copy) == [3, 6, 9, 12][: 4 - allowed], "what is left is one history"
        count, before = -9, saved(copy)
        assert start(shutil.copytree(copy, tmp_path / f"without{allowed}"))[0] == before[-1]
        assert start(copy, restore_step=3)[0] == 3
        assert names(copy) == {"3", "6.aside1", "9.aside1", "12.aside1"}


def test_a_damaged_step_is_not_gone_back_to_and_nothing_is_moved(tmp_path):
    save(tmp_path, dict.fromkeys((3, 6, 9), GOOD))
    (tmp_path / "6" / "state" / "extra.txt").write_text("not in the manifest, so no harm")
    data = next(path for path in (tmp_path / "3" / "state").rglob("*") if path.is_file())
    data.write_bytes(data.read_bytes() + b"!")
    with pytest.raises(UserError, match=r"(?s)3 is damaged: .*Take another step than 3: 3, 6, 9"):
        start(tmp_path, restore_step=3)
    assert saved(tmp_path) == [3, 6, 9]
    assert start(tmp_path, restore_step=6)[0] == 6


def test_a_bucket_is_refused_with_the_commands_to_type(tmp_path, monkeypatch):
    save(tmp_path, dict.fromkeys((3, 6, 9), GOOD))
    with monkeypatch.context() as patch:
        patch.setattr(going_back.durable, "is_local", lambda path: False)
        with pytest.raises(UserError, match=r"(?s)mv \S+/9 \S+/9.aside1\n.*mv \S+/6 \S+/6.aside1"):
            going_back.step_to_restore(durable.absolute(tmp_path), 3, True)
        assert going_back.step_to_restore(durable.absolute(tmp_path), 9, True) == (9, [])
    assert saved(tmp_path) == [3, 6, 9]


def diverged(directory, last_good: int | None) -> tuple[int | None, bool]:
    with writer(directory) as (checkpoints, _):
        return checkpoints.after_divergence(last_good)


def test_after_divergence_the_step_that_nothing_good_came_of_is_no_step(tmp_path):
    assert diverged(tmp_path, None) == (None, False)
    save(tmp_path, {3: GOOD})
    assert diverged(tmp_path, 7) == (3, True)
    assert diverged(tmp_path, None) == (3, False) and saved(tmp_path) == [3], "the only one stays"
    save(tmp_path, {6: GOOD, 9: GOOD})
    assert diverged(tmp_path, 9) == (9, True) and saved(tmp_path) == [3, 6, 9]
    assert diverged(tmp_path, 8) == (6, True) and saved(tmp_path) == [3, 6]
    assert start(tmp_path)[0] == 6 and names(tmp_path) == {"3", "6", "9"}
    # 9 was saved after a good update from 6: what now fails at 6 has another cause, and 6 is not given up as well.
    assert diverged(tmp_path, None) == (6, True) and saved(tmp_path) == [3, 6]
    assert start(tmp_path, restore_step=6)[:2] == (6, []), "the command of the message, as often as it is typed"
    assert start(tmp_path, restore_step=3)[1][0]["set_aside"] == [6, 9]
    assert names(tmp_path) == {"3", "6.aside1", "9.aside1"}


def test_who_opens_a_workdir_gets_the_newest_good_step(tmp_path):
    checkpoints = tmp_path / steps.CHECKPOINTS_FOLDER
    save(checkpoints, {3: GOOD, 6: BAD})
    with pytest.warns(UserWarning, match=r"Step 6 is not called good.*\nUsing step 3 instead"):
        assert native_source._whole_step(durable.absolute(tmp_path)).name == "3"
    shutil.rmtree(checkpoints / "3")
    with pytest.warns(UserWarning, match="6 is not called good, but there is no other"):
        assert native_source._whole_step(durable.absolute(tmp_path)).name == "6"
    assert native_source._whole_step(durable.absolute(checkpoints / "6")).name == "6", "asked for by its own path"


def test_old_readers_and_describe(tmp_path):
    """The format is the old one: what is new lies in `extra`."""
    save(tmp_path, {3: GOOD, 6: GOOD, 9: BAD})
    start(tmp_path, restore_step=3)
    save(tmp_path, {6: GOOD, 9: GOOD})
    diverged(tmp_path, 8)
    assert set(json.loads((tmp_path / "3" / "manifest.json").read_text())) == {
        "format", "kind", "step", "written", "identity", "extra", "leaves", "files", "crc32"
    }  # fmt: skip
    text = reading.describe(tmp_path)
    assert "extra.good: true" in text and "9: not good, set aside" in text
    assert "9.aside1: set aside when the run went back" in text
    assert reading.read_manifest(tmp_path / "9.aside1")["step"] == 9
