"""A small file is there whole or not at all."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest
from etils import epath

from phijax.storage import atomic


def test_content_is_replaced(tmp_path):
    path = tmp_path / "a.json"
    atomic.write_bytes(path, b"before")
    atomic.write_text(epath.Path(path), "Größe\n")
    assert path.read_bytes() == "Größe\n".encode()
    atomic.write_json(path, {"a": [1]})
    assert path.read_text() == '{\n  "a": [\n    1\n  ]\n}\n' and os.listdir(tmp_path) == ["a.json"]


def test_what_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "a"
    atomic.write_text(path, "before")
    with pytest.raises(ValueError), atomic.replaced(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "before"
        raise ValueError
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["a"]


def test_it_is_synced_before_it_has_its_name_and_its_name_after(tmp_path, monkeypatch):
    order, sync = [], os.fsync

    def watched(descriptor):
        order.append((pathlib.Path(os.readlink(f"/proc/self/fd/{descriptor}")).name, (tmp_path / "a").exists()))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    atomic.write_text(tmp_path / "a", "x")
    assert order == [(f".a.{os.getpid()}.tmp", False), (tmp_path.name, True)]


def test_a_kill_in_between_leaves_what_was_there(tmp_path):
    path = tmp_path / "a"
    path.write_text("before")
    program = """
import os, signal, sys
from phijax.storage import atomic
with atomic.replaced(sys.argv[1]) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    assert subprocess.run([sys.executable, "-c", program, path], env=environment).returncode == -signal.SIGKILL
    assert path.read_text() == "before"
