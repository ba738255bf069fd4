"""Presets against the published numbers, and what resolve_model refuses."""

import json
import math

import pytest

from phijax.errors import UserError
from phijax.model import params
from phijax.model.config import ModelConfig, ModelSection, resolve_model
from phijax.model.presets import PRESETS
from phijax.model.rope import inverse_frequencies

# Of the published checkpoints.
PARAMETERS = {
    "phi3_mini": 3_821_079_552,
    "phi3_mini_128k": 3_821_079_552,
    "phi3_medium": 13_960_238_080,
    "phi3_medium_128k": 13_960_238_080,
    "phi35_mini": 3_821_079_552,
    "phi4_mini": 3_836_021_760,
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "gpt2": 124_439_808,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "gpt2_xl": 1_557_611_200,
    "tiny": 2 * 2048 * 192 + 4 * (192 * 192 * 3 + 3 * 512 * 192 + 2 * 192) + 192,
}

PUBLISHED = {
    "phi3_mini": "phi-3-mini-4k",
    "phi3_mini_128k": "phi-3-mini-128k",
    "phi3_medium": "phi-3-medium-4k",
    "phi3_medium_128k": "phi-3-medium-128k",
    "phi35_mini": "phi-3.5-mini",
    "phi4_mini": "phi-4-mini",
    "llama2_7b": "llama-2-7b",
    "llama2_13b": "llama-2-13b",
    "gpt2": "gpt2-124m",
    "gpt2_medium": "gpt2-355m",
    "gpt2_large": "gpt2-774m",
    "gpt2_xl": "gpt2-1.5b",
}

CONFIG_KEYS = {
    "vocab_size": "vocab_size",
    "model_dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn_dim": "intermediate_size",
    "max_position": "max_position_embeddings",
    "rope_theta": "rope_theta",
    "partial_rotary_factor": "partial_rotary_factor",
    "sliding_window": "sliding_window",
    "tied_head": "tie_word_embeddings",
    "norm_eps": "rms_norm_eps",
}
GPT2_KEYS = {
    "rope_theta": None,
    "partial_rotary_factor": None,
    "sliding_window": None,
    "norm_eps": "layer_norm_epsilon",
    "positions": "position_embedding",
    "bias": "attention_bias",
}

FACTORS = {
    "phi3_mini_128k": "phi-3-mini-128k (current, June/July 2024 update)",
    "phi35_mini": "phi-3.5-mini",
    "phi4_mini": "phi-4-mini",
}


def test_every_preset_is_checked():
    assert set(PARAMETERS) == set(PRESETS)
    assert set(PUBLISHED) == set(PRESETS) - {"tiny"}
    for config in PRESETS.values():
        config.check()


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    c = PRESETS[name]
    assert params.count(c) == PARAMETERS[name]
    assert c.padded_vocab_size % 1024 == 0 and 0 <= c.padded_vocab_size - c.vocab_size < 1024


@pytest.mark.parametrize("name", PUBLISHED)
def test_numbers_equal_the_published_configs(shared, name):
    published = json.loads((shared / "reference/configs.json").read_text())["models"][PUBLISHED[name]]
    c = PRESETS[name]
    keys = CONFIG_KEYS | (GPT2_KEYS if published["architecture"] == "GPT2LMHeadModel" else {})
    for ours, theirs in keys.items():
        assert theirs is None or getattr(c, ours) == published[theirs], ours
    kinds = {"rmsnorm": "rms", "layernorm": "layer", "silu": "silu", "gelu_new": "gelu_tanh"}
    assert (c.norm, c.activation) == (kinds[published["norm"]], kinds[published["hidden_act"]])
    assert params.count(c) == published["parameters"]["total"]
    blocks = {path: shape for path, shape in params.shapes(c).items() if path.startswith("blocks/")}
    per_layer = sum(math.prod(shape) for shape in blocks.values()) // c.num_layers
    assert per_layer == published["parameters"]["per_layer"]
    if published.get("rope_scaling") and not c.requires_long_rope:
        assert c.long_rope.original_max_position == published["original_max_position_embeddings"]
    else:
        assert c.long_rope is None


@pytest.mark.parametrize("name", FACTORS)
def test_longrope_lists_equal_the_published(shared, name):
    published = json.loads((shared / "reference/longrope.json").read_text())["models"][FACTORS[name]]
    rope = PRESETS[name].long_rope
    assert list(rope.short_factor) == published["short_factor"]
    assert list(rope.long_factor) == published["long_factor"]
    assert rope.original_max_position == published["original_max_position_embeddings"]


@pytest.mark.parametrize("name", FACTORS)
def test_attention_factor(name):
    for length in (1, 4096, 4097, 131072):
        frequencies, factor = inverse_frequencies(PRESETS[name], length)
        assert factor == pytest.approx(1.1902380714238083, abs=1e-15)
        which = "short_factor" if length <= 4096 else "long_factor"
        divisor = getattr(PRESETS[name].long_rope, which)[7]
        assert frequencies[7] == pytest.approx(1 / (divisor * 10000 ** (14 / 96)), rel=1e-6)
    assert inverse_frequencies(PRESETS["phi3_mini"], 131072)[1] == 1.0


def test_shapes():
    """Rows by D with D last, layers stacked in front, vocabulary padded: medium and phi-4-mini in full."""
    assert params.shapes(PRESETS["phi3_medium"]) == {
        "embedding": (32768, 5120),
        "blocks/attention_norm/scale": (40, 5120),
        "blocks/attention/q": (40, 5120, 5120),
        "blocks/attention/k": (40, 1280, 5120),
        "blocks/attention/v": (40, 1280, 5120),
        "blocks/attention/o": (40, 5120, 5120),
        "blocks/mlp_norm/scale": (40, 5120),
        "blocks/mlp/gate": (40, 17920, 5120),
        "blocks/mlp/up": (40, 17920, 5120),
        "blocks/mlp/down": (40, 17920, 5120),
        "final_norm/scale": (5120,),
        "head": (32768, 5120),
    }
    phi4 = params.shapes(PRESETS["phi4_mini"])
    assert "head" not in phi4
    assert phi4["embedding"] == (200704, 3072)
    assert phi4["blocks/attention/q"] == (32, 3072, 3072) and phi4["blocks/attention/k"] == (32, 1024, 3072)
    assert PRESETS["phi4_mini"].rotary_dim == 96


# --- what a user may say --------------------------------------------------------------------------------------------


def test_a_section_changes_only_what_it_names():
    c = resolve_model(ModelSection(preset="phi3_mini", sliding_window=None, num_layers=2), PRESETS)
    assert (c.sliding_window, c.num_layers, c.head_dim, c.vocab_size) == (None, 2, 96, 32064)
    assert resolve_model(ModelSection(preset="phi3_mini"), PRESETS) == PRESETS["phi3_mini"]


def test_unknown_preset_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"model\.preset='phi3_mnii' is not known.*Nearest: 'phi3_mini'.*llama2_7b"):
        resolve_model(ModelSection(preset="phi3_mnii"), PRESETS)
    with pytest.raises(UserError) as error:
        resolve_model(ModelSection(preset="zzz"), PRESETS)
    assert "Nearest" not in str(error.value)


def test_medium_128k_wants_its_lists(tmp_path):
    section = ModelSection(preset="phi3_medium_128k")
    with pytest.raises(UserError, match=r"(?s)phi3_medium_128k.*only inside its checkpoint.*long_rope_from"):
        resolve_model(section, PRESETS)
    short, long = [1.0 + i / 64 for i in range(64)], [2.0 + i for i in range(64)]
    lists = {"short_factor": short, "long_factor": long}
    spellings = [
        {"original_max_position_embeddings": 4096, "rope_scaling": {"type": "su", **lists}},
        {"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 4096, **lists}},
    ]
    for config in spellings:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(config))
        c = resolve_model(ModelSection(preset="phi3_medium_128k", long_rope_from=str(path)), PRESETS)
        assert list(c.long_rope.short_factor) == short and list(c.long_rope.long_factor) == long
        assert c.long_rope.original_max_position == 4096
        assert params.count(c) == PARAMETERS["phi3_medium_128k"]


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "no such file"),
        ("{", "is not JSON"),
        ("[]", "must hold one object"),
        ('{"rope_scaling": null}', "rope_parameters is missing"),
        ('{"rope_scaling": {"short_factor": [1], "long_factor": [1]}}', "original_max_position_embeddings is missing"),
        (
            '{"original_max_position_embeddings": 64, "rope_scaling": {"short_factor": [1.0], "long_factor": [1.0]}}',
            r"short_factor has 1 entries; rotary_dim / 2 = 64",
        ),
    ],
)
def test_bad_long_rope_file(tmp_path, text, message):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        resolve_model(ModelSection(preset="phi3_medium_128k", long_rope_from=str(path)), PRESETS)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_kv_heads": 4}, r"num_kv_heads=4 does not divide model\.num_heads=6.*1, 2, 3, 6"),
        ({"num_layers": 0}, r"model\.num_layers=0 must be at least 1"),
        ({"vocab_size": -5}, r"model\.vocab_size=-5"),
        ({"head_dim": 31}, r"31 rotated dimensions of 31"),
        ({"partial_rotary_factor": 0.01}, r"0 rotated dimensions of 32"),
        ({"partial_rotary_factor": 1.5}, r"48 rotated dimensions of 32"),
        ({"sliding_window": 0}, r"sliding_window=0"),
        ({"positions": "rope"}, r"model\.positions='rope' must be rotary or learned"),
        ({"norm": 1}, r"model\.norm=1 must be rms or layer"),
        ({"activation": "relu"}, r"model\.activation='relu' must be silu or gelu_tanh"),
        ({"positions": "learned", "head_dim": 32, "long_rope_from": "phi4_mini"}, "learned: nothing rotates"),
    ],
)
def test_bad_numbers_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        resolve_model(ModelSection(preset="tiny", **changes), PRESETS)


def test_head_dimensions_other_than_the_lists_are_refused():
    with pytest.raises(UserError, match=r"short_factor has 48 entries; rotary_dim / 2 = 32"):
        resolve_model(ModelSection(preset="phi3_mini_128k", head_dim=64), PRESETS)


def test_equal_configs_are_one_program():
    """ModelConfig is hashable: it keys caches of compiled programs."""
    assert len({ModelConfig(8, 8, 1, 1, 1, 8, 8, 8), ModelConfig(8, 8, 1, 1, 1, 8, 8, 8)}) == 1
    assert len({hash(c) for c in PRESETS.values()}) == len(PRESETS)
