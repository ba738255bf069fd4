"""What the matrices of a model are given on some rows of tokens, layer by layer: one layer's weights at a time."""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from phijax.errors import UserError
from phijax.model import params
from phijax.model.backend import ATTENTION
from phijax.model.config import ModelConfig
from phijax.model.norm import RMSNorm
from phijax.model.params import STACKED, Params
from phijax.model.rope import apply_rope, rope_table
from phijax.model.weights import project, project_back

Read = Callable[[str, tuple[slice, ...]], np.ndarray]  # a leaf's path and which part of it, as checkpoints are read


# Field of Inputs, or "head" -> last names of the leaves that are given it.
INPUTS_OF = {
    "qkv": ("q", "k", "v"),
    "o": ("o",),
    "gate_up": ("gate", "up"),
    "down": ("down",),
    "head": ("head",),
}


class Inputs(NamedTuple):
    """Of one layer's matrices, in float32."""

    qkv: jax.Array  # (B, T, D)
    o: jax.Array  # (B, T, N·H)
    gate_up: jax.Array  # (B, T, D)
    down: jax.Array  # (B, T, F)


def layers(c: ModelConfig, read: Read, tokens: np.ndarray) -> Iterator[tuple[int, Params, Inputs, jax.Array]]:
    """Runs rows of tokens (B, T) through the float model. Yields of each layer: its number, its weights in float32, the
    inputs of its matrices, and what it gives, (B, T, D).

    Raises: UserError for a layer whose weights or results are NaN or infinite: before hours are spent on the others.
    """
    x = jnp.asarray(np.take(read("embedding", (slice(0, c.vocab_size), slice(0, c.model_dim))), tokens, axis=0))
    x = x.astype(jnp.float32)
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
        name = path.rsplit("/", 1)[-1]
        if name == "embedding" and self._c.tied_head:
            name = "head"  # as which it changes the output most: KL 0.25 instead of 0.52 on SmolLM2-135M in int4_g64
        what = next((what for what, names in INPUTS_OF.items() if name in names), None)
        if what is None:
            return None
        self._advance(self._c.num_layers - 1 if what == "head" else layer)
        if what not in self._made:
            if what == "head":
                x = final_norm(self._c, self._read("final_norm/scale", (slice(0, self._c.model_dim),)), self._x)
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


def final_norm(c: ModelConfig, scale: np.ndarray, x: jax.Array) -> jax.Array:
    """What the head is given: (B, T, D)."""
    norm = RMSNorm(c.model_dim, c.norm_eps)
    norm.scale.set_value(jnp.asarray(scale, jnp.float32))
    return norm(x)


@functools.partial(jax.jit, static_argnums=0)
def run_layer(c: ModelConfig, layer: Params, x: jax.Array) -> tuple[jax.Array, Inputs]:
    """decoder.Block, with what its matrices are given. x: (B, T, D) float32, each row one document from place 0."""
    unused = jnp.zeros((1, c.model_dim))
    tree = {"embedding": unused, "final_norm": {"scale": unused[0]}, STACKED: layer}
    block = params.module(c, tree if c.tied_head else {**tree, "head": unused}).blocks
    a, mlp = block.attention, block.mlp
    batch, length, _ = x.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    rope = rope_table(c, positions, length, jnp.float32, by_matmul=False)
    h = block.attention_norm(x)
    q, k, v = (project(h, w, heads=n) for w, n in ((a.q, c.num_heads), (a.k, c.num_kv_heads), (a.v, c.num_kv_heads)))
    q = apply_rope(q, rope, c, by_matmul=False) * c.head_dim**-0.5
    k = apply_rope(k, rope, c, by_matmul=False)
    out = ATTENTION["dense"](q, k, v, jnp.ones((batch, length), jnp.int32), window=c.sliding_window)
    out = out.swapaxes(1, 2).reshape(batch, length, -1)
    x = x + project_back(out, a.o)
    m = block.mlp_norm(x)
    activation = jax.nn.silu(project(m, mlp.gate)) * project(m, mlp.up)
    return x + project_back(activation, mlp.down), Inputs(h, out, m, activation)
