"""Hugging Face folders in and out against transformers: values, bits, logits, keys of config.json."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_case import L0, LONG, MODELS, PARTIAL, PHI3, TIED, WINDOW, Saved, edit, make, tensors, their_logits
from quick_compilation import QUICK

from phijax.errors import UserError
from phijax.interchange.huggingface import config as huggingface_config
from phijax.interchange.huggingface import export as huggingface_export
from phijax.interchange.huggingface import folder as huggingface_folder
from phijax.interchange.huggingface.families import FAMILIES
from phijax.interchange.load import load_params
from phijax.interchange.native import write as native_write
from phijax.interchange.open import open_checkpoint
from phijax.interchange.tensors import tensors as tensors_of
from phijax.interchange.weight_source import model_shapes
from phijax.model import params
from phijax.model.backend import Backend
from phijax.parallel.mesh import MeshConfig, make_mesh
from phijax.storage import durable


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Saved:
    return Saved(tmp_path_factory.mktemp("huggingface"))


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def logits(opened, tokens: np.ndarray) -> np.ndarray:
    """Ours, of weights loaded from the folder, plain attention in float32."""
    length = tokens.shape[1]
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)

    def forward(weights):
        model = params.module(opened.model, weights)
        hidden = model.hidden(tokens, positions, np.ones_like(tokens), Backend(), length=length)
        return model.logits(hidden)

    return np.asarray(jax.jit(forward, compiler_options=QUICK)(load_params(opened, one_device())))


def write_hf(opened, output, *, layout=None, dtype=None, shard=10**9):
    family = huggingface_export.choose_family(opened, layout or "hf")
    huggingface_folder.write(opened, output, huggingface_export.folder(opened, family, dtype), max_shard_bytes=shard)
    return output


@pytest.mark.parametrize("name", MODELS)
def test_config_is_read_as_it_was_meant(saved, name):
    assert open_checkpoint(saved(name)).model == MODELS[name][0]


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_an_opened_folder_are_those_of_transformers(saved, name):
    tokens = np.random.default_rng(0).integers(0, 300, (2, 2 * L0), dtype=np.int32)
    expected = their_logits(saved(name), tokens)
    assert np.abs(expected).max() > 1
    # float32 on both sides: sums in another order.
    np.testing.assert_allclose(logits(open_checkpoint(saved(name)), tokens), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["phi3", "partial", "tied"])
def test_leaves_are_bit_equal_on_any_mesh_from_single_and_sharded_files(saved, name, dtype):
    """A piece of a leaf is read for each device; what pads the vocabulary is zero."""
    c, kind = MODELS[name]
    theirs = {k: v.float().numpy() for k, v in make(c, kind, dtype).state_dict().items()}
    rows, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    meshes = [one_device(), make_mesh(MeshConfig(data=2, fsdp=4), jax.devices())]
    for shard, mesh in zip(["5GB", "40KB"], meshes, strict=True):
        folder = saved(name, dtype, shard)
        assert len(list(folder.glob("*.safetensors"))) == 1 or shard != "5GB"
        got = {k: np.asarray(v) for k, v in params.flat(load_params(open_checkpoint(folder), mesh)).items()}
        for i in range(c.num_layers):
            layer = f"model.layers.{i}."
            if kind == "Phi3ForCausalLM":
                q, k, v = np.split(theirs[layer + "self_attn.qkv_proj.weight"], [rows, rows + kv])
                gate, up = np.split(theirs[layer + "mlp.gate_up_proj.weight"], 2)
            else:
                q, k, v = (theirs[f"{layer}self_attn.{x}_proj.weight"] for x in "qkv")
                gate, up = (theirs[f"{layer}mlp.{x}_proj.weight"] for x in ("gate", "up"))
            expected = {
                "attention/q": q,
                "attention/k": k,
                "attention/v": v,
                "attention/o": theirs[layer + "self_attn.o_proj.weight"].T,
                "mlp/gate": gate,
                "mlp/up": up,
                "mlp/down": theirs[layer + "mlp.down_proj.weight"].T,
                "attention_norm/scale": theirs[layer + "input_layernorm.weight"],
                "mlp_norm/scale": theirs[layer + "post_attention_layernorm.weight"],
            }
            for path, value in expected.items():
                np.testing.assert_array_equal(got[f"blocks/{path}"][i], value, err_msg=path)
        np.testing.assert_array_equal(got["embedding"][:300], theirs["model.embed_tokens.weight"])
        assert not got["embedding"][300:].any()
        np.testing.assert_array_equal(got["final_norm/scale"], theirs["model.norm.weight"])
        assert ("head" in got) != c.tied_head


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip_through_ours_keeps_every_bit_and_dtype(saved, tmp_path, name, dtype):
    opened = open_checkpoint(saved(name, dtype))
    native_write.write(opened, tmp_path / "ours", dtype=None)
    again = open_checkpoint(tmp_path / "ours")
    assert (again.kind, again.model, again.stop_ids) == ("phijax", opened.model, (7, 2))
    back = write_hf(again, tmp_path / "back", shard=30_000)
    assert len(list(back.glob("*.safetensors"))) > 1
    assert tensors(back) == tensors(saved(name, dtype))
    config = json.loads((back / "config.json").read_text())
    assert config["architectures"] == [MODELS[name][1]] and config["torch_dtype"] == dtype


@pytest.mark.parametrize("name", MODELS)
def test_a_written_folder_gives_the_same_logits_in_transformers(saved, tmp_path, name):
    """Below and above the switch of LongRoPE and the window: the keys of config.json say the same."""
    written = write_hf(open_checkpoint(saved(name)), tmp_path / "out")
    for length in (L0, 2 * L0):
        tokens = np.random.default_rng(0).integers(0, 300, (1, length), dtype=np.int32)
        np.testing.assert_array_equal(their_logits(written, tokens), their_logits(saved(name), tokens))


@pytest.mark.parametrize("name, layout", [("phi3", "llama"), ("longrope", "llama"), ("window", "mistral")])
def test_phi3_in_the_layouts_of_others(saved, tmp_path, name, layout):
    """Split, not changed: logits differ by the order of sums, and splitting back gives every bit."""
    written = write_hf(open_checkpoint(saved(name)), tmp_path / "split", layout=layout)
    for length in (L0, 2 * L0):
        tokens = np.random.default_rng(1).integers(0, 300, (1, length), dtype=np.int32)
        np.testing.assert_allclose(their_logits(written, tokens), their_logits(saved(name), tokens), atol=1e-5)
    back = write_hf(open_checkpoint(written), tmp_path / "fused", layout="phi3")
    assert tensors(back) == tensors(saved(name))


@pytest.mark.parametrize(
    "name, layout, reason",
    [
        ("window", "llama", "no window.*--format=mistral"),
        ("partial", "llama", "rotates whole heads"),
        ("tied", "phi3", "have 20"),
    ],
)
def test_layouts_that_cannot_hold_a_model_are_refused_with_the_reason(saved, name, layout, reason):
    with pytest.raises(UserError, match=reason):
        huggingface_export.choose_family(open_checkpoint(saved(name)), layout)


def test_a_window_that_no_sequence_reaches_needs_no_mistral():
    c = dataclasses.replace(PHI3, sliding_window=64)
    assert FAMILIES["llama"].unwritable(c) is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrowing_rounds_as_torch_does(saved, tmp_path, dtype):
    out = write_hf(open_checkpoint(saved("phi3")), tmp_path / "out", dtype=huggingface_export.DTYPES[dtype])
    assert tensors(out) == tensors(saved("phi3", dtype))


@pytest.mark.parametrize("layout", ["phi3", "llama", "mistral"])
@pytest.mark.parametrize("c", [PHI3, WINDOW, LONG, PARTIAL, TIED], ids=["plain", "window", "long", "partial", "tied"])
def test_config_comes_back_from_what_was_written(c, layout):
    if FAMILIES[layout].unwritable(c) is None:
        written = json.loads(json.dumps(huggingface_config.render(c, FAMILIES[layout], dtype="bfloat16", ids={})))
        assert huggingface_config.parse(written, "x")[0] == c


@pytest.mark.parametrize("layout", ["phi3", "llama"])
def test_the_name_table_covers_every_leaf_once(layout):
    """Each element of each leaf lies in one tensor."""
    c = dataclasses.replace(PHI3, num_layers=3)
    counts = {path: 0 for path in model_shapes(c)}
    for tensor in tensors_of(c, FAMILIES[layout].rows):
        assert sum(part.rows for part in tensor.parts) == tensor.shape[0]
        for part in tensor.parts:
            counts[part.leaf] += part.rows * (tensor.shape[1] if len(tensor.shape) > 1 else 1)
    assert counts == {path: int(np.prod(shape)) for path, shape in model_shapes(c).items()}


LAYOUTS = ("phi3", "llama", "mistral")
NO_ROPE = {"rope_parameters": None}  # which overrules the keys beside it
CHANGES = [
    ("phi3", {"architectures": ["PhiForCausalLM"], "model_type": "phi"}, "PhiForCausalLM.*is not known"),
    ("phi3", {"model_type": "llama"}, "architectures says Phi3ForCausalLM, model_type says 'llama'"),
    ("llama", {"attention_bias": True}, "attention_bias=True"),
    ("llama", {"mlp_bias": True}, "mlp_bias=True"),
    ("phi3", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("phi3", {"quantization_config": {"quant_method": "gptq"}}, "weights are quantised"),
    ("llama", {"rope_interleaved": True}, "rope_interleaved"),
    ("llama", {"sliding_window": 5}, "sliding_window=5 in a Llama"),
    ("phi3", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type='yarn' is not done"),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_type='llama3' is not done"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear' is not done"),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic' is not done"),
    ("llama", {"rope_scaling": {"type": "default", "high_freq_factor": 4.0}}, "high_freq_factor"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is no key of this class"),
    *((name, {"rope_theta": x} | NO_ROPE, f"rope_theta={x!r} must be") for name in LAYOUTS for x in (0, False, "")),
    *(("phi3", {"partial_rotary_factor": x} | NO_ROPE, f"factor={x!r} must be") for x in (0, False, "")),
    ("llama", {"partial_rotary_factor": 0} | NO_ROPE, "partial_rotary_factor=0.0 is no key of this class"),
    ("phi3", {"hidden_size": "64"}, "hidden_size='64' must be a whole number from 1 to 2,147,483,647"),
    ("phi3", {"num_hidden_layers": 1 << 40}, "num_hidden_layers"),
    ("phi3", {"vocab_size": None}, "vocab_size is missing"),
    ("phi3", {"num_key_value_heads": 3}, "does not divide"),
]


@pytest.mark.parametrize("name, change, message", CHANGES)
def test_what_is_not_done_here_is_refused_by_name(saved, name, change, message):
    data = json.loads((saved(name) / "config.json").read_text())
    huggingface_config.parse(data, "config.json")
    with pytest.raises(UserError, match=f"(?s)config.json.*{message}"):
        huggingface_config.parse(data | change, "config.json")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"attention_factor": 2.0}, "attention_factor 2.0"),
        ({"factor": 32.0}, "attention_factor"),
        ({"long_mscale": 1.0}, "long_mscale 1.0"),
        ({"short_factor": [1.0]}, "short_factor has 1 entries"),
        ({"long_factor": None}, "long_factor is missing; it must be a list"),
    ],
)
def test_longrope_that_scales_otherwise_is_refused(saved, change, message):
    data = json.loads((saved("longrope") / "config.json").read_text())
    data["rope_parameters"] |= change
    with pytest.raises(UserError, match=message):
        huggingface_config.parse(data, "config.json")


@pytest.mark.parametrize("kind", ["su", "longrope"])
def test_old_spellings_of_longrope_are_the_same_model(saved, kind):
    """Keys of 2024, as the published phi-3-mini-128k has them."""
    data = json.loads((saved("longrope") / "config.json").read_text())
    rope = data.pop("rope_parameters")
    lists = {name: rope[name] for name in ("short_factor", "long_factor")}
    old = data | {"rope_scaling": {"type": kind, **lists}, "rope_theta": 10000.0, "torch_dtype": "bfloat16"}
    assert huggingface_config.parse(old, "config.json")[0] == LONG


def test_defaults_are_those_of_transformers(saved):
    """Keys that config.json leaves out mean what transformers takes for them."""
    transformers = pytest.importorskip("transformers")
    for name in ("phi3", "llama", "mistral"):
        kind = MODELS[name][1]
        data = json.loads((saved(name) / "config.json").read_text())
        for key in (
            "rms_norm_eps",
            "max_position_embeddings",
            "sliding_window",
            "rope_parameters",
            "tie_word_embeddings",
        ):
            data.pop(key, None)
        theirs = getattr(transformers, kind).config_class(**{k: v for k, v in data.items() if k != "architectures"})
        ours = huggingface_config.parse(data, "config.json")[0]
        assert ours.norm_eps == theirs.rms_norm_eps
        assert ours.max_position == theirs.max_position_embeddings
        assert ours.sliding_window == getattr(theirs, "sliding_window", None)
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
        assert ours.tied_head == theirs.tie_word_embeddings


def test_mixed_dtypes_keep_theirs_where_a_tensor_has_one(saved, tmp_path):
    """Norms in float32 beside matrices in bfloat16, as some trainers write them."""
    model = make(PHI3, "Phi3ForCausalLM", "bfloat16")
    model.model.norm.float()
    model.save_pretrained(tmp_path / "mixed")
    opened = open_checkpoint(tmp_path / "mixed")
    assert opened.weights.dtype("final_norm/scale") == np.float32
    assert opened.weights.dtype("embedding") == jnp.bfloat16
    assert tensors(write_hf(opened, tmp_path / "out")) == tensors(tmp_path / "mixed")


def test_buffers_of_old_files_and_a_second_copy_of_a_tied_head_are_ignored(saved, tmp_path):
    safetensors_torch = pytest.importorskip("safetensors.torch")
    torch = pytest.importorskip("torch")
    folder = tmp_path / "old"
    model = make(TIED, "LlamaForCausalLM")
    model.save_pretrained(folder)
    state = safetensors_torch.load_file(folder / "model.safetensors")
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(10)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    safetensors_torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert open_checkpoint(folder).model == TIED
    edit(folder / "config.json", lambda c: c.update(tie_word_embeddings=False))
    assert "head" in open_checkpoint(folder).weights.shapes()


def test_files_that_cannot_be_mapped_are_read_by_rows(saved, monkeypatch):
    """As those of an object store."""
    source = open_checkpoint(saved("phi3")).weights
    indices = {path: tuple(slice(1, max(2, size - 1)) for size in shape) for path, shape in source.shapes().items()}
    mapped = {path: source.read(path, index) for path, index in indices.items()}
    monkeypatch.setattr(durable, "is_local", lambda path: False)
    for path, index in indices.items():
        np.testing.assert_array_equal(source.read(path, index), mapped[path], err_msg=path)
