"""What a disk, a user or a kill can do to a checkpoint directory, in one process. Kills: test_checkpoint_kills.py."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import pytest
from checkpoint_case import bits, like, mesh_of, rows, save_steps, state, writer

from phijax.checkpoint import manifest, steps, upkeep
from phijax.checkpoint.run_state import SaveFailed
from phijax.errors import UserError


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory) -> pathlib.Path:
    """A directory with steps 1, 2, 3 of state(1), state(2), state(3); to be copied."""
    directory = tmp_path_factory.mktemp("three") / "checkpoints"
    save_steps(directory, {1: 1, 2: 2, 3: 3}, mesh_of(8))
    return directory


@pytest.fixture
def copy(three_steps, tmp_path) -> pathlib.Path:
    return shutil.copytree(three_steps, tmp_path / "checkpoints")


def largest_file(folder: pathlib.Path) -> pathlib.Path:
    return max((path for path in (folder / "state").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def zero_page(path):
    content = path.read_bytes()
    path.write_bytes(bytes(min(4096, len(content))) + content[4096:])


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def remove(path):
    path.unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip_byte, "has changed since it was written"),
        (zero_page, "has changed since it was written"),
        (truncate, "bytes instead of"),
        (remove, "is missing"),
    ],
)
def test_damaged_file_is_named_and_the_step_before_is_used(copy, damage, words):
    victim = largest_file(copy / "3")
    damage(victim)
    with writer(copy) as (checkpoints, lines):
        with pytest.raises(UserError, match=words):
            checkpoints.restore(3, like(state(3, mesh_of(8))))
        assert checkpoints.latest_verified() == 2
        (line,) = lines
        assert str(victim.relative_to(copy / "3")) in line and words in line and "Using step 2 instead" in line
        assert bits(checkpoints.restore(2, like(state(2, mesh_of(8))))) == bits(state(2, mesh_of(8)))
        # The run comes to step 3 again and must be able to save it.
        checkpoints.save(3, state(4, mesh_of(8)))
        checkpoints.wait()
        assert checkpoints.latest_verified() == 3
        assert bits(checkpoints.restore(3, like(state(3, mesh_of(8))))) == bits(state(4, mesh_of(8)))


def test_any_flipped_byte_of_any_file_is_found(copy):
    folder = copy / "3"
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        whole = path.read_bytes()
        flip_byte(path)
        (problem,) = manifest.verify(steps.epath.Path(folder))
        assert str(path.relative_to(folder)) in problem
        path.write_bytes(whole)
    assert manifest.verify(steps.epath.Path(folder)) == []


def test_no_whole_step_left_is_an_error_and_stays_one(copy):
    for step in (1, 2, 3):
        flip_byte(largest_file(copy / str(step)))
    for _ in range(2):  # the second start must not begin from scratch either
        with writer(copy) as (checkpoints, _), pytest.raises(UserError, match="none is whole"):
            checkpoints.latest_verified()


def test_damaged_steps_set_aside_do_not_make_a_directory_empty(copy):
    flip_byte(largest_file(copy / "3"))
    with writer(copy) as (checkpoints, _):
        assert checkpoints.latest_verified() == 2
    shutil.rmtree(copy / "1")
    shutil.rmtree(copy / "2")
    with writer(copy) as (checkpoints, lines):
        assert "3 was set aside as damaged" in lines[0]
        with pytest.raises(UserError, match="none is whole"):
            checkpoints.latest_verified()


def test_renamed_step_is_not_taken_for_another(copy):
    (copy / "3").rename(copy / "9")
    with writer(copy) as (checkpoints, lines):
        assert checkpoints.latest_verified() == 2
        assert "manifest.json is of step 3" in lines[0]


def test_leftovers_are_removed_with_their_size_and_strays_are_left_alone(copy):
    (copy / "4.orbax-checkpoint-tmp").mkdir()
    (copy / "4.orbax-checkpoint-tmp" / "data").write_bytes(bytes(1234))
    steps.begin(steps.epath.Path(copy / "5"))
    (copy / "5" / "state.orbax-checkpoint-tmp").mkdir()
    (copy / "7").mkdir()
    (copy / "7" / "thesis.txt").write_text("precious")
    (copy / "007").mkdir()
    with writer(copy) as (checkpoints, lines):
        text = "\n".join(lines)
        assert "4.orbax-checkpoint-tmp, 1,234 bytes" in text
        assert f"removed {copy / '5'}" in text
        assert f"{copy / '7'} is not a checkpoint of ours" in text
        assert not (copy / "4.orbax-checkpoint-tmp").exists() and not (copy / "5").exists()
        assert (copy / "007").exists()
        assert checkpoints.steps() == [1, 2, 3]
        assert checkpoints.latest_verified() == 3
        checkpoints.save(7, state(7, mesh_of(8)))  # the name is taken by what is not ours: moved, not removed
        checkpoints.wait()
        assert checkpoints.latest_verified() == 7
    assert (copy / "7.stray1" / "thesis.txt").read_text() == "precious"


def test_half_deleted_old_step_is_never_offered(copy, monkeypatch):
    folder = steps.epath.Path(copy / "1")
    listed = sorted(folder.iterdir(), key=str, reverse=True)
    # State before manifest: the order in which a file system lists a folder must not be what saves us.
    monkeypatch.setattr(type(folder), "iterdir", lambda _: iter(listed))
    monkeypatch.setattr(type(folder), "rmtree", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        steps.delete(folder)
    monkeypatch.undo()
    assert largest_file(copy / "1").exists()
    with writer(copy) as (checkpoints, lines):
        assert checkpoints.steps() == [2, 3]
        assert f"removed {copy / '1'}" in lines[0]
        assert not (copy / "1").exists()


def test_lives_shorter_than_a_save_are_noticed(tmp_path):
    for life in range(3):
        steps.begin(steps.epath.Path(tmp_path / "5"))
        with writer(tmp_path) as (_, lines):
            assert ("runs in a row died while saving" in lines[0]) == (life >= 1)
    save_steps(tmp_path, {5: 0}, mesh_of(1))
    steps.begin(steps.epath.Path(tmp_path / "6"))
    with writer(tmp_path) as (_, lines):
        assert "in a row" not in lines[0]


def test_directory_that_cannot_be_written_is_refused_at_start(tmp_path):
    (tmp_path / "file").write_text("")  # root ignores permission bits, but nobody writes below a file
    with pytest.raises(UserError, match="cannot be written"), writer(tmp_path / "file" / "checkpoints"):
        pass
    with pytest.raises(UserError, match="cannot be written"):
        upkeep.tidy(steps.epath.Path(tmp_path / "file" / "checkpoints"))


def test_read_only_directory_is_refused_at_start(tmp_path):
    mount = tmp_path / "mount"
    mount.mkdir()
    if _run("mount", "-t", "tmpfs", "-o", "ro", "tmpfs", mount) != 0:
        pytest.skip("cannot mount a read-only tmpfs here: not root, or not allowed")
    try:
        with pytest.raises(UserError, match="Read-only file system"), writer(mount):
            pass
        with pytest.raises(UserError, match="Read-only file system"):
            upkeep.tidy(steps.epath.Path(mount))
    finally:
        _run("umount", mount)


@pytest.fixture
def small_disk(tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    if _run("mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", mount) != 0:
        pytest.skip("cannot mount a tmpfs here: not root, or not allowed")
    yield mount
    _run("umount", mount)


def _random_bytes(megabytes: int) -> dict:
    words = jax.random.bits(jax.random.key(0), (megabytes * 2**18,), jnp.uint32)  # nothing to compress
    return {"w": jax.device_put(words, rows(mesh_of(8)))}


def test_full_disk_stops_the_run_and_keeps_old_steps(small_disk, caplog):
    small, big = _random_bytes(1), _random_bytes(6)
    with writer(small_disk) as (checkpoints, lines):
        checkpoints.save(1, small)
        checkpoints.wait()
        checkpoints.save(2, big)
        with pytest.raises(SaveFailed, match=r"(?s)save of step 2 .*Saved steps are untouched: \[1\]"):
            checkpoints.wait()
        assert not any("saved step 2" in line for line in lines)
        assert not any(record.exc_info for record in caplog.records)  # of Orbax's threads
        with pytest.raises(SaveFailed):
            checkpoints.save(3, small)
    with writer(small_disk) as (checkpoints, _):
        assert checkpoints.latest_verified() == 1
        assert bits(checkpoints.restore(1, like(small))) == bits(small)


def test_full_disk_is_counted_and_passed_over_if_the_config_says_so(small_disk):
    small, big = _random_bytes(1), _random_bytes(6)
    with writer(small_disk, on_save_failure="continue", keep_last=1) as (checkpoints, lines):
        checkpoints.save(1, small)
        checkpoints.save(2, big)
        while checkpoints.failed_saves == 0:
            checkpoints.poll()
        assert any(line.startswith("ERROR: The save of step 2") for line in lines)
        assert not (small_disk / "2").exists()  # its room is given back
        checkpoints.save(3, small)
        checkpoints.wait()
        assert checkpoints.steps() == [3]
        checkpoints.save(4, big)
        with pytest.raises(SaveFailed, match="step 4"):  # the last save of all: no later one can make up for it
            checkpoints.wait()
        assert checkpoints.latest_verified() == 3


def test_failure_of_the_manifest_is_a_failure_of_the_save(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with writer(tmp_path) as (checkpoints, lines):
        monkeypatch.setattr(manifest, "write", full)
        checkpoints.save(1, state(0, mesh_of(1)))
        with pytest.raises(SaveFailed, match="No space left"):
            checkpoints.wait()
        assert checkpoints.steps() == [] and not (tmp_path / "1").exists()
        assert not any("saved" in line for line in lines if not line.startswith("ERROR"))


def test_save_that_is_stuck_is_reported_within_the_time_limit(tmp_path, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(manifest, "write", lambda *_, **__: release.wait())
    with writer(tmp_path, timeout_seconds=1.0) as (checkpoints, _):
        try:
            checkpoints.save(1, state(0, mesh_of(1)))
            with pytest.raises(SaveFailed, match="not finished after 2 s"):
                checkpoints.wait()
        finally:
            release.set()


def test_every_instant_of_saving_and_deleting_leaves_a_whole_step(tmp_path):
    """Copies the directory before each change of a file name, as a kill at that instant would leave it."""
    copies = CrashCopies(tmp_path / "run", tmp_path / "copies")
    sys.addaudithook(copies.hook)
    mesh = mesh_of(2)
    trees = {step: {"w": state(step, mesh)["params"]["w"]} for step in range(1, 5)}
    expected = {step: bits(tree) for step, tree in trees.items()}
    wanted = like(trees[1])
    try:
        with writer(copies.directory, log=copies.log, keep_last=1) as (checkpoints, _):
            copies.active = True
            for step, tree in trees.items():
                checkpoints.save(step, tree)
                checkpoints.wait()
    finally:
        copies.active = False
    assert len(copies.saved_before) > 60  # else the hook sees nothing and this test proves nothing
    found = set()
    for number, saved in list(enumerate(copies.saved_before))[::2]:
        (copies.target / str(number) / "writer.lock").unlink(missing_ok=True)  # of this very process, which lives
        with writer(copies.target / str(number)) as (checkpoints, _):
            newest = checkpoints.latest_verified()
            assert (newest or 0) >= saved, f"copy {number}, before {copies.events[number]}: step {saved} was saved"
            for step in checkpoints.steps():
                assert bits(checkpoints.restore(step, wanted)) == expected[step]
            found.add(newest)
    assert {1, 2, 3} <= found


class CrashCopies:
    """An audit hook that copies `directory` before each rename, removal or creation in it, one at a time."""

    EVENTS = frozenset({"os.rename", "os.remove", "os.mkdir", "os.rmdir", "open"})

    def __init__(self, directory: pathlib.Path, target: pathlib.Path):
        self.directory, self.target = directory, target
        target.mkdir()
        self.active = False
        self.saved_before: list[int] = []  # for each copy: the newest step that the log had called saved
        self.events: list[str] = []
        self.log = self
        self._saved = 0

    def append(self, line: str) -> None:
        if line.startswith("saved step "):
            self._saved = int(line.split()[2])

    def hook(self, event: str, arguments: tuple) -> None:
        if not self.active or event not in self.EVENTS or not str(arguments[0]).startswith(str(self.directory)):
            return
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            return
        self.active = False  # copying is opening
        try:
            number = len(self.saved_before)
            saved = self._saved  # taken before the copy: a save may end while it is made
            # cp goes on past a file that another thread renames meanwhile; that thread's file is no saved step's.
            subprocess.run(["cp", "-r", self.directory, self.target / str(number)], stderr=subprocess.DEVNULL)
            if not (self.target / str(number)).exists():
                return  # the very first event: no directory yet
            self.saved_before.append(saved)
            self.events.append(f"{event} {arguments[0]}")
        finally:
            self.active = True


def _run(*command) -> int:
    try:
        return subprocess.run([str(part) for part in command], capture_output=True).returncode
    except FileNotFoundError:
        return 1


def test_hostile_manifest_is_refused(copy):
    path = copy / "3" / "manifest.json"
    for text in ("", "[]", "{}", '{"crc32": "0"}', "\x00", json.dumps({**json.loads(path.read_text()), "step": 4})):
        path.write_text(text)
        with pytest.raises(manifest.DamagedManifest):
            manifest.read(steps.epath.Path(copy / "3"))
