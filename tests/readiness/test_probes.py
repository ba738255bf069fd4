"""Checks that do something, on eight virtual devices and on folders that misbehave."""

import jax
import pytest
from etils import epath

from phijax.readiness import inspection, probes
from phijax.readiness.check import FAIL, OK


def test_all_devices_are_summed():
    found = probes.all_reduce(jax.devices())
    assert found.verdict == OK and "8 devices" in found.text
    assert probes.all_reduce(jax.devices()[:1]).verdict == OK


def test_a_device_that_gives_something_else_is_seen(monkeypatch):
    make = jax.make_array_from_callback

    def wrong(shape, sharding, values):
        return make(shape, sharding, lambda index: values(index) + (index[0].start == 3))

    monkeypatch.setattr(jax, "make_array_from_callback", wrong)
    found = probes.all_reduce(jax.devices())
    assert found.verdict == FAIL and "[37], not 36" in found.text


def test_an_exception_is_a_failed_check():
    def broken():
        raise RuntimeError("link down\nwith details")

    found = inspection.attempt("all-reduce", broken)
    assert found.verdict == FAIL and found.text == "RuntimeError: link down"


def test_storage_is_written_read_and_left_clean(tmp_path):
    found = probes.storage(epath.Path(tmp_path / "run"), "token", 0, 1, 5)
    assert found.verdict == OK and "MB/s" in found.text
    assert list((tmp_path / "run").iterdir()) == []


def test_a_workdir_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("in the way")
    found = probes.storage(epath.Path(tmp_path / "file" / "run"), "token", 0, 1, 5)
    assert found.verdict == FAIL and "NotADirectoryError" in found.text


def test_storage_that_loses_bytes_is_told(tmp_path, monkeypatch):
    path = type(epath.Path(tmp_path))
    honest = path.read_bytes
    monkeypatch.setattr(path, "read_bytes", lambda self: honest(self)[:-1])
    found = probes.storage(epath.Path(tmp_path), "token", 0, 1, 5)
    assert found.verdict == FAIL and "read otherwise than it was written" in found.text


@pytest.mark.parametrize("damage", ["missing", "other"])
def test_a_folder_that_is_not_shared_is_told(tmp_path, damage):
    """What process 1 should have written: not there, or of another start."""
    folder = tmp_path / "preflight-token"
    folder.mkdir()
    if damage == "other":
        (folder / "1.bin").write_bytes(b"of another start")
    found = probes.storage(epath.Path(tmp_path), "token", 0, 2, 5)
    assert found.verdict == FAIL
    assert ("is --workdir one folder for all hosts?" if damage == "missing" else "something else") in found.text
