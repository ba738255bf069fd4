"""Weights and models out of GGUF files that gguf's own writer made; what changes the mathematics is refused by name."""

import dataclasses

import numpy as np
import pytest
from gguf_case import GPT2, LLAMA, LONG, PARTIAL, PHI3, everything, opened, random_arrays
from gguf_case import gguf as by_hand
from gguf_case import key as key_of

from phijax.errors import UserError
from phijax.interchange.gguf.families import FAMILIES
from phijax.interchange.gguf.open import open_gguf
from phijax.interchange.gguf.source import QUANTISED
from phijax.interchange.gguf.write import write_gguf
from phijax.interchange.open import open_checkpoint
from phijax.interchange.weight_source import model_shapes

gguf = pytest.importorskip("gguf")


def linear_layers(c, arrays, layer):
    """HF's tensors of one layer, (out, in), written down here once more, by hand."""
    at = {path.removeprefix("blocks/"): array[layer] for path, array in arrays.items() if path.startswith("blocks/")}
    q, k, v = (at[f"attention/{name}"] for name in "qkv")
    return q, k, v, at["attention/o"].T, at["mlp/gate"], at["mlp/up"], at["mlp/down"].T


def permuted(weight, heads):
    """As llama.cpp's converter stores q and k: (heads, 2, H/2, D) -> (heads, H/2, 2, D)."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write(path, c, architecture, arrays, kind=None, *, change=(), drop=(), surplus=()):
    """A file of gguf's own writer. kind: how matrices are stored; change: keys behind the architecture's name."""
    writer = gguf.GGUFWriter(path, architecture)
    keys = {
        "context_length": c.max_position,
        "embedding_length": c.model_dim,
        "block_count": c.num_layers,
        "feed_forward_length": c.ffn_dim,
        "attention.head_count": c.num_heads,
        "attention.head_count_kv": c.num_kv_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": float(c.norm_eps),
        "rope.dimension_count": c.rotary_dim,
        "rope.freq_base": float(c.rope_theta),
    } | dict(change)
    types = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool}
    for key, value in keys.items():
        if key not in drop:
            add = writer.add_array if isinstance(value, list) else types[type(value)]
            add(key if key.startswith("general.") else f"{architecture}.{key}", value)
    tensors = {"token_embd": arrays["embedding"], "output_norm": arrays["final_norm/scale"]}
    tensors |= {"output": arrays["head"]} if "head" in arrays else {}
    for i in range(c.num_layers):
        q, k, v, o, gate, up, down = linear_layers(c, arrays, i)
        fused = {"attn_qkv": np.concatenate([q, k, v]), "ffn_up": np.concatenate([gate, up])}
        split = {"attn_q": permuted(q, c.num_heads), "attn_k": permuted(k, c.num_kv_heads), "attn_v": v}
        layer = fused if architecture == "phi3" else split | {"ffn_gate": gate, "ffn_up": up}
        layer |= {"attn_output": o, "ffn_down": down, "attn_norm": arrays["blocks/attention_norm/scale"][i]}
        layer |= {"ffn_norm": arrays["blocks/mlp_norm/scale"][i]}
        tensors |= {f"blk.{i}.{name}": array for name, array in layer.items()}
    for name, array in (tensors | dict(surplus)).items():
        if f"{name}.weight" in drop:
            continue
        array = np.ascontiguousarray(array, np.float32)
        if kind is None or array.ndim == 1:
            writer.add_tensor(f"{name}.weight", array)
        else:
            writer.add_tensor(f"{name}.weight", gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(("architecture", "c"), [("phi3", PHI3), ("llama", LLAMA), ("llama", PHI3)])
def test_weights_stand_under_our_names(architecture, c, tmp_path):
    arrays = random_arrays(c)
    read = open_gguf(write(tmp_path / "m.gguf", c, architecture, arrays))
    assert read.model == c
    assert read.weights.shapes() == model_shapes(c)
    for path, array in everything(read.weights).items():
        assert read.weights.dtype(path) == array.dtype == np.float32
        np.testing.assert_array_equal(array, arrays[path], err_msg=path)


@pytest.mark.parametrize(("architecture", "c"), [("phi3", PHI3), ("llama", LLAMA)])
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_any_slice_is_that_part_of_the_whole(architecture, c, kind, tmp_path):
    path = write(tmp_path / "m.gguf", c, architecture, random_arrays(c), gguf.GGMLQuantizationType[kind])
    source = open_gguf(path).weights
    rng = np.random.default_rng(1)
    for path, whole in everything(source).items():
        for _ in range(6):
            bounds = [np.sort(rng.integers(0, n + 1, 2)) for n in whole.shape]
            index = tuple(slice(int(a), int(b)) for a, b in bounds)
            np.testing.assert_array_equal(source.read(path, index), whole[index], err_msg=f"{path} {index}")


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_kinds_are_dequantised_as_gguf_does(kind, tmp_path):
    arrays, stored = random_arrays(PHI3), gguf.GGMLQuantizationType[kind]
    source = open_gguf(write(tmp_path / "m.gguf", PHI3, "phi3", arrays, stored)).weights
    for name in ("blocks/mlp/gate", "embedding"):
        expected = gguf.dequantize(gguf.quantize(arrays[name], stored), stored)
        got = source.read(name, tuple(slice(0, n) for n in arrays[name].shape))
        np.testing.assert_array_equal(got.astype(np.float32), expected)
    expected = {"F16": "float16", "BF16": "bfloat16"}.get(kind, "float32")
    assert source.dtype("blocks/mlp/gate").name == expected and source.dtype("final_norm/scale").name == "float32"


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_kinds_without_a_quantiser(kind, tmp_path):
    """gguf only reads these: random blocks with scales that are numbers stand for weights."""
    c = dataclasses.replace(LLAMA, model_dim=256, ffn_dim=256)  # blocks of 256
    stored = gguf.GGMLQuantizationType[kind]
    per_block, size = gguf.GGML_QUANT_SIZES[stored]
    scales = {"Q2_K": (80, 84), "Q3_K": (108, 110), "Q4_K": (0, 4), "Q5_K": (0, 4), "Q6_K": (208, 210)}[kind]
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (c.ffn_dim, c.model_dim // per_block, size), np.uint8)
    start, stop = scales
    raw[..., start:stop] = (
        rng.uniform(0.01, 0.02, (*raw.shape[:2], (stop - start) // 2)).astype(np.float16).view(np.uint8)
    )
    blocks = raw.reshape(c.ffn_dim, -1)
    path = write(tmp_path / "m.gguf", c, "llama", random_arrays(c))
    patch(path, "blk.1.ffn_gate.weight", blocks, stored)
    source = open_gguf(path).weights
    expected = gguf.dequantize(blocks, stored)
    assert np.abs(expected).max() > 0
    whole = source.read("blocks/mlp/gate", (slice(1, 2), slice(0, c.ffn_dim), slice(0, 256)))[0]
    np.testing.assert_array_equal(whole, expected)
    part = source.read("blocks/mlp/gate", (slice(1, 2), slice(5, 9), slice(33, 200)))[0]
    np.testing.assert_array_equal(part, expected[5:9, 33:200])
    assert kind in QUANTISED


def patch(path, name, blocks, kind):
    """Puts `blocks` in the place of a tensor in F32, whose bytes are more."""
    reader = gguf.GGUFReader(path, "r+")
    (tensor,) = [t for t in reader.tensors if t.name == name]
    tensor.field.parts[4][0] = kind  # the type, in the mapped header
    reader.data[tensor.data_offset : tensor.data_offset + blocks.nbytes] = blocks.reshape(-1)
    reader.data.flush()


def test_long_rope_and_partial_rotation_are_read(tmp_path):
    lists = {"rope_factors_long": LONG.long_rope.long_factor, "rope_factors_short": LONG.long_rope.short_factor}
    factor = (1 + np.log(4) / np.log(16)) ** 0.5
    change = {"rope.scaling.original_context_length": 16, "rope.scaling.attn_factor": float(factor)}
    arrays = random_arrays(LONG)
    path = write(tmp_path / "long.gguf", LONG, "phi3", arrays, change=change, surplus=lists)
    read = open_gguf(path).model
    # The file has float32; what comes back is 1.7 for 1.7000000000000002.
    for name in ("short_factor", "long_factor"):
        np.testing.assert_allclose(getattr(read.long_rope, name), getattr(LONG.long_rope, name), rtol=1e-15)
        assert all(len(repr(value)) < 6 for value in getattr(read.long_rope, name))
    assert dataclasses.replace(read, long_rope=LONG.long_rope) == LONG
    for wrong, message in (
        ({"rope.scaling.attn_factor": 1.1}, "attn_factor"),
        ({"rope.scaling.original_context_length": 32}, "attn_factor"),
    ):
        with pytest.raises(UserError, match=message):
            open_gguf(write(tmp_path / "wrong.gguf", LONG, "phi3", arrays, change=change | wrong, surplus=lists))
    for drop, message in (
        (("rope.scaling.attn_factor",), "attn_factor"),
        (("rope.scaling.original_context_length",), "original_context_length"),
        (("rope_factors_short.weight",), "needs both lists"),
    ):
        with pytest.raises(UserError, match=message):
            open_gguf(write(tmp_path / "w.gguf", LONG, "phi3", arrays, change=change, surplus=lists, drop=drop))
    change = {"attention.sliding_window": 7}
    path = write(tmp_path / "partial.gguf", PARTIAL, "phi3", random_arrays(PARTIAL), change=change)
    assert open_gguf(path).model == PARTIAL


def test_defaults_of_keys_that_files_leave_out(tmp_path):
    c = dataclasses.replace(LLAMA, num_heads=6, num_kv_heads=6)
    drop = ("attention.head_count_kv", "rope.dimension_count", "rope.freq_base", "attention.key_length")
    drop += ("attention.value_length",)
    assert open_gguf(write(tmp_path / "m.gguf", c, "llama", random_arrays(c), drop=drop)).model == c


OTHER_MATHEMATICS = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scale_linear": 2.0,
    "rope.scaling.attn_factor": 1.3,
    "expert_count": 8,
    "attention.max_alibi_bias": 8.0,
    "attention.clamp_kqv": 8.0,
    "attention.scale": 0.5,
    "attention.causal": False,
    "attention.head_count": [4, 4],
    "attention.value_length": 32,
    "logit_scale": 0.1,
    "attn_logit_softcapping": 30.0,
    "use_parallel_residual": True,
    "some.new.key": 1,
}


@pytest.mark.parametrize("key", OTHER_MATHEMATICS)
@pytest.mark.parametrize("architecture", ["phi3", "llama"])
def test_a_key_that_changes_the_mathematics_is_refused_by_name(key, architecture, tmp_path):
    path = write(tmp_path / "m.gguf", LLAMA, architecture, random_arrays(LLAMA), change={key: OTHER_MATHEMATICS[key]})
    with pytest.raises(UserError, match="heads of" if key == "attention.value_length" else key):
        open_gguf(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "gemma3"}, "'gemma3'; read are 'phi3', 'llama', 'gpt2'"),
        ({"general.type": "adapter"}, "'adapter', not a model"),
        ({"block_count": 1_000_000_000}, "block_count=1000000000"),
        ({"block_count": 3}, "blk.2.attn_norm.weight: missing"),
        ({"embedding_length": 97}, "shape"),
        ({"attention.head_count": 0}, "attention.head_count=0"),
        ({"attention.head_count": 2**31}, "attention.head_count=2147483648"),
        ({"attention.head_count_kv": 3}, "num_kv_heads=3 does not divide"),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, "epsilon=nan"),
        ({"rope.freq_base": -1.0}, "freq_base=-1.0"),
        ({"rope.dimension_count": 98}, "dimension_count=98"),
        ({"rope.dimension_count": 7}, "must be even"),
        ({"vocab_size": 399}, "vocab_size=399"),
        ({"context_length": "long"}, "context_length='long'"),
    ],
)
def test_headers_that_describe_no_model(change, message, tmp_path):
    path = write(tmp_path / "m.gguf", PHI3, "phi3", random_arrays(PHI3), change=change)
    with pytest.raises(UserError) as refused:
        open_gguf(path)
    assert message in str(refused.value)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_every_part_of_several_is_told_to_be_one(number, tmp_path):
    """Only the first has the architecture among its keys."""
    keys = [key_of("split.no", "u32", number), key_of("split.count", "u32", 3)]
    keys += [key_of("general.architecture", "str", "llama")] if number == 0 else []
    path = tmp_path / f"m-0000{number + 1}-of-00003.gguf"
    path.write_bytes(by_hand(keys))
    with pytest.raises(UserError, match=rf"is part {number + 1} of 3\. Join"):
        open_checkpoint(path)


@pytest.mark.parametrize("key", ["embedding_length", "block_count", "attention.head_count", "feed_forward_length"])
def test_a_missing_key_is_named(key, tmp_path):
    with pytest.raises(UserError, match=f"has no phi3.{key}"):
        open_gguf(write(tmp_path / "m.gguf", PHI3, "phi3", random_arrays(PHI3), drop=(key,)))


def test_partial_rotation_of_llama_is_refused(tmp_path):
    """llama.cpp's rows of q would have to be permuted in part, which it does not do either."""
    with pytest.raises(UserError, match=r"llama.rope.dimension_count=8 of 16"):
        open_gguf(write(tmp_path / "m.gguf", LLAMA, "llama", random_arrays(LLAMA), change={"rope.dimension_count": 8}))


def test_missing_surplus_and_misshapen_tensors_are_named(tmp_path):
    arrays = random_arrays(PHI3)
    cases = [
        ({"drop": ("blk.1.ffn_down.weight",)}, "blk.1.ffn_down.weight: missing"),
        ({"surplus": {"blk.0.attn_q_norm": np.ones(48)}}, "blk.0.attn_q_norm.weight .* not a part of this model"),
        ({"surplus": {"rope_freqs": np.ones(24)}}, "rope_freqs.weight .* not a part of this model"),
        ({"surplus": {"blk.0.attn_norm": np.ones(95)}}, r"blk.0.attn_norm.weight: has shape \(95,\)"),
    ]
    for case, message in cases:
        with pytest.raises(UserError, match=message):
            open_gguf(write(tmp_path / "m.gguf", PHI3, "phi3", arrays, **case))
    arrays["blocks/mlp/gate"] = arrays["blocks/mlp/gate"].copy()
    arrays["blocks/mlp/gate"][1, 3, 5] = np.nan
    source = open_gguf(write(tmp_path / "m.gguf", PHI3, "phi3", arrays)).weights
    source.read("blocks/mlp/gate", (slice(0, 1), slice(0, 160), slice(0, 96)))
    with pytest.raises(UserError, match=r"blk.1.ffn_up.weight holds NaN"):
        source.read("blocks/mlp/gate", (slice(0, 2), slice(0, 160), slice(0, 96)))


def test_kinds_that_are_not_read_are_named(tmp_path):
    path = write(tmp_path / "m.gguf", LLAMA, "llama", random_arrays(LLAMA))
    patch(path, "blk.0.ffn_gate.weight", np.zeros(160 * 96 // 32 * 18, np.uint8), gguf.GGMLQuantizationType.IQ4_NL)
    with pytest.raises(UserError, match=r"blk.0.ffn_gate.weight: stored as IQ4_NL"):
        open_gguf(path)


@pytest.mark.parametrize(("architecture", "c"), [("phi3", PHI3), ("llama", LLAMA), ("phi3", PARTIAL), ("gpt2", GPT2)])
def test_the_table_names_tensors_as_gguf_does(architecture, c, tmp_path):
    """Every name is one that gguf knows for this architecture, and every leaf has its place once."""
    arch = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    known = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[arch]}
    for row in FAMILIES[architecture].rows:
        assert row.name.removesuffix(".weight").removesuffix(".bias").format("{bid}") in known
    leaves = [leaf for row in FAMILIES[architecture].rows for leaf in row.leaves]
    assert sorted(leaves) == sorted(set(leaves)) and set(leaves) >= set(model_shapes(c))


def test_what_we_write_is_laid_out_as_by_hand(tmp_path):
    """Tensor by tensor the same bytes as gguf's writer makes of HF's tensors, permuted by llama.cpp's rule."""
    for architecture, c in (("phi3", PHI3), ("llama", LLAMA)):
        arrays = random_arrays(c)
        by_hand = gguf.GGUFReader(write(tmp_path / "hand.gguf", c, architecture, arrays))
        path = write_gguf(opened(c, arrays), tmp_path / f"{architecture}.gguf", kind="F32", architecture=architecture)
        ours = {t.name: t for t in gguf.GGUFReader(path).tensors}
        assert {t.name for t in by_hand.tensors} == set(ours)
        for tensor in by_hand.tensors:
            np.testing.assert_array_equal(ours[tensor.name].data, tensor.data, err_msg=tensor.name)


def test_a_file_is_recognised_by_its_first_bytes(tmp_path):
    """Ollama keeps GGUF files under their digests."""
    path = write(tmp_path / "m.gguf", LLAMA, "llama", random_arrays(LLAMA)).rename(tmp_path / "sha256-1234")
    found = open_checkpoint(path)
    assert found.kind == "gguf" and found.model == LLAMA


def test_a_folder_with_one_file_is_that_file_and_with_two_is_refused(tmp_path):
    path = write(tmp_path / "a.gguf", LLAMA, "llama", random_arrays(LLAMA))
    assert open_checkpoint(tmp_path).path.name == "a.gguf"
    (tmp_path / "b.gguf").write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=r"has 2 GGUF files\. Give the one you mean: .*/a\.gguf"):
        open_checkpoint(tmp_path)
