"""Paths of etils after `import phijax`: files of nobody, folders with the signs of patterns in their names."""

import grp
import os
import pwd
import subprocess
import sys

import pytest
from etils import epath

import phijax  # noqa: F401  which mends them


@pytest.fixture
def nobody(monkeypatch):
    """Every file's owner and group have no name."""

    def unknown(number):
        raise KeyError(f"uid not found: {number}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(grp, "getgrgid", unknown)


def test_a_file_of_nobody_has_its_size_and_time(nobody, tmp_path):
    (tmp_path / "file").write_text("seven b")
    os.utime(tmp_path / "file", (1e9, 1e9))
    found = epath.Path(tmp_path / "file").stat()
    assert (found.length, found.mtime, found.is_directory) == (7, 10**9, False)
    assert epath.Path(tmp_path).stat().is_directory
    with pytest.raises(FileNotFoundError):
        epath.Path(tmp_path / "missing").stat()


def test_a_folder_is_searched_by_its_own_name(tmp_path):
    for name in ("a*", "ab", "a[b]", "a?"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text("")
    for name in ("a*", "a[b]", "a?"):
        assert list(epath.Path(tmp_path / name).glob("*.txt")) == [epath.Path(tmp_path / name / "x.txt")]


def test_it_is_mended_once():
    program = """
import phijax
from etils import epath
from phijax.storage import local_paths
before = type(epath.Path("/")).glob
local_paths.mend()
assert type(epath.Path("/")).glob is before and hasattr(before, "__wrapped__")
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_text_is_utf_8_in_every_locale(tmp_path):
    program = f"""
import phijax
from etils import epath
file = epath.Path({str(tmp_path / "text")!r})
file.write_text("na\\u00efve \\u4e2d")
assert file.read_bytes() == "na\\u00efve \\u4e2d".encode() and file.read_text() == "na\\u00efve \\u4e2d"
"""
    environment = os.environ | {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
