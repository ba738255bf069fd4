"""A model of one layer by every path that computes it: the reference, training, generation, calibration."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phijax.inference.generator import Generator
from phijax.inference.sampling import Sampling
from phijax.model import cached, params
from phijax.model.backend import CHOICES
from phijax.model.cached_ops import CachedOps
from phijax.model.config import ModelConfig
from phijax.model.inference_layout import InferenceLayout
from phijax.model.kernels import cpu_int4, cpu_int4_library
from phijax.model.ops import Ops
from phijax.model.quantized import Quantized
from phijax.model.rope import inverse_frequencies, rope_table
from phijax.model.vocabulary import with_positions
from phijax.quantization import calibrate, policy
from phijax.quantization.rounding import round_to_nearest

needs_compiler = pytest.mark.skipif(cpu_int4_library.loaded() is None, reason="no C++ compiler here")
TOKENS = np.random.default_rng(0).integers(0, 600, 17)


def weights(c: ModelConfig) -> dict[str, np.ndarray]:
    """Leaf path -> values; norms too are away from their start."""
    rng = np.random.default_rng(1)
    flat = {}
    for path, shape in params.shapes(c).items():
        noise = rng.standard_normal(shape, np.float32)
        small = 0.3 * noise if path.endswith(("scale", "bias")) else 2 * noise * shape[-1] ** -0.5
        flat[path] = 1 + small if path.endswith("scale") else small
    return flat


def stored(c: ModelConfig) -> dict[str, np.ndarray | Quantized]:
    """The same in four bits."""
    flat = weights(c)
    for path, scheme in policy.assign(c, policy.parse("int4_g32")).items():
        axis, matrix = policy.summed_axis(path), flat[path]
        rounded = round_to_nearest(matrix[0] if matrix.ndim == 3 else matrix, scheme, axis)
        values, scales = rounded.values.astype(jnp.int4), rounded.scales
        flat[path] = Quantized(values[None], scales[None]) if matrix.ndim == 3 else Quantized(values, scales)
    return flat


def evaluated(c: ModelConfig, flat: dict, tokens: np.ndarray = TOKENS) -> np.ndarray:
    """Logits (T, V) by the reference: every term by itself, of the same numbers in float32."""
    flat = {path: leaf.dequantize() if isinstance(leaf, Quantized) else leaf for path, leaf in flat.items()}
    layer = {path: leaf[0] if path.startswith("blocks/") else leaf for path, leaf in flat.items()}
    model = params.module(c, params.nested(layer))
    places = jnp.arange(len(tokens))[None]
    rope = rope_table(c, places, *inverse_frequencies(c, len(tokens)), jnp.float32, by_matmul=False)
    x = jnp.asarray(flat["embedding"])[tokens][None]
    x = x if model.position_embedding is None else with_positions(x, model.position_embedding, places)
    x, _ = model.blocks(x, None, Ops(c, rope))
    return np.asarray(model.logits(model.final_norm(x)))[0]


def trained(c: ModelConfig) -> np.ndarray:
    """By the forward pass of training, as a CPU computes it."""
    model = params.module(c, params.nested(weights(c)))
    rows = TOKENS[None], np.arange(len(TOKENS))[None], np.ones((1, len(TOKENS)), np.int32)
    return np.asarray(model.logits(model.hidden(*rows, CHOICES["cpu"], length=len(TOKENS))))[0]


def generated(c: ModelConfig, flat: dict) -> tuple[np.ndarray, np.ndarray]:
    """Logits (2, V) after a prompt and after one decoding step, and the reference's."""
    sampling = Sampling(temperature=0, max_tokens=2)
    pieces = list(Generator(c, params.nested(flat)).stream([TOKENS.tolist()], sampling, with_logits=True))
    expected = evaluated(c, flat, np.array([*TOKENS, pieces[0].token]))[-2:]
    return np.stack([piece.logits for piece in pieces])[:, : c.vocab_size], expected


def calibrated(c: ModelConfig) -> np.ndarray:
    flat = weights(c)
    *_, (_, _, inputs, x) = calibrate.layers(c, lambda path, part: flat[path][part], TOKENS[None])
    assert {name: value.shape[-1] for name, value in inputs._asdict().items()} == {
        "qkv": c.model_dim,
        "o": c.num_heads * c.head_dim,
        "gate_up": c.model_dim,
        "down": c.ffn_dim,
    }
    into_head = calibrate.final_norm(c, lambda path, part: flat[path][part], x)
    return np.asarray(params.module(c, params.nested(flat)).logits(into_head))[0]


def tiled_block(c: ModelConfig):
    """A block whose matrices are in the kernel's form, its ops for one new token of each of four rows, and a cache."""
    path = cpu_int4_library.path()
    layer = {}
    for name, leaf in stored(c).items():
        if name.startswith("blocks/"):
            leaf = jax.tree.map(lambda a: a[0], leaf)
            layer[name] = cpu_int4.tiled(leaf, path) if isinstance(leaf, Quantized) else jnp.asarray(leaf)
    positions = jnp.array([[0], [7], [30], [63]], jnp.int32)
    rope = rope_table(c, positions, *inverse_frequencies(c, 64), jnp.float32, by_matmul=False)
    layout = InferenceLayout(unrolled=True, transposed=True)
    ops = CachedOps(c, layout, rope, positions, jnp.int32(4))
    rng = np.random.default_rng(3)
    cache = jax.tree.map(
        lambda a: jnp.asarray(rng.standard_normal(a.shape), a.dtype), cached.empty_cache(c, layout, 4, (64,))[0]
    )
    return params.module_with(c, layer).blocks, ops, cache


def called(function, *arguments) -> set[str]:
    """Functions of the C++ kernel in a program."""
    text = jax.jit(function).lower(*arguments).as_text()
    return set(re.findall(r"custom_call @(\w+)", text))


def close(got: jax.Array, expected: jax.Array) -> None:
    # The same rounded activations but where float32's last bit sends one to the other side: measured 1e-6 and less.
    np.testing.assert_allclose(got, expected, rtol=0, atol=0.01 * np.std(expected))
