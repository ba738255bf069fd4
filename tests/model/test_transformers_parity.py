"""Logits and gradients against transformers' Phi3, Llama and GPT2 models, the same random weights in both.

Weights are handed over in memory. Both sides compute in float32; what remains is the order of sums, a few 1e-6 of
logits of size 3. A wrong rotation, factor, window or head moves them by 1e-2 and more.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from gpt2_case import GPT2_SMALL, leaves_of_gpt2, transformers_gpt2
from small_models import SMALL, Rows, assert_leaves_close, pack, random_documents, run

from phijax.model import params as parameters
from phijax.model.backend import CHOICES, Backend
from phijax.model.config import LongRope, ModelConfig
from phijax.model.presets import PRESETS

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

torch.set_num_threads(1)  # models this small lose time to a second thread

LOGITS = 1e-4  # the promise; measured 2e-6 to 6e-6
GRADIENTS = 5e-5  # of the largest entry of a leaf; measured up to 1e-5: sums over all tokens in another order

PLAIN = Backend()

# 48: no power of two. Heads times head_dim is the width, as transformers' check of LongRoPE lists assumes.
GROUPED = dataclasses.replace(SMALL, vocab_size=300, model_dim=192, num_heads=4, num_kv_heads=2, head_dim=48)
L0 = 16
LONG = dataclasses.replace(
    GROUPED,
    model_dim=96,
    num_heads=2,
    num_kv_heads=1,
    max_position=4 * L0,  # attention factor sqrt(1 + ln 4 / ln 16) = 1.22
    long_rope=LongRope(
        short_factor=tuple(1.0 + 0.05 * i for i in range(24)),
        long_factor=tuple(1.5 + 0.9 * i for i in range(24)),
        original_max_position=L0,
    ),
)
PARTIAL = dataclasses.replace(
    LONG,
    head_dim=32,
    num_heads=3,
    num_kv_heads=1,
    partial_rotary_factor=0.75,
    tied_head=True,
    long_rope=LongRope(
        short_factor=(1.0,) * 12, long_factor=tuple(1.0 + 3.0 * i for i in range(12)), original_max_position=L0
    ),
)


def phi3(c: ModelConfig):
    rope = {"rope_type": "default", "rope_theta": c.rope_theta, "partial_rotary_factor": c.partial_rotary_factor}
    if c.long_rope:
        rope |= {
            "rope_type": "longrope",
            "short_factor": list(c.long_rope.short_factor),
            "long_factor": list(c.long_rope.long_factor),
        }
    config = transformers.Phi3Config(
        **common(c),
        sliding_window=c.sliding_window,
        rope_parameters=rope,
        original_max_position_embeddings=c.long_rope.original_max_position if c.long_rope else c.max_position,
    )
    return randomised(transformers.Phi3ForCausalLM(config))


def llama(c: ModelConfig):
    config = transformers.LlamaConfig(
        **common(c), head_dim=c.head_dim, rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}
    )
    return randomised(transformers.LlamaForCausalLM(config))


def common(c: ModelConfig) -> dict:
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.model_dim,
        "intermediate_size": c.ffn_dim,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "max_position_embeddings": c.max_position,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tied_head,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": "eager",
    }


def randomised(model):
    """Normal matrices of unit gain, factors of norms around one: nothing small enough to hide a mistake."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.2 * noise if weight.ndim == 1 else noise * weight.shape[1] ** -0.5)
    return model.eval()


def ours(c: ModelConfig, tensors: dict[str, "torch.Tensor"]) -> dict[str, np.ndarray]:
    """transformers' names and layouts -> our leaves; weights and gradients alike."""
    arrays = {name.removeprefix("model."): tensor.detach().numpy() for name, tensor in tensors.items()}
    rows, kv_rows = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    layers: dict[str, list[np.ndarray]] = {}
    for i in range(c.num_layers):
        layer = {n.removeprefix(f"layers.{i}."): a for n, a in arrays.items() if n.startswith(f"layers.{i}.")}
        if "self_attn.qkv_proj.weight" in layer:  # Phi3: fused by rows
            q, k, v = np.split(layer["self_attn.qkv_proj.weight"], [rows, rows + kv_rows])
            gate, up = np.split(layer["mlp.gate_up_proj.weight"], 2)
        else:
            q, k, v = (layer[f"self_attn.{name}_proj.weight"] for name in "qkv")
            gate, up = (layer[f"mlp.{name}_proj.weight"] for name in ("gate", "up"))
        leaves = {
            "attention/q": q,
            "attention/k": k,
            "attention/v": v,
            "attention/o": layer["self_attn.o_proj.weight"].T,
            "attention_norm/scale": layer["input_layernorm.weight"],
            "mlp/gate": gate,
            "mlp/up": up,
            "mlp/down": layer["mlp.down_proj.weight"].T,
            "mlp_norm/scale": layer["post_attention_layernorm.weight"],
        }
        for path, array in leaves.items():
            layers.setdefault(f"blocks/{path}", []).append(array)
    flat = {path: np.stack(arrays) for path, arrays in layers.items()}
    surplus = ((0, c.padded_vocab_size - c.vocab_size), (0, 0))
    flat |= {"embedding": np.pad(arrays["embed_tokens.weight"], surplus), "final_norm/scale": arrays["norm.weight"]}
    if not c.tied_head:
        flat["head"] = np.pad(arrays["lm_head.weight"], surplus)
    return flat


def theirs(model, rows: Rows):
    """Each document alone, positions from 0: (summed loss, [logits a document], gradients by name)."""
    model.zero_grad()
    total, logits = 0.0, []
    for b in range(rows.tokens.shape[0]):
        for segment in range(1, rows.segment_ids[b].max() + 1):
            where = rows.segment_ids[b] == segment
            tokens, targets = (torch.tensor(a[b, where], dtype=torch.long)[None] for a in (rows.tokens, rows.targets))
            out = model(tokens, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(out[0], targets[0], reduction="sum")
            loss.backward()
            total += loss.item()
            logits.append(out[0].detach().numpy())
    return total, logits, {name: weight.grad for name, weight in model.named_parameters()}


def compare(c: ModelConfig, model, rows: Rows, backend: Backend = PLAIN, length: int | None = None, ours=ours):
    flat = ours(c, dict(model.named_parameters()))
    assert {path: array.shape for path, array in flat.items()} == parameters.shapes(c)
    params = parameters.nested({path: jnp.asarray(array) for path, array in flat.items()})
    (loss, logits), gradients = run(c, backend, params, rows, length)
    expected, expected_logits, expected_gradients = theirs(model, rows)
    documents = (
        logits[b, rows.segment_ids[b] == segment]
        for b in range(rows.tokens.shape[0])
        for segment in range(1, rows.segment_ids[b].max() + 1)
    )
    for got, reference in zip(documents, expected_logits, strict=True):
        assert np.abs(reference).max() > 1  # logits of a size that shows mistakes
        np.testing.assert_allclose(got, reference, rtol=0, atol=LOGITS)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    expected_gradients = ours(c, expected_gradients)
    if "blocks/attention/k_bias" in gradients:  # adds the same to all scores of a query: both have only rounding
        largest = GRADIENTS * np.abs(expected_gradients["blocks/attention/q_bias"]).max()
        for leaves in (gradients, expected_gradients):
            assert np.abs(leaves.pop("blocks/attention/k_bias")).max() < largest
    assert_leaves_close(gradients, expected_gradients, relative=GRADIENTS)


def whole_rows(c: ModelConfig, length: int, batch: int = 2) -> Rows:
    return pack([random_documents(c, length + 1, seed=b) for b in range(batch)], length)


@pytest.mark.parametrize("window", [None, 5])
def test_phi3_grouped_heads_and_window(window):
    c = dataclasses.replace(GROUPED, sliding_window=window)
    compare(c, phi3(c), whole_rows(c, 20))


def test_llama():
    c = dataclasses.replace(GROUPED, model_dim=64, norm_eps=1e-6, rope_theta=500.0)
    compare(c, llama(c), whole_rows(c, 20))


def test_llama_has_more_heads_than_kv_heads_and_tied_head():
    c = dataclasses.replace(GROUPED, num_kv_heads=1, head_dim=20, model_dim=64, tied_head=True)
    compare(c, llama(c), whole_rows(c, 20))


@pytest.mark.parametrize("length", [L0 - 1, L0, L0 + 1, 2 * L0])
def test_longrope_below_at_and_above_the_switch(length):
    compare(LONG, phi3(LONG), whole_rows(LONG, length))


@pytest.mark.parametrize("length", [L0, L0 + 1])
def test_partial_rotary_with_tied_head(length):
    """phi-4-mini's shape: 24 of 32 dimensions rotate, short list of ones, one matrix for embedding and head."""
    compare(PARTIAL, phi3(PARTIAL), whole_rows(PARTIAL, length))
    compare(PARTIAL, phi3(PARTIAL), whole_rows(PARTIAL, length), Backend(rope_by_matmul=True))


@pytest.mark.parametrize("backend", [CHOICES["cpu"], Backend(remat="save_all")], ids=["cpu", "scanned"])
def test_packed_rows_equal_separate_calls(backend):
    """Documents of a packed row against one call a document: positions restart, the window stays inside."""
    c = dataclasses.replace(GROUPED, sliding_window=7)
    rows = pack([random_documents(c, 31, 12, 24), random_documents(c, 5, 50, seed=1)], 70)
    compare(c, phi3(c), rows, backend)


def test_packed_rows_take_the_list_of_the_declared_length():
    """A program declared for more than L0 rotates short documents by the long list too: one list for a program.

    transformers picks by each call's length, so it is given the long list twice.
    """
    both_long = dataclasses.replace(LONG.long_rope, short_factor=LONG.long_rope.long_factor)
    rows = pack([random_documents(LONG, 9, 15), random_documents(LONG, 12, seed=1)], 2 * L0)
    reference = phi3(dataclasses.replace(LONG, long_rope=both_long))
    compare(LONG, reference, rows)
    with pytest.raises(AssertionError):  # declared for L0 tokens it is another function
        compare(LONG, reference, rows, length=L0)


@pytest.mark.parametrize("name", ["gpt2", "gpt2_medium", "gpt2_large", "gpt2_xl"])
def test_gpt2_presets_have_as_many_parameters(name):
    c = PRESETS[name]
    with torch.device("meta"):
        config = transformers.GPT2Config(n_embd=c.model_dim, n_layer=c.num_layers, n_head=c.num_heads)
        assert transformers.GPT2LMHeadModel(config).num_parameters() == parameters.count(c)


GPT2_BACKENDS = {
    "cpu": CHOICES["cpu"],
    "scanned": Backend(remat="save_all"),
    "full": Backend(remat="full"),
    "save_mid_gate_up": Backend(remat="save_mid_gate_up", scan_layers=False),
}


@pytest.mark.parametrize(
    "backend", [name if name == "scanned" else pytest.param(name, marks=pytest.mark.slow) for name in GPT2_BACKENDS]
)
def test_gpt2_packed_rows(backend):
    """Learned positions restart in each document; every leaf, biases among them, has transformers' gradient."""
    rows = pack([random_documents(GPT2_SMALL, 19, 12), random_documents(GPT2_SMALL, 5, 28, seed=1)], 33)
    compare(GPT2_SMALL, transformers_gpt2(GPT2_SMALL), rows, GPT2_BACKENDS[backend], ours=leaves_of_gpt2)


def test_gpt2_at_its_last_position():
    compare(GPT2_SMALL, transformers_gpt2(GPT2_SMALL), whole_rows(GPT2_SMALL, 40), ours=leaves_of_gpt2)
