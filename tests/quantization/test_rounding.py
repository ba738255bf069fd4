"""Round to nearest with searched scales: against a search in float64, against GGUF's Q4_0, and at the edges."""

import numpy as np
import pytest

from phijax.quantization.policy import SCHEMES
from phijax.quantization.rounding import FACTORS, round_to_nearest

CASES = [(name, axis) for name in SCHEMES for axis in (-1, -2)]


def matrix(seed: int = 0, shape=(256, 384)) -> np.ndarray:
    """Heavy tails, rows of different size."""
    random = np.random.default_rng(seed)
    return (random.standard_t(4, shape) * random.uniform(0.01, 1, (shape[0], 1))).astype(np.float32)


def dequantized(rounded) -> np.ndarray:
    scales = np.asarray(rounded.scales, np.float64)
    for axis in range(2):
        scales = np.repeat(scales, rounded.values.shape[axis] // scales.shape[axis], axis)
    return np.asarray(rounded.values, np.float64) * scales


def groups_first(array: np.ndarray, group: int | None, axis: int) -> np.ndarray:
    """(groups, members)"""
    turned = array if axis == -1 else array.T
    return turned.reshape(-1, group or turned.shape[1])


@pytest.mark.parametrize("name, axis", CASES)
def test_each_group_is_no_worse_than_a_search_in_float64(name, axis):
    scheme, w = SCHEMES[name], matrix()
    rounded = round_to_nearest(w, scheme, axis)
    low = -(2 ** (scheme.bits - 1))
    assert np.asarray(rounded.values).min() >= low and np.asarray(rounded.values).max() <= -low - 1
    wide = groups_first(w.astype(np.float64), scheme.group, axis)
    ours = groups_first(dequantized(rounded), scheme.group, axis)
    extreme = np.take_along_axis(wide, np.abs(wide).argmax(1)[:, None], 1)
    best = np.full(len(wide), np.inf)
    for factor in FACTORS:
        scale = (extreme / low * factor).astype(np.float16).astype(np.float64)
        candidate = np.clip(np.round(wide / scale), low, -low - 1) * scale
        best = np.minimum(best, ((wide - candidate) ** 2).sum(1))
    error = ((wide - ours) ** 2).sum(1)
    # float32 sums decide between candidates: where two are as good, either may be taken.
    assert np.all(error <= best * (1 + 1e-4) + 1e-12)
    np.testing.assert_allclose(float(rounded.squared[0]), error.sum(), rtol=1e-3)
    np.testing.assert_allclose(float(rounded.squared[1]), (wide**2).sum(), rtol=1e-4)


@pytest.mark.parametrize("name", ["int4", "int4_g128", "int4_g64", "int4_g32"])
def test_searching_helps(name):
    w = matrix()
    plain, searched = (round_to_nearest(w, SCHEMES[name], -1, f).squared[0] for f in ((1.0,), FACTORS))
    assert searched < 0.97 * plain


def test_without_a_search_groups_of_32_are_q4_0():
    """GGUF's own quantiser: the same scales bit for bit, the same integers but for ties of its rounding."""
    gguf = pytest.importorskip("gguf")
    w = matrix(1)
    kind = gguf.GGMLQuantizationType.Q4_0
    blocks = gguf.quants.quantize(w, kind).reshape(-1, 18)
    rounded = round_to_nearest(w, SCHEMES["int4_g32"], -1, (1.0,))
    np.testing.assert_array_equal(blocks[:, :2].copy().view(np.float16).reshape(256, 12), np.asarray(rounded.scales))
    theirs = gguf.quants.dequantize(blocks.reshape(256, -1), kind)
    assert np.mean(theirs == dequantized(rounded)) > 0.998
    searched = round_to_nearest(w, SCHEMES["int4_g32"], -1)
    assert float(searched.squared[0]) < 0.95 * np.sum((w - theirs) ** 2)


def test_edges():
    """Zeros, a scale below what float16 holds, a group of one value, weights that are integers already."""
    w = np.zeros((4, 64), np.float32)
    w[1] = 1e-9
    w[2] = -0.37
    w[3] = np.tile(np.arange(-8, 8), 4) * 0.25
    rounded = round_to_nearest(w, SCHEMES["int4_g32"], -1)
    got = dequantized(rounded)
    assert np.all(got[:2] == 0) and np.all(np.asarray(rounded.values)[0] == 0)
    np.testing.assert_allclose(got[2], -0.37, rtol=1e-3)
    np.testing.assert_array_equal(got[3], w[3])
    assert np.all(np.isfinite(np.asarray(rounded.scales)))


@pytest.mark.parametrize("axis", [-1, -2])
def test_what_counts_more_is_rounded_better(axis):
    """The search is for the least of the counted errors, and an input that counts nothing has no say."""
    w = matrix(2)
    importance = np.exp(2 * np.random.default_rng(0).standard_normal(w.shape[axis])).astype(np.float32)
    counts = importance if axis == -1 else importance[:, None]
    plain, counted = (round_to_nearest(w, SCHEMES["int4_g32"], axis, importance=i) for i in (None, importance))
    before, after = (float(np.sum(counts * (dequantized(r) - w) ** 2)) for r in (plain, counted))
    assert after < 0.93 * before
    assert float(counted.squared[0]) > float(plain.squared[0])  # of the weights alone it is the worse
    np.testing.assert_allclose(float(counted.squared[0]), np.sum((dequantized(counted) - w) ** 2), rtol=1e-3)
    nothing = round_to_nearest(w, SCHEMES["int4_g32"], axis, importance=np.zeros_like(importance))
    assert np.all(np.isfinite(np.asarray(nothing.scales, np.float32)))
