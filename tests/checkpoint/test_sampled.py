"""Two folders with one checkpoint, and with others of equal size."""

import json
import shutil

import numpy as np
import pytest
from etils import epath

from phijax.checkpoint.sampled import BLOCK_BYTES, BLOCKS, sampled_digest
from phijax.errors import UserError
from phijax.interchange.native import source as native_source

SIZE = 4 * BLOCKS * BLOCK_BYTES


@pytest.fixture
def folder(tmp_path):
    """In the manner of a Hugging Face folder: what decides the weights, and what does not."""
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"hidden_size": 8}))
    (folder / "model.safetensors").write_bytes(np.random.default_rng(0).bytes(SIZE))
    (folder / "README.md").write_text("about it")
    return folder


def changed(folder, tmp_path, name, data):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / name).write_bytes(data)
    return sampled_digest(copy)


def test_the_name_of_a_folder_or_file_and_what_is_about_it_do_not_count(folder, tmp_path):
    assert changed(folder, tmp_path, "README.md", b"other words") == sampled_digest(folder)
    file = shutil.copy(folder / "model.safetensors", tmp_path / "other.gguf")
    assert sampled_digest(file) == sampled_digest(folder / "model.safetensors")


def test_other_weights_of_equal_size_are_told_apart(folder, tmp_path):
    assert changed(folder, tmp_path, "model.safetensors", np.random.default_rng(1).bytes(SIZE)) != sampled_digest(
        folder
    )


@pytest.mark.parametrize("data", [b'{"hidden_size": 9}', b""])
def test_another_config_is_told_apart(folder, tmp_path, data):
    assert changed(folder, tmp_path, "config.json", data) != sampled_digest(folder)


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES, BLOCK_BYTES + 1])
def test_small_files_are_read_whole(tmp_path, size):
    (tmp_path / "a.gguf").write_bytes(b"x" * size)
    (tmp_path / "b.gguf").write_bytes(b"x" * (size - 1) + b"y" if size else b"y")
    assert sampled_digest(tmp_path / "a.gguf") != sampled_digest(tmp_path / "b.gguf")


def test_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"No checkpoint at .*nowhere: it does not exist"):
        sampled_digest(tmp_path / "nowhere")


def test_every_process_opens_the_step_below_its_own_path(monkeypatch, tmp_path):
    """Process 0 says which step; where it has it may be somewhere else."""
    monkeypatch.setattr(native_source, "from_process_zero", lambda act: "checkpoints/7")
    with pytest.raises(UserError, match=rf"{tmp_path}/mine/checkpoints/7"):
        native_source.open_native(epath.Path(tmp_path / "mine"))
    monkeypatch.setattr(native_source, "from_process_zero", lambda act: ".")
    with pytest.raises(UserError, match=rf"{tmp_path}/mine\b(?!/checkpoints)"):
        native_source.open_native(epath.Path(tmp_path / "mine"))
