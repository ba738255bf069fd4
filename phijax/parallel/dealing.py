"""A sequence dealt over `context`, so that causal attention is as much work on every chip.

The row is cut into 2n blocks for n chips. In order chip i holds blocks 2i and 2i + 1, and the last chip sees nearly all
keys while the first sees few. Dealt, it holds blocks i and 2n - 1 - i: one early, one late, together the same number of
keys for all. Nothing but attention can tell the difference.
"""

import jax
import jax.numpy as jnp
import numpy as np

from phijax.parallel import sharding

AXIS = "context"


def order(length: int, chips: int) -> np.ndarray:
    """(T,) int32: which place of the row lies at each place of the dealt one."""
    blocks = np.array([block for i in range(chips) for block in (i, 2 * chips - 1 - i)])
    size = length // (2 * chips)
    return (blocks[:, None] * size + np.arange(size)).reshape(-1).astype(np.int32)


def behind(first: int | jax.Array, length: int, chips: int) -> int | jax.Array:
    """By how much the place in the row lies behind the place in the dealt row, for the block that `first` is in.

    Args:
      first: a place of the dealt row; traced scalars and numpy's do.
    """
    size = length // (2 * chips)
    block = first // size
    # Chip c = block // 2; its blocks, at 2c and 2c + 1, are c and 2n - 1 - c of the row.
    chip = block // 2
    return size * ((block % 2) * (2 * chips - 2 - 2 * chip) - chip)


def deal(x: jax.Array, axis: int) -> jax.Array:
    """Moves the halves of every chip's part to where they are dealt, two messages a chip; alone it is left as it is.

    Args:
      axis: of x, cut over `context`, the only one that this mesh axis cuts.
    """
    return _exchange(x, axis, back=False)


def undeal(x: jax.Array, axis: int) -> jax.Array:
    """The inverse of `deal`."""
    return _exchange(x, axis, back=True)


def _exchange(x: jax.Array, axis: int, *, back: bool) -> jax.Array:
    chips = sharding.mesh_sizes()[AXIS]
    if chips == 1:
        return x
    # Block b of the row lies on chip b // 2 in order, and dealt on chip b or 2n - 1 - b, whichever there is.
    pairs = [[(b // 2, min(b, 2 * chips - 1 - b)) for b in range(half, 2 * chips, 2)] for half in (0, 1)]

    def local(x: jax.Array) -> jax.Array:
        is_odd = jax.lax.axis_index(AXIS) % 2 == 1
        first, second = jnp.split(x, 2, axis)
        if back:  # an even chip's first half is an even block, an odd chip's second half is
            first, second = jnp.where(is_odd, second, first), jnp.where(is_odd, first, second)
        messages = [[(b, a) for a, b in half] if back else half for half in pairs]
        first = jax.lax.ppermute(first, AXIS, messages[0])
        second = jax.lax.ppermute(second, AXIS, messages[1])
        if not back:
            first, second = jnp.where(is_odd, second, first), jnp.where(is_odd, first, second)
        return jnp.concatenate([first, second], axis)

    place = jax.sharding.PartitionSpec(*[None] * axis, AXIS)
    return jax.shard_map(local, in_specs=place, out_specs=place, axis_names={AXIS}, check_vma=False)(x)
