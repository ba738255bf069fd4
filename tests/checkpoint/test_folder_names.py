"""Checkpoints in folders whose names are something else in a URL or a pattern: each by its own name, or refused."""

import os
import pwd

import numpy as np
import pytest
import tensorstore
from checkpoint_case import bits, like, mesh_of, save_steps, state, writer
from etils import epath

from phijax.checkpoint.array_spec import array_spec
from phijax.errors import UserError
from phijax.readiness import probes
from phijax.storage import durable

ODD = ["run%20b", "run#1", "run?", "100%", "a|zip:", "a b", "été 中", "a*[b]", "lö\nf", "a;b&c", "~x"]


def write(folder, value: float) -> None:
    spec = array_spec(epath.Path(folder), "params/w") | {"metadata": {"shape": [1], "dtype": "<f4", "chunks": [1]}}
    tensorstore.open(spec, create=True).result()[...] = value


def read(folder) -> float:
    return float(np.asarray(tensorstore.open(array_spec(epath.Path(folder), "params/w"), open=True).result())[0])


def test_a_name_with_percent_is_not_the_name_that_a_url_makes_of_it(tmp_path):
    for number, name in enumerate(["run b", "run%20b", "run%2520b"]):
        write(tmp_path / name, number)
    assert [read(tmp_path / name) for name in ("run b", "run%20b", "run%2520b")] == [0, 1, 2]


@pytest.mark.parametrize("name", ODD)
def test_arrays_lie_in_the_folder_that_was_named(name, tmp_path):
    write(tmp_path / name, 7)
    assert os.listdir(tmp_path) == [name] and read(tmp_path / name) == 7


def test_a_run_is_saved_and_goes_on_in_any_folder(tmp_path):
    mesh = mesh_of(1)
    for number, name in enumerate(ODD):
        save_steps(tmp_path / name, {3: number}, mesh)
        with writer(tmp_path / name) as (checkpoints, _):
            assert checkpoints.latest_verified() == 3
            wanted = state(number, mesh)
            assert bits(checkpoints.restore(3, like(wanted))) == bits(wanted), name
    assert sorted(os.listdir(tmp_path)) == sorted(ODD)


def test_a_run_goes_on_where_its_files_have_an_owner_without_a_name(tmp_path, monkeypatch):
    def unknown(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    save_steps(tmp_path, {1: 1}, mesh_of(1))
    with writer(tmp_path) as (checkpoints, _):
        assert checkpoints.latest_verified() == 1
        wanted = state(1, mesh_of(1))
        assert bits(checkpoints.restore(1, like(wanted))) == bits(wanted)


@pytest.mark.parametrize("name", ["a\\b", "x.__lock", "caf\udce9", "logs:"])
def test_what_the_libraries_take_for_another_folder_is_refused(name, tmp_path):
    with pytest.raises(UserError, match="Rename it"), writer(tmp_path / "lock" / ".." / name / "run"):
        pass
    if name != "logs:":
        with pytest.raises(UserError, match="Rename it"):
            array_spec(epath.Path(tmp_path / name), "params/w")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "path, wrong", [("gs://b/run#1", "'#'"), ("gs://b/run?x=1", "'\\?'"), ("gs://b/a\nb", r"\\n"), ("s3://b/run", "s3")]
)
def test_names_in_buckets_that_orbax_would_cut_are_refused(path, wrong):
    with pytest.raises(UserError, match=wrong):
        durable.check_name(epath.Path(path), orbax=True)


def test_a_bucket_is_named_by_its_parts():
    assert durable.kvstore(epath.Path("gs://b/run%20b/1")) == {"driver": "gcs", "bucket": "b", "path": "run%20b/1/"}
    assert durable.kvstore(epath.Path("//tmp//x")) == {"driver": "file", "path": "/tmp/x/"}


def test_preflight_asks_tensorstore_for_the_very_folder(tmp_path):
    """It reads back what it wrote in either case: what counts is where it wrote."""
    for name in ("run%20b", "run#1", "run?"):
        assert probes.storage(epath.Path(tmp_path / name), "token", 0, 1, 5).verdict == "ok", name
    assert sorted(os.listdir(tmp_path)) == ["run#1", "run%20b", "run?"]
    found = probes.storage(epath.Path(tmp_path / "a\\b"), "token", 0, 1, 5)
    assert found.verdict == "FAIL" and "a backslash" in found.text
