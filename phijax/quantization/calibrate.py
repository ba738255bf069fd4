"""What the matrices of a model are given on some rows of tokens, layer by layer: one layer's weights at a time."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from phijax.errors import UserError
from phijax.model import params
from phijax.model.config import ModelConfig
from phijax.model.ops import Ops
from phijax.model.params import STACKED, Params
from phijax.model.rope import inverse_frequencies, rope_table
from phijax.model.terms import Term
from phijax.model.vocabulary import with_positions
from phijax.quantization.policy import kind_of

Read = Callable[[str, tuple[slice, ...]], np.ndarray]  # a leaf's path and which part of it, as checkpoints are read


class Inputs(NamedTuple):
    """Of one layer's matrices, by their kind, in float32."""

    qkv: jax.Array  # (B, T, D)
    o: jax.Array  # (B, T, N·H)
    gate_up: jax.Array  # (B, T, D)
    down: jax.Array  # (B, T, F)


def layers(c: ModelConfig, read: Read, tokens: np.ndarray) -> Iterator[tuple[int, Params, Inputs, jax.Array]]:
    """Runs rows of tokens (B, T) through the float model. Yields of each layer: its number, its weights in float32, the
    inputs of its matrices, and what it gives, (B, T, D).

    Raises: UserError for a layer whose weights or results are NaN or infinite: before hours are spent on the others.
    """
    x = embedded(c, read, tokens)
    of_blocks = {path: shape for path, shape in params.shapes(c).items() if path.startswith(f"{STACKED}/")}
    for number in range(c.num_layers):
        flat = {
            path.removeprefix(f"{STACKED}/"): read(
                path, (slice(number, number + 1), *(slice(0, size) for size in shape[1:]))
            )[0].astype(np.float32)
            for path, shape in of_blocks.items()
        }
        if wrong := [path for path, values in flat.items() if not np.isfinite(values).all()]:
            raise UserError(
                f"{STACKED}/{wrong[0]}, layer {number}, holds values that are NaN or infinite: the file is damaged, or "
                "training diverged."
            )
        weights = params.nested(flat)
        x, inputs = run_layer(c, weights, x)
        if not np.isfinite(x).all():
            raise UserError(
                f"Layer {number} gives values that are NaN or infinite for the calibration rows; its weights are "
                "finite. Nothing can be calibrated on that: use --method=rtn, or look at the embedding."
            )
        yield number, weights, inputs, x


class Hessians:
    """X^T X of the inputs of each matrix, of the float model. Asked for layer by layer, in rising order."""

    def __init__(self, c: ModelConfig, read: Read, tokens: np.ndarray):
        self._c, self._read = c, read
        self._layers = layers(c, read, tokens)
        self._number, self._inputs, self._x = -1, None, None
        self._made: dict[str, jax.Array] = {}

    def __call__(self, path: str, layer: int) -> jax.Array | None:
        """(inputs, inputs) float32; None for an embedding that is no head: nothing is summed over it."""
        what = kind_of(path)
        if what == "embedding" and self._c.tied_head:
            what = "head"  # as which it changes the output most: KL 0.25 instead of 0.52 on SmolLM2-135M in int4_g64
        if what in (None, "embedding"):
            return None
        self._advance(self._c.num_layers - 1 if what == "head" else layer)
        if what not in self._made:
            if what == "head":
                x = final_norm(self._c, self._read, self._x)
            else:
                x = getattr(self._inputs, what)
            self._made[what] = _outer(x)
        return self._made[what]

    def _advance(self, layer: int) -> None:
        while self._number < layer:
            self._number, _, self._inputs, self._x = next(self._layers)
            self._made = {}


@jax.jit
def _outer(x: jax.Array) -> jax.Array:
    flat = x.reshape(-1, x.shape[-1])
    return flat.T @ flat


def embedded(c: ModelConfig, read: Read, tokens: np.ndarray) -> jax.Array:
    """What the first layer is given: rows of tokens (B, T), each one document -> (B, T, D) float32."""
    x = np.take(read("embedding", (slice(0, c.vocab_size), slice(0, c.model_dim))), tokens, axis=0)
    x = jnp.asarray(x).astype(jnp.float32)
    if c.positions == "learned":
        table = params.module_with(c, _whole(c, read, "position_embedding")).position_embedding
        x = with_positions(x, table, _positions(x))
    return x


def final_norm(c: ModelConfig, read: Read, x: jax.Array) -> jax.Array:
    """What the head is given: (B, T, D)."""
    return params.module_with(c, _whole(c, read, "final_norm/")).final_norm(x)


def _whole(c: ModelConfig, read: Read, start: str) -> dict[str, jax.Array]:
    """The leaves whose paths start so, in float32."""
    found = {path: shape for path, shape in params.shapes(c).items() if path.startswith(start)}
    parts = {path: read(path, tuple(slice(0, size) for size in shape)) for path, shape in found.items()}
    return {path: jnp.asarray(values, jnp.float32) for path, values in parts.items()}


def _positions(x: jax.Array) -> jax.Array:
    """Of rows (B, T, D), each one document: (B, T) int32."""
    return jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])


class Observed(Ops):
    """The reference, which remembers what the matrices of each kind are given."""

    def __init__(self, c: ModelConfig, rope: tuple[jax.Array, jax.Array]):
        super().__init__(c, rope)
        self.inputs: dict[str, jax.Array] = {}

    def products(self, h: Term, weights: Sequence[nnx.Param]) -> Iterable[jax.Array]:
        x = self.inputs[weights[0].kind] = self.value(h)
        return super().products(x, weights)


@functools.partial(jax.jit, static_argnums=0)
def run_layer(c: ModelConfig, layer: Params, x: jax.Array) -> tuple[jax.Array, Inputs]:
    """A block, with what its matrices are given. x: (B, T, D) float32, each row one document from place 0."""
    block = params.module_with(c, params.flat(layer, f"{STACKED}/")).blocks
    frequencies = inverse_frequencies(c, x.shape[1])
    ops = Observed(c, rope_table(c, _positions(x), *frequencies, jnp.float32, by_matmul=False))
    x, _ = block(x, None, ops)
    return x, Inputs(**ops.inputs)
