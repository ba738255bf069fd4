"""MLX folders of ours, byte for byte by the format. What mlx-lm makes of them: tests/mlx_reader, `make test-mlx`."""

import dataclasses
import json

import numpy as np
import pytest
from etils import epath
from gguf_case import tokenizer
from small_weights_case import CASES, LEARNED_CASES, STOPS, Small, expected, family_of, source, unpacked

from phijax.errors import UserError
from phijax.interchange import small_matrices
from phijax.interchange.huggingface import folder as huggingface_folder
from phijax.interchange.huggingface import mlx as mlx_export
from phijax.interchange.huggingface.export import DTYPES
from phijax.interchange.huggingface.families import FAMILIES
from phijax.model.config import LongRope
from phijax.quantization.policy import Scheme

safetensors_numpy = pytest.importorskip("safetensors.numpy")
safetensors = pytest.importorskip("safetensors")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return Small(tmp_path_factory.mktemp("small"))


def write(opened, output, dtype=None, shard=1 << 30):
    folder = mlx_export.folder(opened, family_of(opened), dtype and DTYPES[dtype])
    huggingface_folder.write(opened, epath.Path(output), folder, max_shard_bytes=shard)
    return output


def stored(folder):
    found = {}
    for file in sorted(folder.glob("model*.safetensors")):
        found |= safetensors_numpy.load_file(file)
        with safetensors.safe_open(file, "np") as opened:
            assert opened.metadata() == {"format": "mlx"}
    return found


def dequantized(tensors, module, bits):
    """(out, in) in float64, by the rule of the format."""
    values = unpacked(tensors[f"{module}.weight"], bits).astype(np.float64)
    scales, biases = (tensors[f"{module}.{name}"].astype(np.float64) for name in ("scales", "biases"))
    group = values.shape[1] // scales.shape[1]
    assert group in (32, 64, 128)
    return values * np.repeat(scales, group, 1) + np.repeat(biases, group, 1)


def test_bits_and_groups_are_in_the_config(small, tmp_path):
    config = json.loads((write(small("mixed"), tmp_path / "out") / "config.json").read_text())
    assert config["torch_dtype"] == "float16" and config["quantization"] == config["quantization_config"]
    layers = [f"model.layers.{layer}" for layer in range(2)]
    channel, down = {"group_size": 128, "bits": 4}, {"group_size": 128, "bits": 8}
    assert config["quantization"] == {
        "group_size": 64,
        "bits": 4,
        **{f"{layer}.self_attn.qkv_proj": channel for layer in layers},
        **{f"{layer}.mlp.down_proj": down for layer in layers},
        "lm_head": False,
    }


@pytest.mark.parametrize("case", [*CASES, *LEARNED_CASES])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_integers_and_scales_are_ours(case, dtype, small, tmp_path):
    opened = small(case)
    folder = write(opened, tmp_path / "out", dtype=dtype, shard=100_000)
    tensors, seen = stored(folder), set()
    settings = json.loads((folder / "config.json").read_text())["quantization"]
    family = family_of(opened)
    for name, wide in expected(opened, family.mlx_rows or family.rows).items():
        module = name.removesuffix(".weight")
        if f"{module}.scales" in tensors:
            entry = settings.get(module, settings)
            np.testing.assert_array_equal(dequantized(tensors, module, entry["bits"]), wide.astype(np.float64))
            assert tensors[f"{module}.scales"].shape[1] == wide.shape[1] // entry["group_size"]
            assert tensors[f"{module}.weight"].dtype == np.uint32
            seen |= {name, f"{module}.scales", f"{module}.biases"}
        else:
            seen.add(name)
            assert wide.ndim == 1 or settings[module] is False
            np.testing.assert_array_equal(tensors[name], wide.astype(dtype))
    assert seen == set(tensors)
    assert {tensors[name].dtype for name in tensors if not name.endswith("weight")} == {np.dtype(dtype)}


def test_stops_and_card_come_along(small, tmp_path):
    opened = small("split and tied")
    quality = {"method": "rtn", "quality": {"held_out": "/home/me/prose.txt", "tokens": 1234, "kl_mean": 0.0123}}
    (opened.path / "quality.json").write_text(json.dumps(quality))
    folder = write(opened, tmp_path / "out")
    (opened.path / "quality.json").unlink()
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [tokenizer().added_tokens[name] for name in STOPS]
    card = (folder / "README.md").read_text()
    assert "library_name: mlx" in card and "mlx_lm.generate" in card and "embedding int8" in card
    assert "| measured on | prose.txt |" in card and "| held-out tokens | 1,234 |" in card
    assert "| KL from the float model, mean, nats | 0.01230 |" in card


def test_what_mlx_computes_otherwise_is_said(small):
    opened, family = small("groups of 32"), FAMILIES["phi3"]
    assert mlx_export.folder(opened, family, None).notes == ["scales and what is dense: float16, in which MLX computes"]
    rope = LongRope((1.0,) * 32, (2.0,) * 32, original_max_position=16)
    model = dataclasses.replace(opened.model, long_rope=rope, sliding_window=7)
    other = mlx_export.folder(dataclasses.replace(opened, model=model), family, DTYPES["bfloat16"])
    said = "\n".join(other.notes)
    assert "bfloat16 rounds the scales" in said and "long list always" in said and "longer than 7 tokens" in said


def test_what_cannot_be_is_refused(small, tmp_path):
    with pytest.raises(UserError, match=r"--format=mlx is for small weights; .*is not quantised. First:\n  phijax"):
        write(source(CASES["groups of 32"][0]), tmp_path / "out")
    opened = small("channels")
    narrow = dataclasses.replace(opened, model=dataclasses.replace(opened.model, ffn_dim=240))
    with pytest.raises(UserError, match=r"down_proj.weight has 240 inputs: MLX has groups of 32, 64 and 128"):
        write(narrow, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_mlx_lms_gpt2_has_not_is_refused(small):
    opened = small("learned")
    for change, message in (
        ({"ffn_dim": 224}, r"feed-forward width of 4 n_embd = 256, this model of 224. Take --format=gguf, or hf"),
        ({"tied_head": False}, "always ties the head"),
    ):
        other = dataclasses.replace(opened, model=dataclasses.replace(opened.model, **change))
        with pytest.raises(UserError, match=message):
            mlx_export.folder(other, FAMILIES["gpt2"], None)


def test_scales_beyond_float16_are_refused(small, tmp_path, monkeypatch):
    """-8 times the largest float16 is none."""
    opened = small("groups of 32")
    assert opened.weights.schemes["embedding"] == Scheme(4, 32)
    monkeypatch.setattr(small_matrices, "scales", lambda source, part: np.full((part.rows, 4), 60000, np.float16))
    with pytest.raises(UserError, match=r"embed_tokens.biases, as float16, holds values that are NaN or infinite"):
        write(opened, tmp_path / "out")
    assert not list(tmp_path.iterdir())
