"""A file that is there whole or not at all: what is left of it after a failure, a full disk, a kill."""

import os
import types

import pytest
from etils import epath

from phijax.errors import UserError
from phijax.storage import staging


def test_a_failure_leaves_neither_the_file_nor_the_folders_made_for_it(tmp_path):
    path = epath.Path(tmp_path) / "a" / "b" / "m.gguf"
    with pytest.raises(UserError, match=r"No space left on device. Nothing is left of it"):
        with staging.staged_file(path) as temporary:
            temporary.write_bytes(b"half")
            raise OSError(28, "No space left on device")
    assert os.listdir(tmp_path) == []
    with pytest.raises(UserError, match="too large for F16"), staging.staged_file(path):
        raise UserError("too large for F16")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("output", ["m.gguf", "a/m.gguf"])
def test_an_error_of_reading_is_not_called_one_of_writing(tmp_path, output):
    """The source may lie beside the output, whose own files are those named after it."""
    path, source = epath.Path(tmp_path) / output, tmp_path / "source.gguf"
    with pytest.raises(UserError, match=rf"^{source}: Input/output error. Nothing is left of {path}.$"):
        with staging.staged_file(path):
            raise OSError(5, "Input/output error", str(source))
    for own in (path, path.parent / ".m.gguf.7.tmp", path.parent / "m.gguf.unfinished" / "weights", path.parent):
        with pytest.raises(UserError, match=rf"^{path} could not be written: Input/output error."):
            with staging.staged_file(path):
                raise OSError(5, "Input/output error", str(own))


def test_a_folder_that_was_there_stays_and_so_does_what_others_put_into_a_new_one(tmp_path):
    path = epath.Path(tmp_path) / "a" / "m.gguf"
    with pytest.raises(ZeroDivisionError), staging.staged_file(path):
        (tmp_path / "a" / "other").touch()
        raise ZeroDivisionError
    assert os.listdir(tmp_path / "a") == ["other"]
    with pytest.raises(ZeroDivisionError), staging.staged_file(epath.Path(tmp_path) / "m.gguf"):
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == ["a"]


def test_what_dead_processes_left_is_swept_and_what_the_living_write_is_not(tmp_path):
    dead = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(dead, 0)
    gone = [f".m.gguf.{dead}.tmp", f".m.gguf.exact-{dead}.gguf", f"..m.gguf.exact-{dead}.gguf.{dead}.tmp"]
    stays = [f".m.gguf.{os.getppid()}.tmp", f".other.gguf.{dead}.tmp", "m.gguf.tmp", f".m.gguf.{dead}.tmp.old"]
    for name in (*gone, *stays):
        (tmp_path / name).touch()
    with staging.staged_file(epath.Path(tmp_path) / "m.gguf") as temporary:
        assert sorted(os.listdir(tmp_path)) == sorted(stays)
        temporary.write_bytes(b"whole")
    assert (tmp_path / "m.gguf").read_bytes() == b"whole"


def test_a_disk_without_room_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    staging.check_room(epath.Path(tmp_path) / "a" / "b", 1000)
    with pytest.raises(UserError, match=r"needs 1.0 kB; .* has 1.0 kB free"):
        staging.check_room(epath.Path(tmp_path) / "a" / "b", 1001)
