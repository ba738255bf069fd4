"""config.json as the published checkpoints have it, keys of 2024 and all, is read as the preset of that name."""

import pytest

from phijax.errors import UserError
from phijax.interchange.huggingface import config as huggingface_config
from phijax.interchange.huggingface.families import FAMILIES
from phijax.model.config import ModelConfig
from phijax.model.presets import PRESETS

PHI3_MINI = {
    "_name_or_path": "Phi-3-mini-4k-instruct",
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    },
    "bos_token_id": 1,
    "embd_pdrop": 0.0,
    "eos_token_id": 32000,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "model_type": "phi3",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "pad_token_id": 32000,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.2",
    "use_cache": True,
    "vocab_size": 32064,
}


def long(preset: str, kind: str) -> dict:
    rope = PRESETS[preset].long_rope
    return {
        "max_position_embeddings": 131072,
        "sliding_window": 262144,
        "rope_scaling": {
            "long_factor": list(rope.long_factor),
            "short_factor": list(rope.short_factor),
            "type": kind,
        },
    }


PHI4_MINI = {
    **long("phi4_mini", "longrope"),
    "full_attn_mod": 1,
    "interpolate_factor": 1,
    "lm_head_bias": False,
    "mlp_bias": False,
    "bos_token_id": 199999,
    "eos_token_id": 199999,
    "pad_token_id": 199999,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "partial_rotary_factor": 0.75,
    "tie_word_embeddings": True,
    "vocab_size": 200064,
}
LLAMA2 = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
GPT2 = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}
GPT2_LARGE = {"n_embd": 1280, "n_head": 20, "n_layer": 36, "n_special": 0, "predict_special_tokens": True}
GPT2_XL = {"n_embd": 1600, "n_head": 25, "n_layer": 48, "output_past": True}
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}},
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 49152,
}


@pytest.mark.parametrize(
    "config, preset",
    [
        (PHI3_MINI, "phi3_mini"),
        (PHI3_MINI | long("phi3_mini_128k", "su"), "phi3_mini_128k"),  # April 2024
        (PHI3_MINI | long("phi3_mini_128k", "longrope"), "phi3_mini_128k"),
        (PHI3_MINI | long("phi35_mini", "longrope"), "phi35_mini"),
        (PHI3_MINI | PHI4_MINI, "phi4_mini"),
        (LLAMA2, "llama2_7b"),
        (GPT2, "gpt2"),
        (GPT2 | GPT2_LARGE, "gpt2_large"),
        (GPT2 | GPT2_XL, "gpt2_xl"),
    ],
)
def test_published_configs_are_the_presets(config, preset):
    assert huggingface_config.parse(config, "config.json")[0] == PRESETS[preset]


def test_smollm2():
    expected = ModelConfig(49152, 576, 30, 9, 3, 64, 1536, 8192, rope_theta=100000.0, tied_head=True)
    assert huggingface_config.parse(SMOLLM2, "config.json")[0] == expected


@pytest.mark.parametrize("change", [{"full_attn_mod": 2}, {"interpolate_factor": 2}, {"lm_head_bias": True}])
def test_keys_that_do_nothing_by_their_usual_value_are_refused_with_another(change):
    with pytest.raises(UserError, match=next(iter(change))):
        huggingface_config.parse(PHI3_MINI | PHI4_MINI | change, "config.json")


@pytest.mark.parametrize("preset", [name for name, c in PRESETS.items() if not c.requires_long_rope])
def test_every_preset_can_be_exported_and_read_back(preset):
    family = FAMILIES["gpt2" if preset.startswith("gpt2") else "phi3"]
    written = huggingface_config.render(PRESETS[preset], family, dtype="bfloat16", ids={})
    assert huggingface_config.parse(written, "config.json")[0] == PRESETS[preset]
