"""Whether a file is what its manifest says, and when it must be read again to know it."""

import hashlib
import os

import pytest
from etils import epath

from phijax.data import verification
from phijax.data.verification import FileCheck, ShardFile, check, look, recall, remember
from phijax.errors import RunFailure, UserError

CONTENT = bytes(range(256)) * 1024  # four times the piece at each end that is looked at


@pytest.fixture
def file(tmp_path) -> ShardFile:
    path = tmp_path / "shard"
    path.write_bytes(CONTENT)
    return ShardFile(str(path), len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


def change(file: ShardFile, offset: int) -> None:
    """One byte, in place, and the file's time as it was."""
    before = os.stat(file.path)
    with open(file.path, "r+b") as opened:
        opened.seek(offset)
        opened.write(b"?")
    os.utime(file.path, ns=(before.st_atime_ns, before.st_mtime_ns))


def read_by(file: ShardFile, known) -> int:
    """Bytes that `check` reads whole."""
    pieces = []
    assert check(file, known, pieces.append).sha256 == file.sha256
    return sum(pieces)


@pytest.mark.parametrize("offset", [0, len(CONTENT) // 2, len(CONTENT) - 1])
def test_another_byte_anywhere_is_seen_also_behind_the_files_old_time(file, offset):
    known = {check(file)}
    change(file, offset)
    for remembered in ((), known):
        with pytest.raises(UserError, match=r"shard is corrupt, or another .*Copy or prepare the shard again"):
            check(file, remembered)


def test_a_file_is_read_once_and_again_only_when_it_may_have_changed(file):
    known = {check(file)}
    assert read_by(file, ()) == len(CONTENT) and read_by(file, known) == 0
    os.utime(file.path)  # touched, and equal
    assert read_by(file, known) == len(CONTENT)
    known = {check(file)}
    assert read_by(file, known) == 0
    os.rename(file.path, file.path + ".old")  # another inode
    with open(file.path, "wb") as copy:
        copy.write(CONTENT)
    assert read_by(file, known) == len(CONTENT)
    assert read_by(ShardFile(file.path, file.bytes, file.sha256), {check(file)}) == 0


def test_both_ends_are_looked_at_where_a_file_system_keeps_no_times(file, monkeypatch):
    monkeypatch.setattr(verification, "identity_of", lambda path: (len(CONTENT),))
    known = {check(file)}
    assert read_by(file, known) == 0
    for offset in (0, len(CONTENT) - 1):
        change(file, offset)
        with pytest.raises(UserError):
            check(file, known)


def test_another_manifest_is_another_question(file):
    known = {check(file)}
    with pytest.raises(UserError, match="its sha256 is not the manifest's"):
        check(ShardFile(file.path, file.bytes, "0" * 64), known)


def test_a_file_that_changes_while_it_is_read_is_not_remembered(file):
    found = check(file, (), lambda size: os.utime(file.path))
    assert read_by(file, {found}) == len(CONTENT)


def test_what_is_remembered_comes_back_and_what_is_damaged_is_not_believed(file, tmp_path):
    folder, known = epath.Path(tmp_path / "run" / "data_checked"), {check(file)}
    assert recall(folder) == set()
    remember(folder, 3, known)
    assert recall(folder) == known
    sound = (folder / "3.json").read_text()
    damages = ("", "{", "[]", "[" * 100_000, '{"format": 1}', sound[:-9], sound.replace("[", "7, [", 1))
    damages += (sound.replace("phijax", "other"), sound.replace('"edges"', '"egdes"'))
    for damaged in damages:
        (folder / "3.json").write_text(damaged)
        assert recall(folder) == set(), damaged[:80]
    (folder / "4.json").write_text(sound)  # of a process that was not disturbed
    assert recall(folder) == known


def test_who_cannot_be_read_for_a_moment_is_no_mistake_of_the_users(file, tmp_path, monkeypatch):
    missing = FileCheck([ShardFile(str(tmp_path / "none"), 1, "")], ())
    assert missing.wait(10) and isinstance(missing.problem, UserError) and "none cannot be read" in str(missing.problem)

    def fails(*arguments):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(verification, "sha256_of", fails)
    unread = FileCheck([file], ())
    assert unread.wait(10) and isinstance(unread.problem, RunFailure) and file.path in str(unread.problem)
    assert not unread.complete


def test_a_look_says_what_it_did_not_read(file, tmp_path):
    assert look([file], None, 10).startswith("data: all 1 shards are what their manifests say: 1 read whole (0.26 MB)")
    remember(epath.Path(tmp_path / "run" / "data_checked"), 0, {check(file)})
    assert "0 read whole (0.00 MB), 1 as when last read whole" in look([file], tmp_path / "run", 10)
    with open(tmp_path / "endless", "wb") as opened:
        opened.truncate(1 << 41)
    endless = ShardFile(str(tmp_path / "endless"), 1 << 41, "0" * 64)
    said = look([file, endless], None, 0.5)
    assert "data: 1 of 2 shards are what" in said and "the other 1 were not read within 0 s" in said
