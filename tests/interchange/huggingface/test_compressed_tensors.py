"""compressed-tensors folders of ours: byte for byte by the format's rule, then as transformers loads them."""

import dataclasses
import json

import numpy as np
import pytest
from etils import epath
from gguf_case import tokenizer
from small_weights_case import CASES, STOPS, Small, expected, family_of, source, unpacked

from phijax.errors import UserError
from phijax.interchange import small_matrices
from phijax.interchange.huggingface import compressed_tensors as compressed_tensors_export
from phijax.interchange.huggingface import export as huggingface_export
from phijax.interchange.huggingface import folder as huggingface_folder
from phijax.interchange.huggingface.export import DTYPES
from phijax.quantization.policy import Scheme

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return Small(tmp_path_factory.mktemp("small"))


def write(opened, output, dtype=None, shard=1 << 30):
    folder = compressed_tensors_export.folder(opened, family_of(opened), dtype and DTYPES[dtype])
    huggingface_folder.write(opened, epath.Path(output), folder, max_shard_bytes=shard)
    return output


def stored(folder):
    """Name -> tensor, of all files."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= safetensors_torch.load_file(file)
    return found


def dequantized(tensors, module, bits):
    """(out, in) in float64, by the rule of the format."""
    words, scale = (tensors[f"{module}.{name}"].numpy() for name in ("weight_packed", "weight_scale"))
    values = unpacked(words, bits).astype(np.float64) - (1 << (bits - 1))
    assert tuple(tensors[f"{module}.weight_shape"].tolist()) == values.shape
    assert scale.dtype == np.float16
    return values * np.repeat(scale.astype(np.float64), values.shape[1] // scale.shape[1], 1)


@pytest.mark.parametrize("case", CASES)
def test_integers_and_scales_are_ours(case, small, tmp_path):
    opened = small(case)
    tensors = stored(write(opened, tmp_path / "out", shard=100_000))
    seen = set()
    for name, wide in expected(opened, family_of(opened).rows).items():
        module = name.removesuffix(".weight")
        if name in tensors:
            seen.add(name)
            dense = tensors[name].float().numpy()
            linear = len(wide.shape) == 2 and "embed_tokens" not in name and "lm_head" not in name
            assert not linear or (case == "split, o dense" and "o_proj" in name), name
            # In 16 bits what was not: embedding and head, if they were quantised.
            np.testing.assert_array_equal(dense, torch.tensor(wide).to(tensors[name].dtype).float().numpy())
            continue
        assert tensors[f"{module}.weight_packed"].dtype == torch.int32 and ".layers." in name
        bits = 32 * tensors[f"{module}.weight_packed"].shape[1] // wide.shape[1]
        np.testing.assert_array_equal(dequantized(tensors, module, bits), wide.astype(np.float64), err_msg=name)
        seen |= {f"{module}.{part}" for part in ("weight_packed", "weight_scale", "weight_shape")}
    assert seen == set(tensors)


def test_the_config_names_each_scheme(small, tmp_path):
    config = json.loads((write(small("mixed"), tmp_path / "out") / "config.json").read_text())
    found = config["quantization_config"]
    assert config["torch_dtype"] == "bfloat16" and found["format"] == "pack-quantized"
    groups = {tuple(group["targets"]): group["weights"] for group in found["config_groups"].values()}
    shared = {"type": "int", "symmetric": True, "dynamic": False}
    assert groups == {
        (r"re:.*\.qkv_proj$",): {"num_bits": 4, "strategy": "channel", **shared},
        (r"re:.*\.o_proj$", r"re:.*\.gate_up_proj$"): {"num_bits": 4, "strategy": "group", "group_size": 64, **shared},
        (r"re:.*\.down_proj$",): {"num_bits": 8, "strategy": "channel", **shared},
    }
    assert found["ignore"] == ["lm_head"]
    config = json.loads((write(small("split, o dense"), tmp_path / "other") / "config.json").read_text())
    found = config["quantization_config"]
    assert [group["targets"] for group in found["config_groups"].values()] == [["Linear"]]
    assert found["ignore"] == [r"re:.*\.o_proj$", "lm_head"]


@pytest.mark.parametrize("case", CASES)
def test_transformers_gives_the_logits_of_the_dense_folder(case, small, tmp_path):
    """In float32 nothing is rounded on either side: bit for bit."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed: make test brings it")
    transformers = pytest.importorskip("transformers")
    opened = small(case)
    folder = write(opened, tmp_path / "small", dtype="float32")
    plain = tmp_path / "dense"
    dense = huggingface_export.folder(opened, family_of(opened), DTYPES["float32"])
    huggingface_folder.write(opened, epath.Path(plain), dense)
    tokens, logits = torch.tensor(np.random.default_rng(0).integers(0, 380, (2, 24))), []
    for path in (folder, plain):
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        with torch.no_grad():
            logits.append(model(tokens, use_cache=False).logits.numpy())
    # After its first forward pass the model holds dense weights.
    weights = model.state_dict()
    for name, wide in expected(opened, family_of(opened).rows).items():
        np.testing.assert_array_equal(weights[name].numpy(), wide, err_msg=name)
    np.testing.assert_array_equal(*logits)
    assert np.abs(logits[0]).max() > 1


def test_tokenizer_stops_and_card_come_along(small, tmp_path):
    folder = write(small("groups of 32"), tmp_path / "out")
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [tokenizer().added_tokens[name] for name in STOPS]
    assert (folder / "tokenizer.json").exists() and "<|assistant|>" in (folder / "tokenizer_config.json").read_text()
    card = (folder / "README.md").read_text()
    assert "pip install compressed-tensors" in card and "qkv int4_g32" in card and "| quality | not measured |" in card


def test_matrices_that_are_no_linear_layers_are_refused(small, tmp_path):
    """Conv1D's, which no reader of the format quantises."""
    with pytest.raises(UserError, match=r"GPT2LMHeadModel has no linear layer for transformer.h.0.attn.c_attn.weight"):
        write(small("learned"), tmp_path / "out")


def test_a_checkpoint_that_is_not_quantised_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"is not quantised. First:\n  phijax quantize --checkpoint=\S+_case"):
        write(source(CASES["groups of 32"][0]), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def with_schemes(opened, **changed):
    """The checkpoint, said to be quantised otherwise."""
    weights = type(opened.weights).__new__(type(opened.weights))
    weights.__dict__ = opened.weights.__dict__ | {"schemes": {**opened.weights.schemes, **changed}}
    return dataclasses.replace(opened, weights=weights)


def test_fused_parts_of_different_schemes_are_refused(small, tmp_path):
    opened = with_schemes(small("groups of 32"), **{"blocks/attention/k": Scheme(8)})
    with pytest.raises(UserError, match=r"qkv_proj.weight is one matrix .*attention/q: int4_g32, .*attention/k: int8"):
        write(opened, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_inputs_that_fill_no_words_are_refused(small, tmp_path):
    opened = small("channels")
    narrow = dataclasses.replace(opened, model=dataclasses.replace(opened.model, ffn_dim=252))
    with pytest.raises(UserError, match=r"down_proj.weight has 252 inputs of 4 bits, which do not fill words"):
        write(narrow, tmp_path / "out")


def test_a_full_disk_is_one_message_and_leaves_nothing(small, tmp_path, monkeypatch):
    original, calls = small_matrices.scales, []

    def full(*arguments):
        calls.append(1)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")
        return original(*arguments)

    monkeypatch.setattr(small_matrices, "scales", full)
    with pytest.raises(UserError, match=r"out could not be written: No space left on device\. Nothing is left"):
        write(small("groups of 32"), tmp_path / "out")
    assert len(calls) == 5 and not list(tmp_path.iterdir())
