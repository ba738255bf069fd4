"""Keys and values in eight bits: what it costs, what it saves, and that it is the same cut over chips."""

import dataclasses

import jax
import numpy as np
import pytest
from quick_compilation import QUICK

from phijax.inference.generator import Generator
from phijax.inference.sampling import Sampling
from phijax.model import cached, cached_ops, params
from phijax.model.backend import CHOICES
from phijax.model.config import ModelConfig
from phijax.model.inference_layout import InferenceLayout
from phijax.model.kernels import decode
from phijax.model.kernels.int8_lines import from_int8, to_int8
from phijax.parallel.mesh import MeshConfig, make_mesh

MODEL = ModelConfig(
    vocab_size=900,
    model_dim=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=48,
    ffn_dim=96,
    max_position=512,
    sliding_window=24,
)
GREEDY = Sampling(max_tokens=10, temperature=0.0)
PROMPTS = [[5, 9, 77, 200, 3], list(range(40, 70)), [8]]


@pytest.fixture(scope="module")
def weights() -> params.Params:
    """As init, but sharper attention: queries and keys three times as large, so that their errors show."""
    out = params.flat(jax.jit(lambda: params.init(MODEL, 0), compiler_options=QUICK)())
    return params.nested({p: 3 * a if p.endswith(("/q", "/k")) else a for p, a in out.items()})


def generator(weights, cache_dtype="int8", tensor: int = 1) -> Generator:
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=tensor), jax.devices()[:tensor])
    return Generator(MODEL, weights, None, CHOICES["cpu"], mesh, cache_dtype=cache_dtype)


@pytest.mark.slow
def test_it_is_a_float_cache_of_rounded_numbers(weights, monkeypatch):
    """Prompts and steps, against floats that were rounded and widened again before they were written."""
    ours = generator(weights)
    got, logits = ours.generate(PROMPTS, GREEDY), ours.logits(PROMPTS[1])

    def rounded(cache, k, v, *rest, **named):
        return decode.write(cache, *(from_int8(*to_int8(a), a.dtype) for a in (k, v)), *rest, **named)

    monkeypatch.setattr(cached_ops, "write", rounded)
    jax.clear_caches()
    theirs = generator(weights, "auto")
    expected = theirs.generate(PROMPTS, GREEDY)
    # float32 sums in another order, now and then a number that falls on the other side of a half.
    np.testing.assert_allclose(logits, theirs.logits(PROMPTS[1]), rtol=0, atol=2e-3)
    for a, b in zip(got, expected, strict=True):
        assert a.tokens == b.tokens
        np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=0, atol=2e-3)
    monkeypatch.undo()
    jax.clear_caches()


def test_what_it_costs(weights):
    """KL of the model with a float cache from the one with eight bits, in nats a token."""
    ids = PROMPTS[1]
    exact, small = (log_softmax(generator(weights, kind).logits(ids)) for kind in ("auto", "int8"))
    kl = np.sum(np.exp(exact) * (exact - small), axis=-1)
    # It is another cache, and hardly another model: of a model whose every weight is random the entropy is 6 nats.
    assert 1e-6 < kl.mean() < 2e-3


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64) - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_it_saves(stacked, dtype):
    layout = InferenceLayout(unrolled=False, stacked=stacked, dtype=dtype)

    def size(layout):
        arrays = jax.eval_shape(lambda: cached.empty_cache(MODEL, layout, 4, [256, 256]))
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(arrays))

    wide = 2 if dtype == "bfloat16" else 4
    # Integers, and two bytes of a scale for the 48 numbers of a head.
    assert size(dataclasses.replace(layout, cache_dtype="int8")) / size(layout) == pytest.approx((1 + 2 / 48) / wide)


@pytest.mark.parametrize("tensor", [2, 4])
def test_cut_by_heads_and_by_time(weights, tensor):
    """Four chips do not divide the two heads of keys: each then has a part of the places."""
    ours = generator(weights, tensor=tensor)
    assert (ours._layout.cut_by_time is not None) == (tensor == 4)
    for a, b in zip(ours.generate(PROMPTS, GREEDY), generator(weights).generate(PROMPTS, GREEDY), strict=True):
        assert a.tokens == b.tokens
        np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=0, atol=2e-3)


def test_a_row_has_its_own_bits(weights):
    """On one CPU, whatever else is in the batch: as with a cache of floats."""
    ours = generator(weights)
    together = ours.generate(PROMPTS, GREEDY)
    for prompt, expected in zip(PROMPTS, together, strict=True):
        (alone,) = ours.generate([prompt], GREEDY)
        assert alone.tokens == expected.tokens and alone.logprobs == expected.logprobs
