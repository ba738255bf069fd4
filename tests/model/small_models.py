"""Tiny decoders and packed rows that the tests of the model share."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from quick_compilation import QUICK

from phijax.model import params as parameters
from phijax.model.backend import Backend
from phijax.model.config import ModelConfig

SMALL = ModelConfig(
    vocab_size=1000,  # padded to 1024
    model_dim=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=12,
    ffn_dim=96,
    max_position=4096,
)


@dataclasses.dataclass(frozen=True)
class Rows:
    """One micro-batch, (B, T) each."""

    tokens: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    weights: np.ndarray

    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.tokens, self.targets, self.positions, self.segment_ids, self.weights


def pack(rows: list[list[np.ndarray]], length: int) -> Rows:
    """Documents of `n` tokens give n - 1 inputs and targets; positions restart; the rest of a row is padding."""
    batch = [np.zeros((len(rows), length), np.int32) for _ in range(4)]
    weights = np.zeros((len(rows), length), np.float32)
    for b, documents in enumerate(rows):
        at = 0
        for number, document in enumerate(documents, start=1):
            n = len(document) - 1
            where = (b, slice(at, at + n))
            for array, values in zip(batch, (document[:-1], document[1:], np.arange(n), number), strict=True):
                array[where] = values
            weights[where] = 1.0
            at += n
        assert at <= length
    return Rows(*batch, weights)


def random_documents(c: ModelConfig, *sizes: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, c.vocab_size, size, dtype=np.int32) for size in sizes]


def nll_sum(c: ModelConfig, backend: Backend, length: int) -> Callable:
    """(params, *Rows.arrays()) -> (summed weighted loss, logits (B, T, V)). The plain loss, with full logits."""

    def loss(params, tokens, targets, positions, segment_ids, weights):
        model = parameters.module(c, params)
        hidden = model.hidden(tokens, positions, segment_ids, backend, length=length)
        logits = model.logits(hidden)
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
        return -jnp.sum(log_p * weights), logits

    return loss


@functools.lru_cache(maxsize=64)
def program(c: ModelConfig, backend: Backend, length: int) -> Callable:
    """Compiled once: (params, *Rows.arrays()) -> (loss, logits), gradients."""
    return jax.jit(jax.value_and_grad(nll_sum(c, backend, length), has_aux=True), compiler_options=QUICK)


def run(c: ModelConfig, backend: Backend, params: parameters.Params, rows: Rows, length: int | None = None):
    """-> ((loss, logits), gradients as {path: array})."""
    values, gradients = program(c, backend, length or rows.tokens.shape[1])(params, *rows.arrays())
    return values, parameters.flat(gradients)


def assert_leaves_close(got: Mapping, expected: Mapping, *, relative: float) -> None:
    """Every leaf within `relative` of the largest entry of that leaf; same leaves on both sides."""
    assert set(got) == set(expected)
    for path, value in expected.items():
        value = np.asarray(value, np.float64)
        bound = relative * max(float(np.abs(value).max()), 1e-6)
        np.testing.assert_allclose(np.asarray(got[path], np.float64), value, rtol=0, atol=bound, err_msg=path)
