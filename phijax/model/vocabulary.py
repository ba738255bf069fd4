"""Where the model meets tokens: the embedding, and the head's logits. The loss, which never holds all of these, is
`cross_entropy.py`."""

import jax
import jax.numpy as jnp
from flax import nnx

from phijax.model.weights import WeightFormat, whole
from phijax.parallel import sharding


def embed(table: jax.Array, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows of `table` (V, D) for tokens (B, T) -> (B, T, D) in dtype.

    Gathered whole on every chip in the compute dtype: a vocabulary that stays cut would turn the lookup into a
    product or an all-reduce of activations. Gradients are added up in float32 (common tokens occur thousands of times
    in a batch) and reduce-scattered in dtype.
    """

    def lookup(table: jax.Array, tokens: jax.Array) -> jax.Array:
        return jnp.take(table.astype(jnp.float32), tokens, axis=0).astype(dtype)

    if jax.sharding.get_abstract_mesh().empty:
        return lookup(table.astype(dtype), tokens)

    def local(shard: jax.Array, tokens: jax.Array) -> jax.Array:
        return lookup(jax.lax.all_gather(shard.astype(dtype), ("tensor", "fsdp"), axis=0, tiled=True), tokens)

    return jax.shard_map(
        local,
        in_specs=(sharding.spec(("vocab", "embed")), sharding.spec(("act_batch", "act_time"))),
        out_specs=sharding.spec(("act_batch", "act_time", "act_embed")),
        check_vma=False,
    )(table, tokens)


def with_positions(x: jax.Array, table: nnx.Param, positions: jax.Array) -> jax.Array:
    """x (B, T, D) and the rows of a table (max_position, D) at positions (B, T).

    Places after the last are the last: only what pads a row stands there, and it must be finite. In float32, as the
    table's gradient then is.
    """
    rows = jnp.take(table[...].astype(jnp.float32), positions, axis=0, mode="clip")
    return (x.astype(jnp.float32) + rows).astype(x.dtype)


def logits(x: jax.Array, head: nnx.Param, *, vocab_size: int) -> jax.Array:
    """(..., D) -> (..., V) float32, the padded vocabulary cut off."""
    return _product(x, whole(head)[:vocab_size])


def padded_logits(x: jax.Array, head: nnx.Param, *, vocab_size: int) -> jax.Array:
    """(..., D) -> (..., padded V) float32, -inf where the vocabulary is padded. (Cutting the padding off is a copy.)"""
    form = head.get_value()
    values = form.project(x, jnp.float32) if isinstance(form, WeightFormat) else _product(x, head[...])
    return jnp.where(jnp.arange(form.shape[0]) < vocab_size, values, -jnp.inf)


def _product(x: jax.Array, rows: jax.Array) -> jax.Array:
    return jnp.einsum("...d,vd->...v", x, rows.astype(x.dtype), preferred_element_type=jnp.float32)
