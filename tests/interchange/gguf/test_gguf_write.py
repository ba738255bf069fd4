"""GGUF files of ours: read back bit for bit, by us; by gguf's reader; by transformers, with equal logits."""

import dataclasses
import os
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gguf_case import GPT2, LLAMA, LONG, PARTIAL, PHI3, Arrays, everything, logits, opened, random_arrays, tokenizer

from phijax.errors import UserError
from phijax.interchange.facts import Facts
from phijax.interchange.gguf import write as gguf_write
from phijax.interchange.gguf.open import open_gguf
from phijax.interchange.gguf.write import write_gguf
from phijax.interchange.load import load_params
from phijax.model import params as parameters
from phijax.model.presets import PRESETS
from phijax.parallel.mesh import MeshConfig, make_mesh
from phijax.storage import staging

gguf = pytest.importorskip("gguf")

MODELS = {"phi3": PHI3, "long": LONG, "partial": PARTIAL, "llama": LLAMA, "gpt2": GPT2}


def architecture(c):
    return "gpt2" if c.positions == "learned" else "llama" if c is LLAMA else "phi3"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_f32_is_read_back_bit_for_bit(name, dtype, tmp_path):
    c = MODELS[name]
    arrays = random_arrays(c, dtype)
    path = write_gguf(opened(c, arrays), tmp_path / "m.gguf", kind="F32", architecture=architecture(c))
    back = open_gguf(path)
    assert back.model == c
    for leaf, array in everything(back.weights).items():
        np.testing.assert_array_equal(array, arrays[leaf].astype(np.float32), err_msg=leaf)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("kind", "dtype"), [("BF16", ml_dtypes.bfloat16), ("F16", np.float16)])
def test_narrow_weights_stay_as_they_are(name, kind, dtype, tmp_path):
    c = MODELS[name]
    arrays = random_arrays(c, dtype)
    path = write_gguf(opened(c, arrays), tmp_path / "m.gguf", kind=kind, architecture=architecture(c))
    for leaf, array in everything(open_gguf(path).weights).items():
        # Norms, biases and a table of positions are float32 there.
        assert array.dtype == (dtype if parameters.leaves(c)[leaf].kind else np.float32)
        np.testing.assert_array_equal(array.astype(np.float32), arrays[leaf].astype(np.float32), err_msg=leaf)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("c", [PHI3, LLAMA, GPT2])
def test_bytes_are_those_of_gguf(kind, c, tmp_path, monkeypatch):
    """Made in pieces that do not divide anything, they are what gguf.quantize makes of the whole tensor."""
    monkeypatch.setattr(gguf_write, "_AT_ONCE", 96 * 7)
    path = write_gguf(opened(c), tmp_path / "m.gguf", kind=kind, architecture=architecture(c))
    plain = write_gguf(opened(c), tmp_path / "plain.gguf", kind="F32", architecture=architecture(c))
    wide = {tensor.name: tensor.data for tensor in gguf.GGUFReader(plain).tensors}
    for tensor in gguf.GGUFReader(path).tensors:
        exact = wide[tensor.name].ndim == 1 or tensor.name == "position_embd.weight"
        stored = "F32" if exact else kind
        assert tensor.tensor_type.name == stored, tensor.name
        expected = gguf.quantize(wide[tensor.name], tensor.tensor_type)
        np.testing.assert_array_equal(tensor.data.view(np.uint8), expected.view(np.uint8), err_msg=tensor.name)


def test_keys_are_those_of_llama_cpps_converter(tmp_path):
    fields = gguf.GGUFReader(write_gguf(opened(LONG), tmp_path / "m.gguf", kind="Q8_0")).fields
    read = {key: field.contents() for key, field in fields.items() if key.startswith(("general.", "phi3."))}
    # conversion/phi.py: attn_factor = sqrt(1 + ln(64 / 16) / ln(16)).
    assert read.pop("phi3.rope.scaling.attn_factor") == pytest.approx(1.5**0.5, rel=1e-7)
    assert read.pop("phi3.attention.layer_norm_rms_epsilon") == pytest.approx(1e-5, rel=1e-6)
    assert read == {
        "general.architecture": "phi3",
        "general.type": "model",
        "general.name": "model phi3",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "general.alignment": 32,
        "phi3.context_length": 64,
        "phi3.rope.scaling.original_context_length": 16,
        "phi3.embedding_length": 96,
        "phi3.feed_forward_length": 160,
        "phi3.block_count": 2,
        "phi3.vocab_size": 400,
        "phi3.attention.head_count": 2,
        "phi3.attention.head_count_kv": 1,
        "phi3.rope.dimension_count": 48,
        "phi3.rope.freq_base": 10000.0,
        "phi3.attention.sliding_window": 0,
    }
    window = gguf.GGUFReader(write_gguf(opened(PARTIAL), tmp_path / "p.gguf", kind="F32")).fields
    assert window["phi3.attention.sliding_window"].contents() == 7
    assert window["phi3.rope.dimension_count"].contents() == 36
    assert window["phi3.rope.scaling.original_context_length"].contents() == 256
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert [int(n) for n in tensors["blk.1.ffn_up.weight"].shape] == [96, 320]  # fastest dimension first; gate and up
    np.testing.assert_array_equal(
        tensors["rope_factors_long.weight"].data, np.asarray(LONG.long_rope.long_factor, np.float32)
    )
    assert tensors["rope_factors_short.weight"].tensor_type.name == "F32" and "blk.0.ffn_gate.weight" not in tensors


def test_keys_of_gpt2_are_those_of_llama_cpps_converter(tmp_path):
    """conversion/gpt2.py; 4 D is written as any other width."""
    reader = gguf.GGUFReader(write_gguf(opened(GPT2), tmp_path / "m.gguf", kind="BF16"))
    read = {key: field.contents() for key, field in reader.fields.items() if key.startswith("gpt2.")}
    assert read.pop("gpt2.attention.layer_norm_epsilon") == pytest.approx(2e-5, rel=1e-6)
    assert read == {
        "gpt2.context_length": 64,
        "gpt2.embedding_length": 96,
        "gpt2.block_count": 3,
        "gpt2.feed_forward_length": 224,
        "gpt2.attention.head_count": 6,
        "gpt2.vocab_size": 400,
    }
    tensors = {t.name: t for t in reader.tensors}
    assert [int(n) for n in tensors["blk.2.attn_qkv.weight"].shape] == [96, 288]
    assert [int(n) for n in tensors["blk.2.ffn_down.weight"].shape] == [224, 96]
    assert [int(n) for n in tensors["blk.2.attn_qkv.bias"].shape] == [288]
    assert tensors["position_embd.weight"].tensor_type.name == "F32" and "output.weight" not in tensors


def test_published_lists_come_back_digit_for_digit(tmp_path):
    """float32 holds neither 1.3000000000000003 nor the digits of the long list; keys of our own do."""
    published = PRESETS["phi3_mini_128k"]
    small = {"vocab_size": 400, "model_dim": 192, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "ffn_dim": 64}
    c = dataclasses.replace(published, **small)
    assert open_gguf(write_gguf(opened(c), tmp_path / "m.gguf", kind="F32")).model == c


torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def theirs(path, tokens):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


# transformers reads neither LongRoPE, nor windows, nor partial rotation, and of a GPT-2 published sizes alone.
READ_BY_THEM = {"phi3": PHI3, "llama": LLAMA, "gpt2": dataclasses.replace(GPT2, max_position=1024, ffn_dim=4 * 96)}


@pytest.mark.parametrize("name", READ_BY_THEM)
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_transformers_reads_it_with_equal_logits(name, kind, tmp_path):
    c = READ_BY_THEM[name]
    path = write_gguf(opened(c), tmp_path / "m.gguf", kind=kind, architecture=architecture(c))
    tokens = np.random.default_rng(0).integers(0, c.vocab_size, 40).tolist()
    back = open_gguf(path)
    expected = theirs(path, tokens)
    # 1e-4 is the promise; measured 2e-6: another order of sums.
    np.testing.assert_allclose(logits(c, everything(back.weights), tokens), expected, atol=1e-4, rtol=0)
    assert np.abs(expected).max() > 1
    if kind == "F32":
        np.testing.assert_allclose(logits(c, random_arrays(c), tokens), expected, atol=1e-4, rtol=0)


def test_params_on_a_mesh_are_those_of_the_file(tmp_path):
    arrays = random_arrays(LLAMA)
    path = write_gguf(opened(LLAMA, arrays), tmp_path / "m.gguf", kind="F32", architecture="llama")
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, context=1, tensor=2), jax.devices())
    loaded = parameters.flat(load_params(open_gguf(path), mesh))
    for leaf, array in arrays.items():
        np.testing.assert_array_equal(np.asarray(loaded[leaf])[tuple(map(slice, array.shape))], array, err_msg=leaf)
    assert not np.asarray(loaded["embedding"])[LLAMA.vocab_size :].any()
    assert loaded["embedding"].dtype == jnp.float32


REFUSED = {
    "a window in llama": (PARTIAL, {"architecture": "llama"}, "a sliding window and heads that rotate in part"),
    "LongRoPE in llama": (LONG, {"architecture": "llama"}, "LongRoPE's two lists"),
    "GPT-2 in llama": (GPT2, {"architecture": "llama"}, r"model.positions='learned' .*Write it as 'gpt2'"),
    "grouped heads in gpt2": (dataclasses.replace(GPT2, num_kv_heads=2), {}, "model.positions='learned'"),
    "narrow heads in phi3": (LLAMA, {"architecture": "phi3"}, "4 heads of 16 = 64 and a width of 96"),
    "neither": (dataclasses.replace(LLAMA, sliding_window=9), {}, "heads of 16 = 64"),
    "rows of no block": (
        dataclasses.replace(PHI3, ffn_dim=100),
        {"kind": "Q4_0"},
        "blk.0.ffn_down.weight has rows of 100",
    ),
    "an unknown kind": (PHI3, {"kind": "Q4_K"}, "'Q4_K' is not written"),
    "fewer rows than tokens": (dataclasses.replace(PHI3, vocab_size=300), {}, "380 ids, the model 300 rows"),
    "an object store": (PHI3, {"output": "gs://bucket/m.gguf"}, "local disk"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_written_is_refused_before_anything_is(case, tmp_path):
    c, changed, message = REFUSED[case]
    arguments = {"output": tmp_path / "folder" / "m.gguf", "kind": "F32"} | changed
    with pytest.raises(UserError, match=message):
        write_gguf(opened(c), **arguments)
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("F32", np.nan, "NaN or infinite"),
        ("Q4_0", np.inf, "NaN or infinite"),
        ("F16", 7e4, "70000, too large for F16"),
        ("BF16", 3.4e38, "too large for BF16"),
        ("Q8_0", 1e7, "1e[+]07, too large for Q8_0"),
        ("Q4_0", -1e6, "1e[+]06, too large for Q4_0"),
    ],
)
def test_weights_that_do_not_fit_leave_nothing_behind(kind, value, message, tmp_path):
    arrays = random_arrays(PHI3)
    arrays["blocks/mlp/down"][1, 5, 7] = value
    with pytest.raises(UserError, match=f"blk.1.ffn_down.weight holds .*{message}"):
        write_gguf(opened(PHI3, arrays), tmp_path / "new" / "m.gguf", kind=kind)
    assert os.listdir(tmp_path) == []


def test_the_room_is_looked_for_first(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(staging, "check_room", lambda path, nbytes: asked.append(nbytes))
    size = write_gguf(opened(PHI3), tmp_path / "m.gguf", kind="Q8_0").stat().length
    assert 0.8 * size < asked[0] < size
    monkeypatch.undo()
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=size // 2))
    with pytest.raises(UserError, match=r"has .* free"):
        write_gguf(opened(PHI3), tmp_path / "new" / "m.gguf", kind="Q8_0")
    assert not (tmp_path / "new").exists()


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    class Failing(Arrays):
        def read(self, path, index):
            if path == "blocks/mlp/down":
                assert [name for name in os.listdir(tmp_path) if not name.startswith(".")] == []
                raise OSError("the disk is gone")
            return super().read(path, index)

    with pytest.raises(UserError, match="could not be written: the disk is gone"):
        write_gguf(opened(PHI3, weights=Failing(random_arrays(PHI3))), tmp_path / "m.gguf", kind="F32")
    assert os.listdir(tmp_path) == []
    path = write_gguf(opened(PHI3), tmp_path / "m.gguf", kind="F32")
    with pytest.raises(UserError, match="there already"):
        write_gguf(opened(PHI3), path, kind="F16")
    assert write_gguf(opened(PHI3), path, kind="F16", overwrite=True) == path
    assert open_gguf(path).weights.dtype("embedding") == np.float16


def test_the_architecture_is_that_of_the_weights_or_the_one_that_can_hold_them(tmp_path):
    for c, named, expected in (
        (PHI3, None, "phi3"),
        (PHI3, "LlamaForCausalLM", "llama"),
        (LLAMA, None, "llama"),
        (GPT2, None, "gpt2"),
        (GPT2, "LlamaForCausalLM", "gpt2"),
        (LLAMA, "Phi3ForCausalLM", "llama"),
        (dataclasses.replace(PHI3, sliding_window=9), "MistralForCausalLM", "phi3"),
    ):
        said = []
        source = opened(c, facts=Facts(architecture=named))
        path = write_gguf(source, tmp_path / "m.gguf", kind="F16", overwrite=True, say=said.append)
        assert gguf.GGUFReader(path).fields["general.architecture"].contents() == expected
        assert open_gguf(path).model == c
        assert len(said) == bool(c.sliding_window) and all("window of 9" in line for line in said)


def test_a_folder_gets_a_file_named_after_the_model(tmp_path):
    source = opened(PHI3, facts=Facts(name="My Model/v2"))
    path = write_gguf(source, tmp_path / "out", kind="BF16")
    assert path.name == "My-Model-v2-BF16.gguf" and path.parent.name == "out"
    assert gguf.GGUFReader(path).fields["general.name"].contents() == "My Model/v2 phi3"


def test_little_is_in_memory_at_once(tmp_path, monkeypatch):
    """No piece that is read is larger than the bound, but for whole heads."""
    monkeypatch.setattr(gguf_write, "_AT_ONCE", 1000)
    sizes = []

    class Watched(Arrays):
        def read(self, path, index):
            out = super().read(path, index)
            sizes.append(out.size)
            return out

    for c, most in ((PHI3, 1000), (LLAMA, 16 * 96)):
        sizes.clear()
        source = opened(c, weights=Watched(random_arrays(c)))
        write_gguf(source, tmp_path / f"{most}.gguf", kind="F32", architecture=architecture(c))
        assert max(sizes) <= most and sum(sizes) == parameters.count(c)


def test_export_of_an_import_is_the_same_file(tmp_path):
    """GGUF -> ours -> GGUF, tokenizer and template included."""
    source = opened(PHI3, chat_template="{{ messages }}", facts=Facts(name="phi3 x"))
    first = write_gguf(source, tmp_path / "a.gguf", kind="F32")
    second = write_gguf(open_gguf(first), tmp_path / "b.gguf", kind="F32")
    assert first.read_bytes() == second.read_bytes()
    assert tokenizer().vocab_size == 380
