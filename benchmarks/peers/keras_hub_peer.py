"""KerasHub's logits, on JAX: python keras_hub_peer.py FOLDER, in its own environment (see exchange.py for the folder).

KerasHub reads Llama folders itself. It has no reader for phi-3 folders, so the weights are laid into its Phi3CausalLM
here, name by name.
"""

import os

os.environ["KERAS_BACKEND"] = "jax"
os.environ["JAX_PLATFORMS"] = "cpu"

import json
import pathlib

import keras
import keras_hub
import numpy as np
from exchange import Case, NotPossible, serve
from safetensors.numpy import load_file

keras.config.set_dtype_policy("float32")


def load(folder: str):
    """The model. KerasHub's reader of Llama leaves out the norms' epsilon, so that is given beside the folder."""
    config = json.loads((pathlib.Path(folder) / "config.json").read_text())
    if config["model_type"] == "llama":
        epsilon = config["rms_norm_eps"]
        backbone = keras_hub.models.Backbone.from_preset(folder, dtype="float32", layer_norm_epsilon=epsilon)
        return keras_hub.models.Llama3CausalLM(backbone)
    rope = config["rope_parameters"]
    if config["sliding_window"] is not None:
        raise NotPossible("its phi-3 has no sliding window")
    if rope["partial_rotary_factor"] != 1:
        raise NotPossible("its phi-3 rotates whole heads only")
    scaling = {}
    if rope["rope_type"] == "longrope":
        scaling = {"rope_scaling_type": "su", "pretraining_sequence_length": config["original_max_position_embeddings"]}
        scaling |= {f"rope_scaling_{length}_factor": rope[f"{length}_factor"] for length in ("short", "long")}
    backbone = keras_hub.models.Phi3Backbone(
        vocabulary_size=config["vocab_size"],
        num_layers=config["num_hidden_layers"],
        hidden_dim=config["hidden_size"],
        intermediate_dim=config["intermediate_size"],
        num_query_heads=config["num_attention_heads"],
        num_key_value_heads=config["num_key_value_heads"],
        layer_norm_epsilon=config["rms_norm_eps"],
        max_sequence_length=config["max_position_embeddings"],
        rope_max_wavelength=rope["rope_theta"],
        **scaling,
    )
    fill(backbone, load_file(pathlib.Path(folder) / "model.safetensors"))
    return keras_hub.models.Phi3CausalLM(backbone)


def fill(backbone, weights: dict[str, np.ndarray]) -> None:
    """Hugging Face's (out, in) matrices into Keras' (in, out), fused ones cut, heads on an axis of their own."""
    embeddings = weights["model.embed_tokens.weight"]
    backbone.token_embedding.embeddings.assign(embeddings)
    backbone.token_embedding.reverse_embeddings.assign(weights["lm_head.weight"].T)
    backbone.layer_norm.scale.assign(weights["model.norm.weight"])
    heads, pairs = backbone.num_query_heads, backbone.num_key_value_heads
    d = backbone.hidden_dim
    for number, layer in enumerate(backbone.transformer_layers):
        start, end = f"model.layers.{number}.", ".weight"
        of = {name.removeprefix(start).removesuffix(end): w for name, w in weights.items() if name.startswith(start)}
        query, key, value = np.split(of["self_attn.qkv_proj"], [d, d + pairs * d // heads])
        gate, up = np.split(of["mlp.gate_up_proj"], 2)
        layer.pre_attention_layernorm.scale.assign(of["input_layernorm"])
        layer.post_attention_layernorm.scale.assign(of["post_attention_layernorm"])
        layer.attention.query_dense.kernel.assign(query.T.reshape(d, heads, -1))
        layer.attention.key_dense.kernel.assign(key.T.reshape(d, pairs, -1))
        layer.attention.value_dense.kernel.assign(value.T.reshape(d, pairs, -1))
        layer.attention.output_dense.kernel.assign(of["self_attn.o_proj"].T.reshape(heads, -1, d))
        layer.feedforward_gate_dense.kernel.assign(gate.T)
        layer.feedforward_intermediate_dense.kernel.assign(up.T)
        layer.feedforward_output_dense.kernel.assign(of["mlp.down_proj"].T)


def text(model, case: Case) -> np.ndarray:
    ids = case.ids()
    return np.asarray(model({"token_ids": ids, "padding_mask": np.ones_like(ids)})[0])


def row(model, case: Case) -> np.ndarray:
    raise NotPossible("its models take no segments and no positions")


def decode(model, case: Case) -> np.ndarray:
    """What its `generate_step` does, with the given tokens: the prompt padded to full length, then token by token."""
    ids = case.ids()
    padded = ids.copy()
    padded[:, case.start :] = 0
    _, cache = model._build_cache(padded)
    rows = []
    for index in range(case.start - 1, len(case.tokens) - 1):
        logits, _, cache = model.call_with_cache(ids[:, index : index + 1], cache, index)
        rows.append(np.asarray(logits[0, 0]))
    return np.stack(rows)


serve(load, {"text": text, "row": row, "decode": decode})
