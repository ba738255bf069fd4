"""What phijax quantize refuses, by every method: one message, and nothing half-written."""

import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from references.quantized import MODEL, SCHEME, run, save_run
from references.weights import random_params

from phijax import prepare, quantize
from phijax.checkpoint import manifest
from phijax.errors import UserError
from phijax.interchange import tokenizer_files
from phijax.interchange.native import quantize as native_quantize
from phijax.interchange.native.source import PLOT_FILE
from phijax.interchange.open import open_checkpoint
from phijax.model import params
from phijax.storage import atomic

METHODS = ("rtn", "awq", "gptq")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> pathlib.Path:
    return save_run(tmp_path_factory.mktemp("runs") / "run", random_params(MODEL))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((pathlib.Path(__file__).parents[2] / "README.md").read_text())
    return path


def flags(workdir, output, method: str, calibration, scheme: str = SCHEME) -> list[str]:
    found = [f"--checkpoint={workdir}", f"--scheme={scheme}", f"--output={output}", f"--method={method}"]
    calibrated = [f"--calibration={calibration}", "--calibration_rows=2", "--row_length=24"]
    return found + (calibrated if method != "rtn" else [])


@pytest.mark.parametrize("method", METHODS)
def test_a_scheme_that_does_not_divide(workdir, text, tmp_path, method):
    with pytest.raises(UserError, match="which groups of 128 do not divide"):
        run(quantize, *flags(workdir, tmp_path / "out", method, text, "int4_g128"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", METHODS)
def test_what_is_quantized_already(workdir, text, tmp_path, method):
    assert run(quantize, *flags(workdir, tmp_path / "small", "rtn", text)) == 0
    with pytest.raises(UserError, match="is quantised already"):
        run(quantize, *flags(tmp_path / "small", tmp_path / "out", method, text))
    assert [entry.name for entry in tmp_path.iterdir()] == ["small"]


@pytest.mark.parametrize("method", METHODS[1:])
def test_calibration_shards_of_another_tokenizer(workdir, text, tmp_path, method):
    raw = tmp_path / "raw"
    raw.mkdir()
    for number in range(4):
        (raw / f"{number}.txt").write_text(text.read_text())
    run(prepare, f"--input={raw}", f"--output={tmp_path / 'other'}", "--block=64", "--workers=1", "--vocab_size=500")
    with pytest.raises(UserError, match="is not that of"):
        run(quantize, *flags(workdir, tmp_path / "out", method, tmp_path / "other"))
    assert {entry.name for entry in tmp_path.iterdir()} == {"raw", "other"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("path", ["blocks/mlp/down", "embedding"])
def test_weights_that_are_nan(text, tmp_path, method, path):
    """By calibrated methods in the first pass, before any layer is rounded."""
    flat = params.flat(random_params(MODEL))
    flat[path] = jax.numpy.asarray(flat[path]).at[(0,) * flat[path].ndim].set(np.nan)
    spoiled = save_run(tmp_path / "spoiled", params.nested(flat))
    with pytest.raises(UserError, match=r"NaN or infinite"):
        run(quantize, *flags(spoiled, tmp_path / "out", method, text))
    assert [entry.name for entry in tmp_path.iterdir()] == ["spoiled"]


@pytest.mark.parametrize("method", METHODS[1:])
def test_weights_under_which_the_calibration_rows_overflow(text, tmp_path, method):
    flat = params.flat(random_params(MODEL))
    for name in ("up", "down"):
        flat[f"blocks/mlp/{name}"] = flat[f"blocks/mlp/{name}"].at[1].multiply(1e25)
    spoiled = save_run(tmp_path / "spoiled", params.nested(flat))
    with pytest.raises(UserError, match=r"Layer 1 gives values that are NaN or infinite for the calibration rows"):
        run(quantize, *flags(spoiled, tmp_path / "out", method, text))
    assert [entry.name for entry in tmp_path.iterdir()] == ["spoiled"]


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
from phijax import command, quantize
sys.argv = ["quantize", *sys.argv[1:]]
command.run(quantize.main, quantize.FLAGS)
"""


@pytest.mark.parametrize("method", [pytest.param(m, marks=[pytest.mark.slow] * (m == "gptq")) for m in METHODS])
def test_a_disk_that_takes_no_more(workdir, text, tmp_path, method):
    """For real: the kernel refuses what goes beyond 4,000 bytes of a file."""
    arguments = flags(workdir, tmp_path / "out", method, text)
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "0", "PYTHONDONTWRITEBYTECODE": "1"}
    ended = subprocess.run([sys.executable, "-c", LIMITED, *arguments], capture_output=True, text=True, env=environment)
    assert ended.returncode == 2, ended.stderr[-2000:]
    assert ended.stderr.startswith("error: ") and "could not be written" in ended.stderr, ended.stderr[-2000:]
    assert "Traceback" not in ended.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module, name", [(tokenizer_files, "write_native"), (manifest, "write")])
def test_a_disk_that_is_full_at_the_end(workdir, text, tmp_path, monkeypatch, module, name):
    def full(*arguments, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, name, full)
    with pytest.raises(UserError, match=r"could not be written: .*No space left"):
        run(quantize, *flags(workdir, tmp_path / "out", "rtn", text))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_when_the_checkpoint_is_whole(workdir, text, tmp_path, monkeypatch):
    def full(*arguments, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic, "write_json", full)
    with pytest.raises(UserError, match=r"quality.json could not be written .*No space left.*\n.*is whole"):
        run(quantize, *flags(workdir, tmp_path / "out", "rtn", text))
    assert not (tmp_path / "out" / PLOT_FILE).exists()
    assert open_checkpoint(tmp_path / "out").model == MODEL


def test_a_place_that_may_not_be_written(workdir, text, tmp_path, monkeypatch):
    def refused(self, *arguments, **more):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(native_quantize.epath.Path(tmp_path)), "mkdir", refused)
    with pytest.raises(UserError, match=r"could not be written: .*Permission denied"):
        run(quantize, *flags(workdir, tmp_path / "out", "rtn", text))


def test_a_disk_without_room_is_seen_before_calibration(workdir, text, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    monkeypatch.setattr(quantize, "_rows", lambda *arguments: pytest.fail("calibration was read"))
    with pytest.raises(UserError, match=r"needs \d+\.\d [kM]B; .* has 10\.0 kB free"):
        run(quantize, *flags(workdir, tmp_path / "out", "gptq", text))
