"""Building the CPU kernel: without a compiler, with one that fails, and what lies in the cache.

A script stands for the compiler where only its coming and going matters; the true one built what it copies.
"""

import concurrent.futures
import os
import pathlib
import stat
import tempfile

import pytest

from phijax.errors import UserError
from phijax.model.kernels import cpu_int4_library as library

BUILT = library.loaded()  # before any test takes the compiler away
KEPT = pathlib.Path(library._open(library._cache())._name) if BUILT else None  # found, not built again


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A PATH with nothing but what tests put there, and an empty cache."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(library.VARIABLE, raising=False)
    return tmp_path


def compiler(folder: pathlib.Path, body: str) -> None:
    """A compiler that tells its version, counts its calls in `calls`, and does `body` with $out as the file wanted."""
    file = folder / "bin" / "c++"
    file.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo test 1.0 && exit 0\n'
        f"echo call >> {folder}/calls\nfor out; do :; done\nPATH=/bin:/usr/bin\n{body}\n"
    )
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def built(bare):
    """A compiler that works: it copies the library which the machine's own compiler has built."""
    if BUILT is None:
        pytest.skip("no C++ compiler here: there is nothing to copy")
    compiler(bare, f'cp {KEPT} "$out"')
    return bare


def calls(folder: pathlib.Path) -> int:
    file = folder / "calls"
    return len(file.read_text().splitlines()) if file.exists() else 0


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(p.relative_to(folder / "cache" / "phijax") for p in (folder / "cache" / "phijax").rglob("*"))


def test_without_a_compiler_it_says_so_and_there_is_no_path(bare, monkeypatch):
    monkeypatch.setattr(library, "loaded", library.loaded.__wrapped__)
    said = r"(?s)no compiler among c\+\+, g\+\+, clang\+\+ in PATH.*several times slower"
    with pytest.warns(UserWarning, match=said):
        assert library.path() is None


def test_a_compiler_that_fails_is_quoted(bare):
    compiler(bare, "echo 'cpu_int4.cc:7: no such thing' >&2; exit 1")
    with pytest.warns(UserWarning, match=r"(?s)c\+\+ failed:\ncpu_int4.cc:7: no such thing"):
        assert library.loaded.__wrapped__() is None
    assert files(bare) == []


def test_it_is_built_once(built):
    first = library._open(library._cache())
    assert first.phijax_cpu_int4_has(0) == 1 and calls(built) == 1
    (folder,) = {path.parts[0] for path in files(built)}
    assert files(built) == [pathlib.Path(folder), *(pathlib.Path(folder, n) for n in sorted(("cpu_int4.so", "sha256")))]
    library._open(library._cache())
    assert calls(built) == 1


@pytest.mark.parametrize("damage", ["cut short", "empty", "other bytes", "no digest", "a digest that is no text"])
def test_a_damaged_library_is_built_anew(built, damage):
    """Never loaded: one that is cut short can load and crash the process at a later page."""
    library._open(library._cache())
    (file,) = (built / "cache").rglob("cpu_int4.so")
    content = file.read_bytes()
    if damage == "no digest":
        (file.parent / "sha256").unlink()
    elif damage == "a digest that is no text":
        (file.parent / "sha256").write_bytes(b"\xff" * 64)
    else:
        file.unlink()  # the loaded one stays as it is in memory
        other = {"cut short": content[:-1000], "empty": b"", "other bytes": content[:-8] + b"damaged!"}
        file.write_bytes(other[damage])
    with pytest.warns(UserWarning, match=f"{file.parent} is not loaded: .*built anew"):
        library._open(library._cache())
    assert calls(built) == 2 and file.read_bytes() == content
    assert library._open(library._cache()) and calls(built) == 2


@pytest.mark.parametrize(
    "what", ["a library for all", "a folder for the group", "a linked library", "a linked folder", "a file as folder"]
)
def test_what_others_could_have_written_is_built_anew(built, what):
    """The digest lies beside the library: who can write one can write both."""
    library._open(library._cache())
    (file,) = (built / "cache").rglob("cpu_int4.so")
    elsewhere = built / "elsewhere"
    if what == "a library for all":
        file.chmod(0o666)
    elif what == "a folder for the group":
        file.parent.chmod(0o770)
    elif what == "a linked library":
        file.rename(elsewhere)
        file.symlink_to(elsewhere)
    else:
        file.parent.rename(elsewhere)
        file.parent.symlink_to(elsewhere) if "linked" in what else file.parent.touch()
    kept = elsewhere.exists() and sorted(elsewhere.rglob("*"))
    with pytest.warns(UserWarning, match=f"{file.parent} is not loaded: "):
        library._open(library._cache())
    assert calls(built) == 2 and not file.is_symlink() and not file.parent.is_symlink()
    assert kept == (elsewhere.exists() and sorted(elsewhere.rglob("*")))  # a link's target is not ours to remove
    assert library._open(library._cache()) and calls(built) == 2 and len(files(built)) == 3


@pytest.mark.parametrize("what", ["the group's", "another user's"])
def test_a_cache_that_others_own_or_write_is_not_used(built, monkeypatch, what):
    library._open(library._cache())
    before = files(built)
    if what == "the group's":
        (built / "cache" / "phijax").chmod(0o775)
    else:
        monkeypatch.setattr(library.os, "geteuid", lambda user=library.os.geteuid(): user + 1)
    said = "phijax (may be written by others .mode 775.|belongs to user ).*for this process alone"
    for calls_then in (2, 3):
        with pytest.warns(UserWarning, match=said):
            assert library._open(library._cache()).phijax_cpu_int4_has(0) == 1
        assert calls(built) == calls_then and files(built) == before


def test_a_generous_umask_leaves_no_file_to_others(built):
    before = os.umask(0)
    try:
        library._open(library._cache())
    finally:
        os.umask(before)
    assert library._open(library._cache()) and calls(built) == 1


def test_another_compiler_or_source_is_another_library(built, monkeypatch):
    keys = {library._key("c++")}
    monkeypatch.setattr(library, "FLAGS", (*library.FLAGS, "-g"))
    keys.add(library._key("c++"))
    monkeypatch.setattr(library, "SOURCES", library.SOURCES[:1])
    keys.add(library._key("c++"))
    compiler(built, "exit 0")
    assert len(keys | {library._key(str(built / "bin" / "c++"))}) == 4


def test_several_may_build_at_once(built):
    """One becomes the library, the others take it, and nothing is left over."""
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        assert all(lib.phijax_cpu_int4_has(0) for lib in pool.map(lambda _: library._open(library._cache()), range(6)))
    assert len(files(built)) == 3


def test_a_cache_that_cannot_be_written(built, monkeypatch):
    (built / "cache").write_text("a file, where root cannot write either")
    temporary = built / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    assert library._open(library._cache()).phijax_cpu_int4_has(0) == 1
    assert list(temporary.iterdir()) == []  # what is loaded needs no file


def test_nothing_can_be_written_at_all(built, monkeypatch):
    (built / "cache").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(built / "cache"))
    with pytest.warns(UserWarning, match=r"(?s)no folder to build it in.*several times slower"):
        assert library.loaded.__wrapped__() is None


def test_nobody_has_a_home(built, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(pathlib.Path, "home", lambda: pathlib.Path("~someone").expanduser())  # RuntimeError
    assert library._open(library._cache()).phijax_cpu_int4_has(0) == 1


def test_choices(monkeypatch):
    monkeypatch.setenv(library.VARIABLE, "off")
    assert library.path() is None
    monkeypatch.setenv(library.VARIABLE, "avx512vni")
    with pytest.raises(UserError, match="Nearest: avx512vnni"):
        library.path()
    if BUILT is None:
        pytest.skip("no C++ compiler here")
    monkeypatch.setenv(library.VARIABLE, "generic")
    assert library.path() == "generic"
    monkeypatch.setenv(library.VARIABLE, "auto")
    assert library.path() in library.PATHS
    monkeypatch.setattr(library, "loaded", lambda: type("Old", (), {"phijax_cpu_int4_has": lambda self, n: n == 0})())
    assert library.path() == "generic"
    monkeypatch.setenv(library.VARIABLE, "avx2")
    with pytest.raises(UserError, match="this CPU has generic"):
        library.path()
