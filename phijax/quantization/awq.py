"""Activation-aware scaling: input channels that carry much are made larger before rounding, so that they lose less.

Lin et al. 2023, arXiv:2306.00978: W -> W diag(s), s = mean|x|^a, and 1/s goes into whatever makes x: the norm before
q, k, v, before gate and up, and before the head; for down, the rows of up where a gate is multiplied with them. The
model stays the same function, and its files stay ordinary. Leaves declare what they make (`feeds`). o has no such
place: grouped heads share their v. Nor has a head that is the embedding, nor down after an activation without a gate.

Beyond the paper, scales are then searched with errors counted by the mean squares of the inputs, which reaches those
as well: 0.26 nats instead of 0.61 on SmolLM2-135M in int4_g64, whose embedding is its head.
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from phijax.model import params
from phijax.model.config import ModelConfig
from phijax.model.quantized import Quantized
from phijax.quantization import calibrate
from phijax.quantization.policy import KINDS, Scheme, paths_of, summed_axis
from phijax.quantization.rounding import Quantize, round_to_nearest

EXPONENTS = tuple(float(a) for a in np.linspace(0.0, 1.0, 11))  # the first is rounding as it is
QUICK_FACTORS = (1.08, 0.92, 0.8)  # of the many scales that are tried, see rounding.FACTORS
SAMPLES = 256  # tokens whose outputs are compared
DAMPING = 0.01  # of the mean importance, added to it: inputs that hardly occur would else be rounded anyhow
OUTPUTS = 1024  # of a matrix that are compared: more choose no better, and mini's have up to 8192

Folds = dict[str, np.ndarray]  # fold -> (L, inputs) float32, of the head (inputs,)


def inverses(c: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Fold, which is the kind of the leaves whose inputs it scales -> the leaves that take its inverse."""
    leaves = params.leaves(c)
    found = {kind: tuple(path for path, leaf in leaves.items() if leaf.feeds == kind) for kind in KINDS}
    return {kind: paths for kind, paths in found.items() if paths}


class Choice(NamedTuple):
    """importance: leaf path -> mean squares of its inputs as they are behind the folds, as folds are stacked."""

    folds: Folds
    importance: dict[str, np.ndarray]

    def rounding(self, path: str, layer: int) -> Quantize | None:
        """How a matrix is rounded; None where nothing is known of its inputs: an embedding that is no head."""
        if (found := self.importance.get(path)) is None:
            return None
        return functools.partial(round_to_nearest, importance=found[layer] if found.ndim == 2 else found)


def choose(
    c: ModelConfig,
    read: calibrate.Read,
    assigned: Mapping[str, Scheme],
    tokens: np.ndarray,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
) -> Choice:
    """The scales of every layer, by the least squared error of its outputs on rows of tokens (B, T).

    Matrices that stay as stored need none, and take none along with those that do not: a fold is made where all that
    it scales is quantised.
    """
    wanted = [fold for fold in inverses(c) if all(path in assigned for path in paths_of(c, fold))]
    folds: dict[str, list[np.ndarray]] = {fold: [] for fold in wanted if fold != "head"}
    importance: dict[str, list[np.ndarray]] = {}
    last = None
    for number, weights, inputs, out in calibrate.layers(c, read, tokens):
        for what, x in inputs._asdict().items():
            scales = np.ones(x.shape[-1], np.float32)
            if what in folds:
                scales = _choose(x, {path: _leaf(weights, path) for path in paths_of(c, what)}, assigned)
                folds[what].append(scales)
            for path in paths_of(c, what):
                importance.setdefault(path, []).append(_importance(x) / scales**2)
        last = out
        on_layer(number + 1, c.num_layers)
    found = Choice(*({name: np.stack(layers) for name, layers in kind.items()} for kind in (folds, importance)))
    into = calibrate.final_norm(c, read, last)
    found.importance["embedding" if c.tied_head else "head"] = _importance(into)
    if "head" in wanted:
        head = read("head", (slice(0, c.vocab_size), slice(0, c.model_dim)))
        found.folds["head"] = _choose(into, {"head": head}, assigned)
        found.importance["head"] /= found.folds["head"] ** 2
    return found


def _importance(x: jax.Array) -> np.ndarray:
    squares = np.asarray(jnp.mean(jnp.square(x.reshape(-1, x.shape[-1])), axis=0))
    return squares + DAMPING * squares.mean()


def fold(
    c: ModelConfig, path: str, values: np.ndarray, index: tuple[slice, ...], folds: Mapping[str, np.ndarray]
) -> np.ndarray:
    """A part of a leaf, float32, with its scales and inverses in it. index: where the part lies; all bounds given."""
    leaf = params.leaves(c)[path]
    for name, scales in folds.items():
        for axis, inverse in ((leaf.summed_axis, False), (leaf.result_axis, True)):
            if name == (leaf.feeds if inverse else leaf.kind):
                here = scales[(*index[: scales.ndim - 1], index[axis])]
                here = here[..., None] if axis == -2 else here[..., None, :] if values.ndim > here.ndim else here
                values = values / here if inverse else values * here
    return values


def is_folded(c: ModelConfig, path: str, folds: Mapping[str, np.ndarray]) -> bool:
    leaf = params.leaves(c)[path]
    return leaf.kind in folds or leaf.feeds in folds


def _choose(x: jax.Array, matrices: Mapping[str, np.ndarray], assigned: Mapping[str, Scheme]) -> np.ndarray:
    flat = x.reshape(-1, x.shape[-1])
    size, importance = np.asarray(jnp.mean(jnp.abs(flat), axis=0), np.float64), _importance(flat)
    samples = flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES]
    best, chosen = np.inf, np.ones(flat.shape[-1], np.float32)
    for exponent in EXPONENTS:
        scales = np.maximum(size, 1e-4 * size.max() + 1e-30) ** exponent
        scales = (scales / np.sqrt(scales.max() * scales.min())).astype(np.float32)
        error = sum(
            _output_error(samples, matrix, scales, importance, assigned[path], summed_axis(path))
            for path, matrix in matrices.items()
        )
        if error < best:
            best, chosen = error, scales
    return chosen


def _output_error(
    x: jax.Array, matrix: np.ndarray, scales: np.ndarray, importance: np.ndarray, scheme: Scheme, axis: int
) -> float:
    """Summed square of what rounding changes in the outputs for x (S, inputs), the scales folded in and out again.

    From as many outputs, evenly spread, as are compared."""
    every = -(-matrix.shape[0 if axis == -1 else 1] // OUTPUTS)
    some = matrix[::every] if axis == -1 else matrix[:, ::every]
    return every * float(_changed(x, some, scales, importance / scales**2, scheme, axis))


@functools.partial(jax.jit, static_argnums=(4, 5))
def _changed(
    x: jax.Array, matrix: jax.Array, scales: jax.Array, importance: jax.Array, scheme: Scheme, axis: int
) -> jax.Array:
    matrix = matrix.astype(jnp.float32)
    factor = scales if axis == -1 else scales[:, None]
    rounded = round_to_nearest(matrix * factor, scheme, axis, QUICK_FACTORS, importance)
    change = Quantized(rounded.values, rounded.scales).dequantize() / factor - matrix
    return jnp.sum(jnp.square(x @ (change.T if axis == -1 else change)))


def _leaf(weights: calibrate.Params, path: str) -> np.ndarray:
    _, group, name = path.split("/")
    return weights[group][name]
