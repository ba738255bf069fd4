"""Activation-aware scaling: the layer by layer run, folds that change nothing, errors that fall."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick_compilation import QUICK
from references.quantized import MODEL, SCHEME
from references.weights import random_params

from phijax.interchange.native.folded import FoldedSource
from phijax.interchange.weight_source import NOT_QUANTIZED
from phijax.model import params
from phijax.model.backend import Backend
from phijax.model.config import LongRope
from phijax.quantization import awq, calibrate, policy

LONG = dataclasses.replace(  # every branch of the layer: groups of heads, a window, LongRoPE
    MODEL, sliding_window=7, long_rope=LongRope((1.0,) * 6, (1.0, 1.5, 2.0, 3.0, 4.0, 5.0), original_max_position=16)
)
BIASED = dataclasses.replace(MODEL, norm="layer", bias=True, positions="learned", activation="gelu_tanh")
UNGATED = dataclasses.replace(BIASED, gated=False)
ASSIGNED = policy.assign(MODEL, policy.parse(SCHEME))


class Source:
    """Parameters in memory as a checkpoint's weights, the vocabulary cut."""

    schemes = NOT_QUANTIZED

    def __init__(self, flat):
        self.flat = {p: np.asarray(v)[:700] if v.shape[0] == 1024 else np.asarray(v) for p, v in flat.items()}

    def shapes(self):
        return {path: value.shape for path, value in self.flat.items()}

    def dtype(self, path):
        return self.flat[path].dtype

    def read(self, path, index):
        return self.flat[path][index]


def uneven_params(c):
    """Channels of very different size come out of each norm, as in trained models."""
    flat = params.flat(random_params(c))
    random = np.random.default_rng(1)
    for path, value in flat.items():
        if "norm" in path:
            flat[path] = value * np.exp(1.5 * random.standard_normal(value.shape)).astype(np.float32)
    return flat


def tokens(length: int = 24) -> np.ndarray:
    return np.random.default_rng(2).integers(0, 700, (3, length), dtype=np.int32)


def decoder(c, flat, ids, what: str) -> np.ndarray:
    """The decoder of training: hidden (B, T, D) or logits."""
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)

    def forward(weights):
        model = params.module(c, weights)
        hidden = model.hidden(ids, positions, np.ones_like(ids), Backend(), length=ids.shape[1])
        return hidden if what == "hidden" else model.logits(hidden)

    return np.asarray(jax.jit(forward, compiler_options=QUICK)(params.nested(flat)))


@pytest.mark.parametrize("c", [MODEL, LONG, UNGATED])
def test_layer_by_layer_it_is_the_decoder(c):
    flat = uneven_params(c)
    *_, (number, _, inputs, x) = calibrate.layers(c, Source(flat).read, tokens())
    assert number == 1 and inputs.down.shape == (3, 24, 96) and inputs.o.shape == (3, 24, 48)
    got = calibrate.final_norm(c, Source(flat).read, x)
    expected = decoder(c, flat, tokens(), "hidden")
    # float32 sums in another order, through norms that widen some channels by e^3; a wrong rotation moves it by 1e-1.
    np.testing.assert_allclose(got, expected, rtol=0, atol=5e-5 * np.abs(expected).max())


@pytest.fixture(scope="module")
def choice():
    return awq.choose(MODEL, Source(uneven_params(MODEL)).read, ASSIGNED, tokens())


@pytest.fixture(scope="module")
def folds(choice):
    return choice.folds


def whole(source) -> dict:
    read = {p: source.read(p, tuple(slice(0, n) for n in shape)) for p, shape in source.shapes().items()}
    return {p: np.pad(v, ((0, 324), (0, 0))) if v.shape[0] == 700 else v for p, v in read.items()}


def test_folding_changes_weights_but_not_the_model(folds):
    flat = uneven_params(MODEL)
    folded = whole(FoldedSource(Source(flat), MODEL, folds))
    expected = decoder(MODEL, flat, tokens(), "logits")
    got = decoder(MODEL, folded, tokens(), "logits")
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    changed = {path for path, value in flat.items() if not np.array_equal(folded[path], value)}
    scaled = [name for name, scales in folds.items() if np.any(scales != 1)]  # by the exponent 0 nothing is
    takes_inverse = awq.inverses(MODEL)
    assert set(folds) == set(takes_inverse) and {"qkv", "gate_up", "head"} <= set(scaled)
    assert changed == {path for name in scaled for path in (*policy.paths_of(MODEL, name), *takes_inverse[name])}


@pytest.mark.parametrize(
    "c", [pytest.param(BIASED, id="with a gate", marks=pytest.mark.slow), pytest.param(UNGATED, id="without")]
)
def test_biases_take_the_inverse_too(c):
    """Of LayerNorm, and of up where there is a gate; without one no factor passes the activation, and none is tried."""
    flat, assigned = uneven_params(c), policy.assign(c, policy.parse("int4"))
    folds = awq.choose(c, Source(flat).read, assigned, tokens(8)).folds
    assert set(folds) == {"qkv", "gate_up", "head"} | ({"down"} if c.gated else set())
    # Far from one, whatever the rows of this test chose.
    random = np.random.default_rng(5)
    folds = {name: np.exp(random.standard_normal(scales.shape)).astype(np.float32) for name, scales in folds.items()}
    folded = whole(FoldedSource(Source(flat), c, folds))
    expected = decoder(c, flat, tokens(), "logits")
    np.testing.assert_allclose(
        decoder(c, folded, tokens(), "logits"), expected, rtol=0, atol=1e-4 * np.abs(expected).max()
    )
    changed = {path for path, value in flat.items() if not np.array_equal(folded[path], value)}
    assert (
        changed == {path for name in folds for path in (*policy.paths_of(c, name), *awq.inverses(c)[name])}
        and "blocks/mlp_norm/bias" in changed
    )


def test_parts_are_parts_of_the_whole(folds):
    source = FoldedSource(Source(uneven_params(MODEL)), MODEL, folds)
    all_of_it = whole(source)
    for path in ("blocks/mlp/up", "blocks/mlp/down", "blocks/attention/q"):
        index = (slice(1, 2), slice(5, 9), slice(3, 40))
        np.testing.assert_array_equal(source.read(path, index), all_of_it[path][index])
    index = (slice(1, 2), slice(3, 40))
    np.testing.assert_array_equal(
        source.read("blocks/mlp_norm/scale", index), all_of_it["blocks/mlp_norm/scale"][index]
    )
    np.testing.assert_array_equal(source.read("head", (slice(9, 12), slice(0, 64))), all_of_it["head"][9:12])


def test_large_channels_are_made_larger(folds):
    """What the scales follow is the size of the inputs."""
    *_, inputs = [i for _, _, i, _ in calibrate.layers(MODEL, Source(uneven_params(MODEL)).read, tokens())]
    size = np.log(np.mean(np.abs(inputs.qkv), axis=(0, 1)))
    assert np.corrcoef(size, np.log(folds["qkv"][1]))[0, 1] > 0.99
    np.testing.assert_allclose(folds["qkv"].max(1) * folds["qkv"].min(1), 1, rtol=1e-5)


def test_importance_is_that_of_the_folded_models_inputs(choice):
    """As the layer by layer run over the folded weights sees them."""
    folded = FoldedSource(Source(uneven_params(MODEL)), MODEL, choice.folds)
    *_, (_, _, inputs, _) = calibrate.layers(MODEL, folded.read, tokens())
    given = {"attention/k": (inputs.qkv, "qkv"), "attention/o": (inputs.o, None), "mlp/down": (inputs.down, "down")}
    for path, (x, fold) in given.items():
        undone = np.ones(x.shape[-1]) if fold is None else choice.folds[fold][1].astype(np.float64) ** 2
        squares = np.mean(np.square(np.asarray(x, np.float64)), axis=(0, 1)) * undone  # of the model that is not folded
        found = choice.importance[f"blocks/{path}"][1]
        np.testing.assert_allclose(found * undone, squares + awq.DAMPING * squares.mean(), rtol=2e-3)
        np.testing.assert_array_equal(choice.rounding(f"blocks/{path}", 1).keywords["importance"], found)
    assert choice.rounding("embedding", 0) is None and choice.rounding("head", 0) is not None


def test_the_model_moves_less_than_by_rounding_alone(folds):
    """KL on other rows than those the scales were chosen on."""
    from references.quantized import quantized_params

    flat = uneven_params(MODEL)
    other = np.random.default_rng(9).integers(0, 700, (4, 24), dtype=np.int32)
    reference = jax.nn.log_softmax(decoder(MODEL, flat, other, "logits"))

    def divergence(weights):
        small = quantized_params({p: jnp.asarray(v) for p, v in weights.items()}, ASSIGNED)
        got = jax.nn.log_softmax(decoder(MODEL, small, other, "logits"))
        return float(jnp.mean(jnp.sum(jnp.exp(reference) * (reference - got), -1)))

    assert divergence(whole(FoldedSource(Source(flat), MODEL, folds))) < 0.8 * divergence(flat)


@pytest.mark.parametrize("axis", [-1, -2])
def test_a_part_of_the_outputs_tells_as_much(monkeypatch, axis):
    """Outputs are as many samples: a quarter of 240 gives their sum within a few times 1 / sqrt(60)."""
    random = np.random.default_rng(3)
    x, matrix = random.standard_normal((64, 96)).astype(np.float32), random.standard_normal((240, 96))
    matrix = matrix.astype(np.float32) if axis == -1 else np.ascontiguousarray(matrix.T, np.float32)
    scales = np.exp(random.standard_normal(96)).astype(np.float32)
    even = np.ones(96, np.float32)
    every = awq._output_error(x, matrix, scales, even, policy.SCHEMES["int4_g32"], axis)
    monkeypatch.setattr(awq, "OUTPUTS", 60)
    some = awq._output_error(x, matrix, scales, even, policy.SCHEMES["int4_g32"], axis)
    assert some != every and some == pytest.approx(every, rel=0.3)


def test_a_fold_is_made_where_all_that_it_scales_is_quantized():
    some = policy.assign(MODEL, policy.parse("int4,qkv=as_stored,head=as_stored"))
    folds = awq.choose(MODEL, Source(uneven_params(MODEL)).read, some, tokens(8)).folds
    assert set(folds) == {"gate_up", "down"}


def test_hessians_are_of_the_inputs_and_skip_layers_that_are_done():
    flat = uneven_params(MODEL)
    *_, (_, _, inputs, x) = calibrate.layers(MODEL, Source(flat).read, tokens())
    hessians = calibrate.Hessians(MODEL, Source(flat).read, tokens())
    expected = {"blocks/mlp/down": inputs.down, "blocks/attention/o": inputs.o, "blocks/attention/k": inputs.qkv}
    for path, given in expected.items():
        wide = np.asarray(given, np.float64).reshape(-1, given.shape[-1])
        np.testing.assert_allclose(hessians(path, 1), wide.T @ wide, rtol=1e-3, atol=1e-4 * np.abs(wide.T @ wide).max())
    into_head = np.asarray(calibrate.final_norm(MODEL, Source(flat).read, x)).reshape(-1, 64)
    np.testing.assert_allclose(
        hessians("head", 0), into_head.T @ into_head, rtol=1e-3, atol=1e-4 * np.abs(into_head.T @ into_head).max()
    )
    assert hessians("embedding", 0) is None
    tied = dataclasses.replace(MODEL, tied_head=True)
    of_tied = calibrate.Hessians(tied, Source({p: v for p, v in flat.items() if p != "head"}).read, tokens())
    np.testing.assert_array_equal(of_tied("embedding", 0), hessians("head", 0))
