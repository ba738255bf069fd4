"""Steps of a block over a cache that a format of weights does in one call, with what stands around its products.

For other formats they are what they say, of the parts that every model has.
"""

from collections.abc import Callable, Sequence

import jax
from flax import nnx

from phijax.model.kernels import cpu_int4
from phijax.model.kernels.cpu_int4 import Norm
from phijax.model.kernels.decode import Pieces
from phijax.model.mlp import Mlp
from phijax.model.norm import RMSNorm
from phijax.model.weights import project, project_back

RowSum = Callable[[jax.Array], jax.Array] | None  # as RMSNorm takes it


def normed_products(
    x: jax.Array, norm: RMSNorm, weights: Sequence[nnx.Param], row_sum: RowSum, count: jax.Array | None
) -> list[jax.Array]:
    """Each weight's projection of norm(x): (B, T, D) -> (B, T, rows). count: as cached.hidden takes it."""
    values = [w.get_value() for w in weights]
    if all(cpu_int4.alike(w, values[0]) for w in values):
        return cpu_int4.products(x, values, norm=_norm(norm), count=_tokens(x, count))
    h = norm(x, row_sum)
    return [flat(project, h, w) for w in weights]


def plus_product(x: jax.Array, h: jax.Array, w: nnx.Param, count: jax.Array | None) -> jax.Array:
    """x + h w: (B, T, D), (B, T, rows) -> (B, T, D)."""
    value = w.get_value()
    if isinstance(value, cpu_int4.Tiled):
        return cpu_int4.products(h, [value], residual=x, count=_tokens(x, count))[0]
    return x + flat(project_back, h, w)


def plus_mlp(x: jax.Array, norm: RMSNorm, mlp: Mlp, row_sum: RowSum, count: jax.Array | None) -> jax.Array:
    """x + mlp(norm(x)): (B, T, D) -> (B, T, D)."""
    gate, up, down = (w.get_value() for w in (mlp.gate, mlp.up, mlp.down))
    if cpu_int4.alike(gate, up) and isinstance(down, cpu_int4.Tiled):
        return cpu_int4.gated(x, gate, up, down, norm=_norm(norm), residual=x, count=_tokens(x, count))
    h = norm(x, row_sum)
    h = jax.nn.silu(flat(project, h, mlp.gate)) * flat(project, h, mlp.up)
    return x + flat(project_back, h, mlp.down)


def attends_in_one_call(w: nnx.Param, x: jax.Array, cache: Pieces) -> bool:
    """Whether the weights' format brings its own attention, over a cache that it can read."""
    return (
        isinstance(w.get_value(), cpu_int4.Tiled) and x.dtype == "float32" and cache[0][0].dtype in ("float32", "int8")
    )


def attend(
    qkv: Sequence[jax.Array],
    rope: tuple[jax.Array, jax.Array],
    cache: Pieces,
    positions: jax.Array,
    count: jax.Array | None,
    window: int | None,
    w: nnx.Param,
) -> tuple[jax.Array, Pieces]:
    """q, k, v (B, T, rows), not rotated, rope (B, 1, T, R), positions (B, T) -> (B, T, N H) and the cache anew."""
    table = tuple(part[:, 0] for part in rope)
    path = w.get_value().path
    return cpu_int4.attend(*qkv, table, cache, positions[:, 0], count, window=window, path=path)


def flat(verb: Callable, x: jax.Array, w: nnx.Param) -> jax.Array:
    """A contraction that sees (B T, D): one product on every backend."""
    return verb(x.reshape(-1, x.shape[-1]), w).reshape(*x.shape[:-1], -1)


def _norm(norm: RMSNorm) -> Norm:
    return Norm(norm.scale[...], norm.eps)


def _tokens(x: jax.Array, count: jax.Array | None) -> jax.Array | None:
    """How many rows of (B T, D) count; of a prompt's, whose `count` is of rows of the batch, all do."""
    return count if x.shape[1] == 1 else None
