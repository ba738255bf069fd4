"""A small GPT-2 of which every size is distinct, and transformers' weights of it as our leaves."""

import numpy as np

from phijax.model.config import ModelConfig

GPT2_SMALL = ModelConfig(
    vocab_size=307,  # padded to 1024
    model_dim=60,
    num_layers=3,
    num_heads=5,
    num_kv_heads=5,
    head_dim=12,
    ffn_dim=144,
    max_position=40,
    tied_head=True,
    norm_eps=2e-5,
    positions="learned",
    norm="layer",
    bias=True,
    activation="gelu_tanh",
    gated=False,
)


def transformers_gpt2(c: ModelConfig):
    """GPT2LMHeadModel of the same shape, all of its weights random: biases and norms too are away from their start."""
    import torch
    import transformers

    config = transformers.GPT2Config(
        vocab_size=c.vocab_size,
        n_positions=c.max_position,
        n_embd=c.model_dim,
        n_layer=c.num_layers,
        n_head=c.num_heads,
        n_inner=c.ffn_dim,
        activation_function="gelu_new",
        layer_norm_epsilon=c.norm_eps,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
    )
    model, generator = transformers.GPT2LMHeadModel(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            is_norm = weight.ndim == 1 and ".ln_" in name and name.endswith("weight")
            fan_in = c.model_dim if name.endswith(("wte.weight", "wpe.weight")) else weight.shape[0]
            small = 0.3 * noise if weight.ndim == 1 else noise * fan_in**-0.5
            weight.copy_(1 + small if is_norm else small)
    return model.eval()


def leaves_of_gpt2(c: ModelConfig, tensors: dict) -> dict[str, np.ndarray]:
    """transformers' names and layouts -> our leaves; weights and gradients alike.

    Conv1D holds [in, out]: q, k and v side by side, all of what `project` contracts transposed.
    """
    arrays = {n.removeprefix("transformer."): tensor.detach().numpy() for n, tensor in tensors.items()}
    layers: dict[str, list[np.ndarray]] = {}
    for i in range(c.num_layers):
        of = {n.removeprefix(f"h.{i}."): array for n, array in arrays.items() if n.startswith(f"h.{i}.")}
        q, k, v = np.split(of["attn.c_attn.weight"], 3, axis=1)
        q_bias, k_bias, v_bias = np.split(of["attn.c_attn.bias"], 3)
        leaves = {
            "attention/q": q.T,
            "attention/k": k.T,
            "attention/v": v.T,
            "attention/o": of["attn.c_proj.weight"],
            "attention/q_bias": q_bias,
            "attention/k_bias": k_bias,
            "attention/v_bias": v_bias,
            "attention/o_bias": of["attn.c_proj.bias"],
            "attention_norm/scale": of["ln_1.weight"],
            "attention_norm/bias": of["ln_1.bias"],
            "mlp/up": of["mlp.c_fc.weight"].T,
            "mlp/down": of["mlp.c_proj.weight"],
            "mlp/up_bias": of["mlp.c_fc.bias"],
            "mlp/down_bias": of["mlp.c_proj.bias"],
            "mlp_norm/scale": of["ln_2.weight"],
            "mlp_norm/bias": of["ln_2.bias"],
        }
        for path, array in leaves.items():
            layers.setdefault(f"blocks/{path}", []).append(array)
    flat = {path: np.stack(arrays) for path, arrays in layers.items()}
    surplus = ((0, c.padded_vocab_size - c.vocab_size), (0, 0))
    return flat | {
        "embedding": np.pad(arrays["wte.weight"], surplus),
        "position_embedding": arrays["wpe.weight"],
        "final_norm/scale": arrays["ln_f.weight"],
        "final_norm/bias": arrays["ln_f.bias"],
    }
