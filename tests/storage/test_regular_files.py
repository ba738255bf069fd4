"""Files that anybody may have put there: pipes, devices, links to them, files without end."""

import io
import os

import pytest
from etils import epath

from phijax.errors import UserError
from phijax.storage import staging
from phijax.storage.regular_files import begins_with, is_regular, read_bounded, read_stream, size_of


def test_a_file_of_bytes_is_read(tmp_path):
    (tmp_path / "file").write_bytes(b"seven b")
    (tmp_path / "link").symlink_to("file")
    for path in (tmp_path / "file", epath.Path(tmp_path / "link"), str(tmp_path / "link")):
        assert (size_of(path), read_bounded(path, 7), is_regular(path)) == (7, b"seven b", True)
        assert begins_with(path, b"sev") and not begins_with(path, b"seven bytes")
        with pytest.raises(UserError, match="has 7 bytes; a file of its kind is read up to 6"):
            read_bounded(path, 6)


def test_what_is_none_is_refused_before_it_is_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe", tmp_path / "link", tmp_path / "zero", "/dev/zero", tmp_path):
        for read in (size_of, read_bounded, lambda path: begins_with(path, b"G")):
            with pytest.raises(UserError, match="is no regular file"):
                read(path)
    (tmp_path / "dead").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    for name, why in (("dead", "No such file"), ("loop", "Too many levels"), ("missing", "No such file")):
        with pytest.raises(UserError, match=f"{name} cannot be read: {why}"):
            read_bounded(tmp_path / name)


def test_a_pipe_that_was_meant_is_read_to_its_bound(tmp_path):
    assert read_stream(io.BytesIO(b"seven b"), "it", 7) == b"seven b"
    with open("/dev/zero", "rb") as endless, pytest.raises(UserError, match="it has more than 1,000 bytes"):
        read_stream(endless, "it", 1000)


@pytest.mark.parametrize("target", ["nowhere", "output"])
def test_an_output_that_is_a_dead_link_is_refused_before_the_work(tmp_path, target):
    (tmp_path / "output").symlink_to(target)
    with pytest.raises(UserError, match="is a link that leads nowhere"):
        staging.check_output(epath.Path(tmp_path / "output"), 0)
