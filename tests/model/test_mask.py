"""A mask is one value: what it lets a query see, and which kernels refuse which."""

import jax.numpy as jnp
import numpy as np
import pytest

from phijax.errors import UserError
from phijax.model import cached
from phijax.model.backend import ATTENTION
from phijax.model.inference_layout import InferenceLayout
from phijax.model.kernels import cpu_int4, decode_tpu
from phijax.model.kernels.decode import cached_attention
from phijax.model.kernels.stacked import stacked_attention
from phijax.model.mask import Mask, visible
from phijax.model.presets import PRESETS

BOTH_SIDES = Mask(causal=False)


@pytest.mark.parametrize(
    ("mask", "seen_by_query_2"),
    [
        (Mask(), [0, 1, 2]),
        (Mask(window=2), [1, 2]),
        (Mask(window=1), [2]),
        (BOTH_SIDES, [0, 1, 2, 3, 4]),
        (Mask(causal=False, window=2), [1, 2, 3]),
    ],
)
def test_what_a_query_sees(mask, seen_by_query_2):
    places = np.arange(5)
    assert np.flatnonzero(mask.sees(2 - places)).tolist() == seen_by_query_2
    segments = np.array([[1, 1, 1, 1, 2]])
    packed = np.asarray(visible(mask, places, places, segments, segments))[0, 2]
    assert np.flatnonzero(packed).tolist() == [key for key in seen_by_query_2 if key < 4]


def test_a_model_has_the_mask_of_its_window():
    assert PRESETS["phi3_mini"].mask == Mask(causal=True, window=2047)
    assert PRESETS["llama2_7b"].mask == Mask()


def test_dense_attention_takes_a_mask_that_is_not_causal():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, 6, 4), np.float32) for _ in range(3))
    out = ATTENTION["dense"](q, k, v, np.ones((1, 6), np.int32), mask=BOTH_SIDES)
    weights = np.exp(np.einsum("bnth,bnsh->bnts", q, k))
    expected = np.einsum("bnts,bnsh->bnth", weights / weights.sum(-1, keepdims=True), v)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["blocked", "splash", "cudnn"])
def test_a_kernel_refuses_what_it_would_compute_wrongly(name):
    q = jnp.zeros((1, 2, 128, 16), jnp.bfloat16)
    with pytest.raises(UserError, match=rf"{name} attention computes causal masks alone, not Mask\(causal=False"):
        ATTENTION[name](q, q, q, jnp.ones((1, 128), jnp.int32), mask=BOTH_SIDES)


def test_attention_over_a_cache_is_causal():
    c = PRESETS["tiny"]
    line = jnp.zeros((1, c.num_kv_heads, 1, c.head_dim))
    place = jnp.zeros((1, 1), jnp.int32)
    pieces = cached.empty_cache(c, InferenceLayout(unrolled=True), 1, (16,))[0]
    stack = cached.empty_cache(c, InferenceLayout(unrolled=False, stacked=True), 1, (256,))
    layer = jnp.int32(0)
    with pytest.raises(UserError, match="cached attention computes causal masks alone"):
        cached_attention(line, pieces, place, mask=BOTH_SIDES)
    for tokens in (1, 2):  # one by the kernel, more by XLA
        many = jnp.repeat(line, tokens, axis=2)
        with pytest.raises(UserError, match="cached attention computes causal masks alone"):
            stacked_attention(many, many, many, stack, layer, jnp.arange(tokens)[None], mask=BOTH_SIDES)
    with pytest.raises(UserError, match="cached attention computes causal masks alone"):
        decode_tpu.attend_and_write(
            line[:, :, 0], line[:, :, 0], line[:, :, 0], stack, layer, place[0], mask=BOTH_SIDES
        )
    flat = line.reshape(1, 1, -1)
    rope = (jnp.zeros((1, 1, c.rotary_dim)),) * 2
    with pytest.raises(UserError, match="int4 attention computes causal masks alone"):
        cpu_int4.attend(flat, flat, flat, rope, pieces, place[0], None, mask=BOTH_SIDES, path="generic")
