"""What GPT-2's folders have of their own: Conv1D's layout, names without a prefix, masks among the weights, keys."""

import json

import numpy as np
import pytest
from gpt2_case import GPT2_SMALL, leaves_of_gpt2
from huggingface_case import edit, make, tensors, their_logits

from phijax.errors import UserError
from phijax.interchange.huggingface import config as huggingface_config
from phijax.interchange.huggingface import export as huggingface_export
from phijax.interchange.huggingface import folder as huggingface_folder
from phijax.interchange.huggingface.families import FAMILIES
from phijax.interchange.open import open_checkpoint
from phijax.interchange.tensors import tensors as tensors_of
from phijax.interchange.weight_source import model_shapes

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

MODEL = "model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2") / "saved"
    make(GPT2_SMALL, "GPT2LMHeadModel").save_pretrained(folder)
    return folder


@pytest.fixture
def published(saved, tmp_path):
    """As the published files are: names of the class without a head, and what attention masks with."""

    def write(**more):
        state = safetensors_torch.load_file(saved / MODEL)
        state = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
        length = GPT2_SMALL.max_position
        for i in range(GPT2_SMALL.num_layers):
            state[f"h.{i}.attn.bias"] = torch.ones(1, 1, length, length).tril().to(more.get("mask", torch.float32))
            state[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
        state |= {name: tensor for name, tensor in more.items() if "." in name}
        folder = tmp_path / "published"
        folder.mkdir()
        (folder / "config.json").write_text((saved / "config.json").read_text())
        safetensors_torch.save_file(state, folder / MODEL, metadata={"format": "pt"})
        return folder

    return write


def whole(source) -> dict[str, np.ndarray]:
    return {path: source.read(path, tuple(slice(0, n) for n in shape)) for path, shape in source.shapes().items()}


def test_leaves_are_transformers_weights_bit_for_bit(saved):
    expected = leaves_of_gpt2(GPT2_SMALL, safetensors_torch.load_file(saved / MODEL))
    source = open_checkpoint(saved).weights
    assert set(source.shapes()) == set(expected)
    for path, array in whole(source).items():
        np.testing.assert_array_equal(array, expected[path][: len(array)], err_msg=path)


def test_any_slice_is_that_part_of_the_whole(saved):
    """Of q, k and v, that stand side by side, too."""
    source, rng = open_checkpoint(saved).weights, np.random.default_rng(0)
    for path, array in whole(source).items():
        for _ in range(5):
            index = tuple(slice(*map(int, np.sort(rng.integers(0, n + 1, 2)))) for n in array.shape)
            np.testing.assert_array_equal(source.read(path, index), array[index], err_msg=f"{path} {index}")


@pytest.mark.parametrize("mask", [torch.float32, torch.bool, torch.uint8])
def test_published_files_are_read_and_written_with_prefix_and_without_masks(saved, published, tmp_path, mask):
    folder = published(mask=mask)
    opened = open_checkpoint(folder)
    assert opened.model == GPT2_SMALL and opened.facts.architecture == "GPT2LMHeadModel"
    family = huggingface_export.choose_family(opened, "hf")
    huggingface_folder.write(opened, tmp_path / "out", huggingface_export.folder(opened, family, None))
    assert tensors(tmp_path / "out") == tensors(saved)
    tokens = np.arange(20)[None] * 7
    np.testing.assert_array_equal(their_logits(tmp_path / "out", tokens), their_logits(folder, tokens))


@pytest.mark.parametrize(
    "more, message",
    [
        ({"h.0.attn.bias": torch.ones(1, 1, 39, 39)}, "transformer.h.0.attn.bias belongs to no weight"),
        ({"h.3.attn.c_attn.bias": torch.ones(180)}, "transformer.h.3.attn.c_attn.bias belongs to no weight"),
        ({"h.1.ln_1.bias": torch.ones(60, dtype=torch.uint8)}, "transformer.h.1.ln_1.bias is stored as uint8"),
        ({"h.2.mlp.c_fc.weight": torch.ones(144, 60)}, r"has shape \(144, 60\), config.json asks for \(60, 144\)"),
    ],
)
def test_only_the_masks_are_passed_over(published, more, message):
    with pytest.raises(UserError, match=message):
        open_checkpoint(published(**more))


def test_a_head_of_its_own_is_kept(saved, tmp_path):
    model = make(GPT2_SMALL, "GPT2LMHeadModel")
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(0).contiguous())
    model.save_pretrained(tmp_path / "untied")
    opened = open_checkpoint(tmp_path / "untied")
    assert not opened.model.tied_head
    huggingface_folder.write(
        opened, tmp_path / "out", huggingface_export.folder(opened, FAMILIES["gpt2"], None), say=print
    )
    assert tensors(tmp_path / "out") == tensors(tmp_path / "untied")


CHANGES = [
    ({"activation_function": "gelu"}, "activation_function='gelu' must be gelu_new or gelu_pytorch_tanh"),
    ({"activation_function": "relu"}, "activation_function='relu'"),
    ({"scale_attn_weights": False}, "scale_attn_weights=False must be true"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True must be false"),
    ({"add_cross_attention": True}, "add_cross_attention=True must be false"),
    ({"n_ctx": 39}, "n_ctx=39 must be n_positions=40"),
    ({"n_embd": 61}, "n_embd=61 must be a multiple of n_head=5"),
    ({"n_head": 0}, "n_head=0 must be a whole number from 1"),
    ({"n_inner": 1.5}, "n_inner=1.5"),
    ({"layer_norm_epsilon": 0}, "layer_norm_epsilon=0 must be a finite number above 0"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes'"),
    ({"rope_theta": 10000.0}, "rope_theta=10000.0: phijax does not know this key of a GPT2LMHeadModel"),
    ({"model_type": "gpt_neo"}, "architectures says GPT2LMHeadModel, model_type says 'gpt_neo'"),
]


@pytest.mark.parametrize("change, message", CHANGES)
def test_what_is_not_done_here_is_refused_by_name(saved, change, message):
    data = json.loads((saved / "config.json").read_text())
    huggingface_config.parse(data, "config.json")
    with pytest.raises(UserError, match=message):
        huggingface_config.parse(data | change, "config.json")


@pytest.mark.parametrize("change", [{"activation_function": "gelu_pytorch_tanh"}, {"reorder_and_upcast_attn": True}])
def test_keys_that_change_no_formula_are_taken(saved, published, change):
    """transformers gives the same logits with them, up to the order of sums."""
    folder, tokens = published(), np.arange(20)[None] * 7
    expected = their_logits(folder, tokens)
    edit(folder / "config.json", lambda config: config.update(change))
    assert open_checkpoint(folder).model == GPT2_SMALL
    np.testing.assert_allclose(their_logits(folder, tokens), expected, atol=1e-5, rtol=0)


def test_defaults_are_those_of_transformers():
    ours = huggingface_config.parse({"model_type": "gpt2"}, "config.json")[0]
    theirs = transformers.GPT2Config()
    assert (ours.vocab_size, ours.max_position, ours.model_dim) == (theirs.vocab_size, theirs.n_positions, 768)
    assert (ours.num_layers, ours.num_heads, ours.ffn_dim) == (theirs.n_layer, theirs.n_head, 4 * theirs.n_embd)
    assert (ours.norm_eps, ours.tied_head) == (theirs.layer_norm_epsilon, theirs.tie_word_embeddings)


@pytest.mark.parametrize("format", ["llama", "mistral", "phi3"])
def test_other_classes_are_refused_by_name(saved, format):
    with pytest.raises(
        UserError, match=r"computes otherwise: it has model.positions='learned' \(there always 'rotary'"
    ):
        huggingface_export.choose_family(open_checkpoint(saved), format)


def test_the_table_holds_every_element_once():
    """Of the files' Conv1D and of mlx-lm's linear layers."""
    family = FAMILIES["gpt2"]
    for rows in (family.rows, family.mlx_rows):
        counts = dict.fromkeys(model_shapes(GPT2_SMALL), 0)
        for tensor in tensors_of(GPT2_SMALL, rows):
            outputs = sum(part.rows for part in tensor.parts)
            assert outputs == tensor.shape[-1 if tensor.inputs_first else 0]
            for part in tensor.parts:
                counts[part.leaf] += part.rows * int(np.prod(tensor.shape)) // outputs
        assert counts == {path: int(np.prod(shape)) for path, shape in model_shapes(GPT2_SMALL).items()}
