"""Compiled programs in a run's folder: what is loaded, what is dropped, what is set aside after a crash.

JAX itself writes and reads here, through its persistent cache.
"""

import contextlib
import os
import random
import warnings

import jax
import numpy as np
import pytest
from etils import epath

from phijax.errors import UserError
from phijax.training import compile_cache

NUMBERS = np.arange(4, dtype=np.int32)


@pytest.fixture(autouse=True)
def every_program_is_kept(monkeypatch):
    monkeypatch.setattr(compile_cache, "LEAST_SECONDS", 0.0)


def add(number: int):
    """A program whose file says nothing about `number` but by its key."""

    def program(x):
        return x + number

    jax.clear_caches()
    return jax.jit(program).lower(NUMBERS).compile()


def opened(workdir, said=None):
    return compile_cache.opened(epath.Path(workdir), log=(said if said is not None else []).append)


@pytest.fixture
def two(tmp_path):
    """A workdir with the programs of add(1) and add(2), and their files in this order."""
    folder, files = tmp_path / "compile_cache", []
    with opened(tmp_path):
        for number in (1, 2):
            before = set(folder.glob("*")) if folder.exists() else set()
            add(number)
            files += [f for f in set(folder.glob("*")) - before]
    assert len(files) == 2
    return tmp_path, files


@contextlib.contextmanager
def hits():
    """Counts what JAX takes from the cache."""
    events = []

    def listen(event, **more):
        if event.endswith("/cache_hits"):
            events.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_listener(listen)


def test_what_was_written_is_loaded(two):
    workdir, _ = two
    with warnings.catch_warnings(), hits() as found, opened(workdir):
        warnings.simplefilter("error")
        assert add(1)(NUMBERS).tolist() == [1, 2, 3, 4]
    assert found


def damage(kind: str, mine, other) -> None:
    data = mine.read_bytes()
    mine.unlink()
    if kind == "another program's":
        mine.write_bytes(other.read_bytes())
    elif kind == "another program's, and no digest":  # as JAX would have written it
        mine.write_bytes(other.read_bytes().partition(b"\n")[2])
    elif kind == "a pipe":
        os.mkfifo(mine)
    elif kind == "a folder":
        mine.mkdir()
    elif kind == "a dead link":
        mine.symlink_to("nowhere")
    else:
        mine.write_bytes(
            {"empty": b"", "cut short": data[:-1], "cut in its head": data[:20], "longer": data + b"\0"}[kind]
        )


@pytest.mark.parametrize(
    "kind",
    ["another program's", "another program's, and no digest", "empty", "cut short", "cut in its head", "longer",
     "a pipe", "a folder", "a dead link"],
)  # fmt: skip
def test_what_was_not_written_so_is_compiled_anew(two, kind):
    workdir, (mine, other) = two
    damage(kind, mine, other)
    with pytest.warns(UserWarning, match=f"{mine.name}.*compiled anew"), hits() as found, opened(workdir):
        assert add(1)(NUMBERS).tolist() == [1, 2, 3, 4]
    assert not found
    if kind == "a folder":
        return  # nobody removes what a person has put there
    with warnings.catch_warnings(), hits() as found, opened(workdir):
        warnings.simplefilter("error")
        assert add(1)(NUMBERS).tolist() == [1, 2, 3, 4]
    assert found


def test_no_flipped_bit_is_believed(two):
    _, (mine, _) = two
    data, chance = mine.read_bytes(), random.Random(0)
    assert compile_cache.unpack(mine.name, data)
    for bit in [*range(8 * 100), *(chance.randrange(8 * len(data)) for _ in range(400))]:
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError):
            compile_cache.unpack(mine.name, bytes(flipped))


def markers(workdir) -> list[str]:
    return [path.name for path in workdir.iterdir() if path.name.startswith(compile_cache.MARKER)]


def test_the_marker_stands_from_a_load_until_it_has_run(two):
    workdir, _ = two
    with opened(workdir) as cache:
        program = cache.tried(add(1))
        assert markers(workdir) == ["compile_cache.unproven.0"]
        assert program(NUMBERS).tolist() == [1, 2, 3, 4] and markers(workdir) == []
        late = cache.tried(lambda: markers(workdir))  # an evaluator's, loaded before and run long after
        assert late() == ["compile_cache.unproven.0"] and markers(workdir) == [] and late() == []


def test_what_was_compiled_here_needs_no_marker(tmp_path):
    with opened(tmp_path) as cache:
        program = cache.tried(add(3))
        assert markers(tmp_path) == []
        assert cache.tried(lambda: markers(tmp_path))() == [] and program(NUMBERS).tolist() == [3, 4, 5, 6]


@pytest.mark.parametrize("error", [UserError("a"), KeyboardInterrupt(), SystemExit(75), OSError("full")])
def test_an_end_that_no_program_made_leaves_no_marker(two, error):
    workdir, _ = two
    with pytest.raises(type(error)), opened(workdir):
        add(1)
        assert markers(workdir)
        raise error
    assert markers(workdir) == []


def crash(workdir) -> None:
    """As if the process had died between a load and the first step; any other exception leaves the marker too."""
    with pytest.raises(RuntimeError), opened(workdir):
        add(1)
        raise RuntimeError


def test_after_a_crash_the_folder_is_set_aside_once(two):
    workdir, files = two
    names, said = {file.name for file in files}, []
    aside = workdir / "compile_cache.set_aside"
    for _ in range(2):
        crash(workdir)
        with hits() as found, opened(workdir, said):
            assert add(1)(NUMBERS).tolist() == [1, 2, 3, 4]
        assert not found and markers(workdir) == []
        assert f"{workdir / 'compile_cache'} is set aside as {aside}" in said.pop() and not said
    assert not names <= {file.name for file in aside.iterdir()}  # the newest alone is kept
    with hits() as found, opened(workdir, said):
        add(1)
    assert found and not said


def test_of_a_link_the_link_is_set_aside(two):
    workdir, files = two
    (workdir / "compile_cache").rename(workdir / "shared")
    (workdir / "compile_cache").symlink_to(workdir / "shared")
    for _ in range(2):
        crash(workdir)
        with opened(workdir):
            pass
        assert {file.name for file in files} <= {file.name for file in (workdir / "shared").iterdir()}
        (workdir / "compile_cache").rmdir()
        (workdir / "compile_cache").symlink_to(workdir / "shared")


def test_who_leaves_at_once_takes_its_own_marker_only(two):
    workdir, _ = two
    with opened(workdir):
        add(1)
        compile_cache.abandon(workdir)
        assert markers(workdir) == []
    (workdir / "compile_cache.unproven.0").write_text("process 1 on host elsewhere, has loaded x")
    compile_cache.abandon(workdir)
    assert markers(workdir)


@pytest.mark.parametrize("kind", ["a file", "a dead link"])
def test_a_folder_that_cannot_be_used_is_said_and_nothing_is_kept(tmp_path, kind):
    folder, said = tmp_path / "compile_cache", []
    folder.symlink_to("nowhere/at/all") if "link" in kind else folder.touch()
    with warnings.catch_warnings(), opened(tmp_path, said):
        warnings.simplefilter("error")
        assert add(1)(NUMBERS).tolist() == [1, 2, 3, 4]
    assert len(said) == 1 and f"{folder} cannot be used" in said[0]


def test_what_cannot_be_written_is_said_and_nothing_torn_is_left(two, monkeypatch):
    workdir, files = two

    def full(name, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compile_cache, "pack", full)
    with pytest.warns(UserWarning, match="cannot be written: .*No space left"), opened(workdir):
        assert add(5)(NUMBERS).tolist() == [5, 6, 7, 8]
    kept = list((workdir / "compile_cache").iterdir())
    assert sorted(kept) == sorted(files)


def test_without_a_marker_nothing_is_loaded(two):
    workdir, _ = two
    with opened(workdir):
        (workdir / "compile_cache.unproven.0").mkdir()
        with pytest.warns(UserWarning, match="unproven.0 cannot be written"), hits() as found:
            assert add(1)(NUMBERS).tolist() == [1, 2, 3, 4]
    assert not found


def test_jax_is_left_as_it_was(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    with opened(tmp_path):
        assert jax.config.jax_compilation_cache_dir == f"phijax-digested://{tmp_path}/compile_cache"
    assert jax.config.jax_compilation_cache_dir == before
