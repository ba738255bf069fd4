"""Token embedding under the mesh."""

import jax
import jax.numpy as jnp

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
