"""The sizes that docs/small_devices.md states are those of the writers' plans, and the plans those of the files."""

import dataclasses
import importlib.util
import pathlib
import sys

import pytest
from absl.testing import flagsaver
from references.quantized import MODEL, save_run
from references.weights import random_params

from phijax import export, quantize
from phijax.interchange.gguf.file import read_file
from phijax.interchange.huggingface.safetensors import SINGLE_FILE
from phijax.model.presets import PRESETS

REPOSITORY = pathlib.Path(__file__).parents[2]
SMALL = dataclasses.replace(MODEL, head_dim=16)  # every matrix has inputs that groups of 32 divide


@pytest.fixture(scope="module")
def benchmark():
    pytest.importorskip("gguf")
    spec = importlib.util.spec_from_file_location("model_sizes", REPOSITORY / "benchmarks" / "model_sizes.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_states_them(benchmark):
    page = (REPOSITORY / "docs" / "small_devices.md").read_text()
    for name in benchmark.MODELS:
        assert "\n".join(benchmark.table(PRESETS[name])) in page, f"{name}: python benchmarks/model_sizes.py"


def run(command, *arguments: str) -> None:
    saved = flagsaver.save_flag_values(command.FLAGS)
    try:
        assert command.main(command.FLAGS(["command", *arguments])[1:]) == 0
    finally:
        flagsaver.restore_flag_values(saved, command.FLAGS)


@pytest.mark.parametrize("scheme", [pytest.param("int4_g32_head8", marks=pytest.mark.slow), "int4"])
def test_files_have_the_planned_sizes(benchmark, tmp_path, scheme):
    workdir = save_run(tmp_path / "run", random_params(SMALL), SMALL)
    run(quantize, f"--checkpoint={workdir}", f"--scheme={scheme}", f"--output={tmp_path / 'small'}")
    planned = benchmark.sizes(SMALL, scheme)
    for format in ("gguf", "mlx", "compressed_tensors"):
        run(export, f"--checkpoint={tmp_path / 'small'}", f"--format={format}", f"--output={tmp_path / format}")
    (path,) = (tmp_path / "gguf").glob("*.gguf")
    assert sum(stored.size for stored in read_file(path).tensors.values()) == planned["GGUF"]
    for format in ("MLX", "compressed-tensors"):
        path = tmp_path / format.lower().replace("-", "_") / SINGLE_FILE
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        norms = 5 * 64 * 2 if format == "compressed-tensors" else 0  # here they are stored in float32
        assert path.stat().st_size - header == planned[format] + norms
