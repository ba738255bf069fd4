"""Tiny models of transformers, saved by transformers, and what lies in a folder bit by bit."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from gpt2_case import GPT2_SMALL

from phijax.model.config import LongRope, ModelConfig

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors")

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

L0 = 16
PHI3 = ModelConfig(
    vocab_size=300,  # padded to 1024
    model_dim=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    ffn_dim=48,
    max_position=64,
)
WINDOW = dataclasses.replace(PHI3, sliding_window=5)
LONG = dataclasses.replace(
    PHI3,
    long_rope=LongRope(
        short_factor=tuple(1.0 + 0.05 * i for i in range(8)),
        long_factor=tuple(1.5 + 0.9 * i for i in range(8)),
        original_max_position=L0,
    ),
)
# As phi-4-mini: a part of each head rotates, one matrix for embedding and head.
PARTIAL = dataclasses.replace(
    LONG,
    partial_rotary_factor=0.75,
    tied_head=True,
    long_rope=LongRope((1.0,) * 6, tuple(1.0 + 3.0 * i for i in range(6)), original_max_position=L0),
)
LLAMA = dataclasses.replace(PHI3, norm_eps=1e-6, rope_theta=500.0)
# As SmolLM2, with heads that are wider than their share.
TIED = dataclasses.replace(LLAMA, num_kv_heads=1, head_dim=20, tied_head=True)

MODELS: dict[str, tuple[ModelConfig, str]] = {
    "phi3": (PHI3, "Phi3ForCausalLM"),
    "window": (WINDOW, "Phi3ForCausalLM"),
    "longrope": (LONG, "Phi3ForCausalLM"),
    "partial": (PARTIAL, "Phi3ForCausalLM"),
    "llama": (LLAMA, "LlamaForCausalLM"),
    "tied": (TIED, "LlamaForCausalLM"),
    "mistral": (WINDOW, "MistralForCausalLM"),
    "gpt2": (GPT2_SMALL, "GPT2LMHeadModel"),
}


def their_config(c: ModelConfig, class_name: str):
    """transformers' config, by its own keys of today."""
    kind = class_name.removesuffix("ForCausalLM")
    ids = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": [7, 2]}
    if c.positions == "learned":
        return transformers.GPT2Config(
            vocab_size=c.vocab_size,
            n_positions=c.max_position,
            n_embd=c.model_dim,
            n_layer=c.num_layers,
            n_head=c.num_heads,
            n_inner=c.ffn_dim,
            layer_norm_epsilon=c.norm_eps,
            tie_word_embeddings=c.tied_head,
            **ids,
        )
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": c.rope_theta}
    keys: dict[str, Any] = {}
    if c.long_rope:
        lists = {name: list(getattr(c.long_rope, name)) for name in ("short_factor", "long_factor")}
        rope |= {"rope_type": "longrope", **lists}
    if kind == "Phi3":
        rope["partial_rotary_factor"] = c.partial_rotary_factor
        original = c.long_rope.original_max_position if c.long_rope else c.max_position
        keys = {"original_max_position_embeddings": original, "sliding_window": c.sliding_window}
    elif kind == "Mistral":
        keys = {"head_dim": c.head_dim, "sliding_window": c.sliding_window}
    else:
        keys = {"head_dim": c.head_dim}
    return getattr(transformers, f"{kind}Config")(
        vocab_size=c.vocab_size,
        hidden_size=c.model_dim,
        intermediate_size=c.ffn_dim,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        max_position_embeddings=c.max_position,
        rms_norm_eps=c.norm_eps,
        tie_word_embeddings=c.tied_head,
        rope_parameters=rope,
        **ids,
        **keys,
    )


def make(c: ModelConfig, class_name: str, dtype: str = "float32"):
    """A model with normal matrices of unit gain, factors of norms around one, and biases away from zero."""
    model = getattr(transformers, class_name)(their_config(c, class_name))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            mean = 0.0 if name.endswith("bias") else 1.0
            weight.copy_(mean + 0.2 * noise if weight.ndim == 1 else noise * weight.shape[1] ** -0.5)
    return model.to(getattr(torch, dtype)).eval()


class Saved:
    """Folders written by transformers, each made once a session."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder

    @functools.cache  # noqa: B019
    def __call__(self, name: str, dtype: str = "float32", shard: str = "5GB") -> pathlib.Path:
        folder = self._folder / f"{name}-{dtype}-{shard}"
        make(*MODELS[name], dtype).save_pretrained(folder, max_shard_size=shard)
        return folder


def tensors(folder: pathlib.Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Name -> dtype, shape, bytes of every tensor, read by the safetensors package."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(file, "pt") as opened:
            for name in opened.keys():
                tensor = opened.get_tensor(name)
                found[name] = (str(tensor.dtype), tuple(tensor.shape), tensor.view(torch.uint8).numpy().tobytes())
    return found


def their_logits(folder: pathlib.Path, tokens: np.ndarray) -> np.ndarray:
    """(B, T) -> (B, T, V), by from_pretrained of an unedited folder, in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long), use_cache=False).logits.numpy()


def edit(path: pathlib.Path, change: Callable[[dict], Any]) -> None:
    """Changes a JSON file in place."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
