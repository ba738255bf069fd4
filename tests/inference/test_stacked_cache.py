"""Generation as TPUs do it, a stack of layers and the kernels' bodies run by the CPU, against the plain programs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick_compilation import QUICK

from phijax.inference import placement
from phijax.inference.generator import Generator
from phijax.inference.sampling import Sampling
from phijax.model import params
from phijax.model.backend import CHOICES, Backend
from phijax.model.config import LongRope, ModelConfig
from phijax.model.kernels.integers_tpu import TpuIntegers
from phijax.model.quantized import Quantized
from phijax.parallel.mesh import MeshConfig, make_mesh
from phijax.planning.topology import has_compiler, tpu_devices
from phijax.quantization import policy
from phijax.quantization.rounding import round_to_nearest

# Matrices that fill registers: all but k and v of the kind that the kernel takes. A window within the answers.
MODEL = ModelConfig(
    vocab_size=1000,
    model_dim=128,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
    ffn_dim=256,
    max_position=512,
    sliding_window=20,
)
PLAIN = Backend(scan_layers=True)  # float32, everything by XLA
GREEDY = Sampling(max_tokens=10, temperature=0.0)
PROMPTS = [[5, 9, 77, 200, 3], list(range(40, 70)), [8]]


@pytest.fixture(scope="module")
def weights() -> params.Params:
    return jax.jit(lambda: params.init(MODEL, 0), compiler_options=QUICK)()


@pytest.fixture(scope="module")
def small_weights(weights) -> params.Params:
    return in_four_bits(MODEL, weights)


def in_four_bits(model: ModelConfig, weights: params.Params) -> params.Params:
    """In groups of 64."""
    out = params.flat(weights)
    for path, scheme in policy.assign(model, policy.parse("int4_g64")).items():
        stack = np.asarray(out[path])
        matrices = stack if stack.ndim == 3 else stack[None]
        rounded = [round_to_nearest(m, scheme, policy.summed_axis(path)) for m in matrices]
        values, scales = (np.stack([np.asarray(getattr(r, name)) for r in rounded]) for name in ("values", "scales"))
        if stack.ndim == 2:
            values, scales = values[0], scales[0]
        out[path] = Quantized(jnp.asarray(values.astype(jnp.int4)), jnp.asarray(scales))
    return params.nested(out)


def as_on_tpu(monkeypatch, weights, *, tensor: int = 1, model: ModelConfig = MODEL, **changes) -> Generator:
    """A generator with the layout that a TPU's mesh gets."""
    chosen = placement.choose_layout

    def choose(c, backend, mesh, *rest, **named):
        layout = chosen(c, backend, mesh, *rest, **named)
        mesh = mesh if mesh.size > 1 else None
        return dataclasses.replace(layout, stacked=True, least_rows=8, interpret=True, mesh=mesh, **changes)

    monkeypatch.setattr(placement, "choose_layout", choose)
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=tensor), jax.devices()[:tensor])
    return Generator(model, weights, None, PLAIN, mesh)


def assert_same(got, expected, close: float):
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.tokens == theirs.tokens
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, rtol=0, atol=close)


@pytest.mark.parametrize("tensor", [1, 2])
def test_floats(monkeypatch, weights, tensor):
    """One row of a prompt that is longer than the window and one that is a token long; batches of 1 and 3."""
    plain = Generator(MODEL, weights, None, PLAIN)
    expected = plain.generate(PROMPTS, GREEDY)
    fast = as_on_tpu(monkeypatch, weights, tensor=tensor)
    # float32 sums in another order.
    assert_same(fast.generate(PROMPTS, GREEDY), expected, 2e-5)
    assert_same(fast.generate(PROMPTS[1:2], GREEDY), expected[1:2], 2e-5)
    np.testing.assert_allclose(fast.logits(PROMPTS[1]), plain.logits(PROMPTS[1]), rtol=0, atol=5e-5)


@pytest.mark.parametrize("tensor", [1, 2])
def test_groups_by_the_kernel(monkeypatch, small_weights, tensor):
    expected = Generator(MODEL, small_weights, None, PLAIN).generate(PROMPTS, GREEDY)
    fast = as_on_tpu(monkeypatch, small_weights, tensor=tensor)
    formats = {path: type(leaf) for path, leaf in params.flat(fast._weights).items() if not isinstance(leaf, jax.Array)}
    whole = {"blocks/attention/q", "blocks/attention/o", "blocks/mlp/gate", "blocks/mlp/up", "blocks/mlp/down", "head"}
    kv = {"blocks/attention/k", "blocks/attention/v"}
    assert {path for path, kind in formats.items() if kind is TpuIntegers} == (whole | kv if tensor == 1 else whole)
    assert formats["embedding"] is Quantized  # it is only looked up
    assert_same(fast.generate(PROMPTS, GREEDY), expected, 2e-5)


@pytest.mark.slow
def test_biases_layer_norm_and_no_gate(monkeypatch):
    """GPT-2's layers around the kernels' products; no rotation before attention."""
    kinds = {"positions": "learned", "norm": "layer", "bias": True, "activation": "gelu_tanh", "gated": False}
    model = dataclasses.replace(MODEL, tied_head=True, sliding_window=None, **kinds)
    rng = np.random.default_rng(0)
    drawn = {
        path: jnp.asarray(rng.standard_normal(shape, np.float32) * (0.3 if "/" in path else 1) * shape[-1] ** -0.5)
        for path, shape in params.shapes(model).items()
    }
    weights = in_four_bits(model, params.nested({p: a + 1 if p.endswith("scale") else a for p, a in drawn.items()}))
    expected = Generator(model, weights, None, PLAIN).generate(PROMPTS, GREEDY)
    assert len({token for answer in expected for token in answer.tokens}) > 3
    fast = as_on_tpu(monkeypatch, weights, tensor=2, model=model)
    assert isinstance(fast._weights["blocks"]["mlp"]["up"], TpuIntegers)
    assert_same(fast.generate(PROMPTS, GREEDY), expected, 2e-5)


def test_eight_devices_give_what_one_does(small_weights):
    """By XLA alone: rows of matrices over eight devices, the four heads of keys over none of them, places over all."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=8), jax.devices())
    cut = Generator(MODEL, small_weights, None, PLAIN, mesh)
    assert cut._weights["blocks"]["mlp"]["down"].values.sharding.shard_shape((2, 256, 128)) == (2, 32, 128)
    assert_same(
        cut.generate(PROMPTS, GREEDY), Generator(MODEL, small_weights, None, PLAIN).generate(PROMPTS, GREEDY), 1e-5
    )


def test_the_long_list_takes_over(monkeypatch, weights):
    """LongRoPE's switch computes the cache anew, in the stack as in the plain programs."""
    half = MODEL.head_dim // 2
    long_rope = LongRope(
        short_factor=tuple(1 + 0.01 * i for i in range(half)),
        long_factor=tuple(1.5 + 0.1 * i for i in range(half)),
        original_max_position=16,
    )
    model = dataclasses.replace(MODEL, long_rope=long_rope)
    expected = Generator(model, weights, None, PLAIN).generate(PROMPTS, GREEDY)
    assert_same(as_on_tpu(monkeypatch, weights, model=model).generate(PROMPTS, GREEDY), expected, 2e-5)


@pytest.mark.skipif(not has_compiler(), reason="libtpu is not installed: there are no TPUs to make a mesh of")
def test_a_tpu_gets_this_layout():
    chips = tpu_devices("v5e:2x2")
    layout = placement.choose_layout(MODEL, CHOICES["tpu"], make_mesh(MeshConfig(), chips[:1]))
    assert layout.stacked and layout.least_rows == 8 and not layout.interpret and layout.mesh is None
    two = make_mesh(MeshConfig(data=1, fsdp=1, tensor=2), chips[:2])
    assert placement.choose_layout(MODEL, CHOICES["tpu"], two).mesh is two
    odd = dataclasses.replace(MODEL, num_heads=9, num_kv_heads=3)  # cut by time, by XLA
    assert not placement.choose_layout(odd, CHOICES["tpu"], two).stacked
    on_cpu = placement.choose_layout(MODEL, CHOICES["cpu"], make_mesh(MeshConfig(), jax.devices()[:1]))
    assert not on_cpu.stacked and on_cpu.least_rows == 2
