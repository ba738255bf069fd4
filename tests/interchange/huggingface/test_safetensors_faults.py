"""Damaged and hostile Hugging Face folders: one clear message, quickly, with little memory, nothing half-written."""

import json
import shutil
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from etils import epath
from huggingface_case import Saved, edit

from phijax.errors import UserError
from phijax.interchange.huggingface import export as huggingface_export
from phijax.interchange.huggingface import folder as huggingface_folder
from phijax.interchange.huggingface import safetensors as safetensors_files
from phijax.interchange.huggingface.families import FAMILIES
from phijax.interchange.native import write as native_write
from phijax.interchange.open import open_checkpoint
from phijax.interchange.weight_source import check_finite

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Saved:
    return Saved(tmp_path_factory.mktemp("huggingface"))


@pytest.fixture
def single(saved, tmp_path):
    return shutil.copytree(saved("phi3"), tmp_path / "single")


@pytest.fixture
def sharded(saved, tmp_path):
    return shutil.copytree(saved("phi3", "float32", "40KB"), tmp_path / "sharded")


def refused(folder, message: str) -> None:
    """Opening is refused with `message`, within 32 MB: nothing was read for it."""
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=message):
            open_checkpoint(folder)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


def rewrite_header(path, change, pad: bool = True) -> None:
    """Changes the header's JSON (a dict, or text) and keeps the data."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = change(json.loads(data[8 : 8 + length]))
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1, -1000])
def test_a_file_that_is_cut_off(single, keep):
    data = (single / WEIGHTS).read_bytes()
    (single / WEIGHTS).write_bytes(data[:keep])
    refused(single, "no whole safetensors file|the file is cut off")


def test_bytes_behind_the_end(single):
    with open(single / WEIGHTS, "ab") as file:
        file.write(b"x")
    refused(single, "its header describes")


@pytest.mark.parametrize("length", [0, 1, 1 << 40, (1 << 64) - 1, 20_000_000])
def test_a_header_of_absurd_length(single, length):
    """20 MB: a sparse file that really has them, which would be read whole."""
    with open(single / WEIGHTS, "r+b") as file:
        file.write(length.to_bytes(8, "little"))
        if length == 20_000_000:
            file.truncate(length + 100)
    refused(single, "no whole safetensors file")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda h: "[" * 100_000, "its header is not read: it has more than 32 objects"),
        (lambda h: '{"a": ', "header is not JSON"),
        (lambda h: "[1, 2]", "its header must hold one object"),
        (lambda h: json.dumps(h)[:-1] + ',"lm_head.weight":' + json.dumps(h["lm_head.weight"]) + "}", "stands twice"),
        (lambda h: h | {"lm_head.weight": 3}, "lm_head.weight=3 must be an object"),
        (lambda h: h | {"lm_head.weight": {**h["lm_head.weight"], "dtype": "I64"}}, "stored as 'I64'"),
        (lambda h: h | {"lm_head.weight": {**h["lm_head.weight"], "dtype": "F8_E4M3"}}, "dequantise first"),
        (lambda h: h | {"lm_head.weight": {**h["lm_head.weight"], "shape": [1 << 62, 1 << 62]}}, "do not hold it"),
        (lambda h: h | {"lm_head.weight": {**h["lm_head.weight"], "shape": [-300, -64]}}, r"shape\[0\]=-300 must be"),
        (lambda h: h | {"lm_head.weight": {**h["lm_head.weight"], "shape": [64, 300]}}, r"\(64, 300\).*asks for"),
        (
            lambda h: h | {"model.norm.weight": {**h["model.norm.weight"], "data_offsets": [0, 256]}},
            "overlap|leave a gap",
        ),
        (
            lambda h: h | {"lm_head.weight": {**h["lm_head.weight"], "data_offsets": [1 << 50, (1 << 50) + 76800]}},
            "cut off",
        ),
    ],
)
def test_headers_that_do_not_describe_the_file(single, change, message):
    rewrite_header(single / WEIGHTS, change)
    refused(single, message)


def test_a_missing_and_a_surplus_tensor(single):
    def rename(header):
        header["model.layers.0.self_attn.k_norm.weight"] = header.pop("model.norm.weight")
        return header

    rewrite_header(single / WEIGHTS, rename)
    refused(single, "(?s)2 differences.*model.norm.weight is missing.*k_norm.weight belongs to no weight")


def test_a_tensor_of_another_shape_by_the_config(single):
    edit(single / "config.json", lambda c: c.update(intermediate_size=40))
    refused(single, r"gate_up_proj.weight has shape \(96, 64\), config.json asks for \(80, 64\)")


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "x.bin", "x\\y.safetensors"]
)
def test_an_index_that_names_files_elsewhere(sharded, name):
    edit(sharded / INDEX, lambda index: index["weight_map"].update({"lm_head.weight": name}))
    refused(sharded, "no safetensors file of this folder")


def test_an_index_that_names_a_missing_file(sharded):
    next(sharded.glob("model-00002*")).unlink()
    refused(sharded, "names model-00002.*which is not there")


def test_an_index_that_puts_a_tensor_into_another_file(sharded):
    edit(sharded / INDEX, lambda i: i["weight_map"].update({"lm_head.weight": "model-00001-of-00006.safetensors"}))
    names = {file.name for file in sharded.glob("*.safetensors")}
    edit(sharded / INDEX, lambda i: i["weight_map"].update({"lm_head.weight": sorted(names)[0]}))
    refused(sharded, "says that 'lm_head.weight' is in")


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_an_index_that_is_none(sharded, text):
    (sharded / INDEX).write_text(text)
    refused(sharded, "index.json")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_a_pickle_is_never_loaded(single, name):
    (single / WEIGHTS).unlink()
    (single / name).write_bytes(b"\x80\x04cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    refused(single, f"(?s){name}, a pickle: .*save_pretrained")


def test_no_weights_at_all(single):
    (single / WEIGHTS).unlink()
    refused(single, "has config.json but no weights")


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000])
def test_a_config_that_is_no_json(single, text):
    (single / "config.json").write_text(text)
    refused(single, "config.json")


def test_what_is_no_checkpoint_says_what_was_looked_for(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    refused(tmp_path, r"(?s)it has notes.txt.*manifest.json.*config.json and .*GGUF")
    refused(tmp_path / "notes.txt", "no checkpoint")
    refused(tmp_path / "nowhere", r"does not exist\.$")
    refused("microsoft/Phi-3-mini-4k-instruct", "does not exist. phijax downloads nothing")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_that_are_not_finite_end_an_export_without_a_trace(saved, tmp_path, value, dtype):
    folder = shutil.copytree(saved("phi3", dtype), tmp_path / "poisoned")
    stored = safetensors_files.read_header(epath.Path(folder) / WEIGHTS)["model.layers.1.mlp.down_proj.weight"]
    data = bytearray((folder / WEIGHTS).read_bytes())
    at = stored.offset + 37 * stored.dtype.itemsize
    data[at : at + stored.dtype.itemsize] = np.array(value, stored.dtype).tobytes()
    (folder / WEIGHTS).write_bytes(data)
    opened = open_checkpoint(folder)
    with pytest.raises(UserError, match=r"down_proj.* NaN or infinite"):
        huggingface_folder.write(opened, tmp_path / "hf", huggingface_export.folder(opened, FAMILIES["phi3"], None))
    with pytest.raises(UserError, match=r"down_proj.* NaN or infinite"):
        native_write.write(opened, tmp_path / "ours", dtype=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["poisoned"]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_finite_means_every_value_but_nan_and_infinity(dtype):
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = bits.view(dtype) if np.dtype(dtype).itemsize == 2 else bits.astype(np.uint32) << 16
    values = values.view(dtype)
    for value in values[:: 7 if dtype is np.float32 else 1]:
        try:
            check_finite(np.array([value]), "x")
            finite = True
        except UserError:
            finite = False
        assert finite == np.isfinite(value.astype(np.float64)), value


def test_a_byte_order_mark_before_a_config(single):
    text = (single / "config.json").read_bytes()
    (single / "config.json").write_bytes(b"\xef\xbb\xbf" + text)
    assert open_checkpoint(single).kind == "huggingface"
    (single / "config.json").write_bytes(b"\xff\xfe" + text)
    refused(single, "is not JSON")


def test_values_too_large_for_half_precision_are_refused(saved, tmp_path):
    folder = shutil.copytree(saved("phi3"), tmp_path / "large")
    stored = safetensors_files.read_header(epath.Path(folder) / WEIGHTS)["model.norm.weight"]
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[stored.offset : stored.offset + 4] = np.float32(70000.0).tobytes()
    (folder / WEIGHTS).write_bytes(data)
    opened = open_checkpoint(folder)
    half = huggingface_export.folder(opened, FAMILIES["phi3"], huggingface_export.DTYPES["float16"])
    with pytest.raises(UserError, match=r"model.norm.weight, as float16, .*infinite.*beyond the 65,504"):
        huggingface_folder.write(opened, tmp_path / "o", half)
    assert not (tmp_path / "o").exists()


def test_an_output_that_is_there_is_never_touched(saved, tmp_path):
    opened = open_checkpoint(saved("phi3"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    folder = huggingface_export.folder(opened, FAMILIES["phi3"], None)
    for write in (
        lambda: huggingface_folder.write(opened, tmp_path / "out", folder),
        lambda: native_write.write(opened, tmp_path / "out", dtype=None),
    ):
        with pytest.raises(UserError, match="is there already"):
            write()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


def test_a_disk_without_room_is_noticed_before_anything_is_written(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(UserError, match=r"needs [1-9][\d.]* kB.*has 1 bytes free"):
        native_write.write(open_checkpoint(saved("phi3")), tmp_path / "out", dtype=None)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_export_left_is_replaced(saved, tmp_path):
    (tmp_path / "out.unfinished").mkdir()
    (tmp_path / "out.unfinished" / "model.safetensors").write_bytes(b"half")
    native_write.write(open_checkpoint(saved("phi3")), tmp_path / "out", dtype=None)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_old_index_beside_newer_weights(single, sharded):
    """transformers reads model.safetensors, other tools what the index names."""
    shutil.copy(single / WEIGHTS, sharded)
    refused(sharded, f"two sets of weights: {INDEX}, and {WEIGHTS}, which is no part of it")
    for shard in sharded.glob("model-*"):
        shard.unlink()
    refused(sharded, f"two sets of weights: {INDEX}, and {WEIGHTS}")
    (sharded / INDEX).unlink()
    assert open_checkpoint(sharded).kind == "huggingface"


def test_shards_of_another_download(single, sharded):
    others = sorted(path.name for path in sharded.glob("model-*"))
    shutil.copy(sharded / others[0], sharded / "model-00001-of-00077.safetensors")
    refused(sharded, f"two sets of weights: {INDEX}, and model-00001-of-00077.safetensors, which")
    (sharded / "model-00001-of-00077.safetensors").unlink()
    shutil.copy(sharded / others[0], single)
    refused(single, f"two sets of weights: {WEIGHTS}, and {others[0]}")
    (sharded / INDEX).unlink()
    refused(sharded, f"but no {INDEX}.*incomplete")


def test_an_index_of_one_file_and_weights_that_other_tools_read(single, sharded):
    """As people publish them: nothing is doubtful."""
    names = safetensors_files.read_header(epath.Path(single / WEIGHTS))
    (single / INDEX).write_text(json.dumps({"weight_map": {name: WEIGHTS for name in names}}))
    for folder in (single, sharded):
        for name in ("consolidated.safetensors", "pytorch_model.bin", "optimizer.safetensors"):
            (folder / name).write_bytes(b"of others")
        assert open_checkpoint(folder).kind == "huggingface"


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors"]
)
def test_an_adapter_beside_the_weights_or_alone(single, tmp_path, name):
    (single / name).write_text("{}")
    refused(single, f"has an adapter in it \\({name}\\)")
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / name).write_text("{}")
    refused(tmp_path / "alone", "is an adapter, not a model")


@pytest.mark.parametrize(
    "name, message",
    [
        ("pytorch_model.bin", "a pickle"),
        ("pytorch_model-00001-of-00002.bin", "a pickle"),
        ("consolidated.00.pth", "a pickle"),
        ("tf_model.h5", r"no weights: .*tf_model.h5 is of a kind"),
        ("model-q4.gguf", "its weights are GGUF: give the file"),
        ("weights.safetensors", f"called {WEIGHTS}"),
        ("notes.txt", f"no weights: neither {WEIGHTS} nor {INDEX} is there"),
    ],
)
def test_weights_of_another_kind_alone(single, name, message):
    (single / WEIGHTS).rename(single / name)
    refused(single, message)


@pytest.mark.parametrize("ours", ["checkpoints/1/state", "state"])
def test_a_run_and_a_hugging_face_model_in_one_folder(single, ours):
    (single / ours).mkdir(parents=True)
    (single / "manifest.json").write_text("{}")
    refused(single, f"two checkpoints: .*of a run, and {WEIGHTS}")
