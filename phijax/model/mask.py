"""Which keys a query sees: one value, which every attention kernel takes or refuses."""

import dataclasses

import jax

from phijax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Mask:
    """By places in a row alone; packed segments are arrays, and an argument of the kernels that take packed rows.

    causal: no key after the query.
    window: W keys, the query's own included; on both sides where the mask is not causal. None: no limit.
    """

    causal: bool = True
    window: int | None = None

    def sees(self, distance: jax.Array) -> jax.Array:
        """distance: the query's place less the key's, of any shape -> bool."""
        seen = distance >= 0 if self.causal else distance == distance
        if self.window is not None:
            seen &= distance < self.window
            if not self.causal:
                seen &= -distance < self.window
        return seen


def visible(
    mask: Mask, query_index: jax.Array, key_index: jax.Array, query_segments: jax.Array, key_segments: jax.Array
) -> jax.Array:
    """Which keys of a packed row a query sees: those of its own segment that the mask lets it see.

    Args:
      query_index, key_index: (T,) and (S,) int32, places in the row.
      query_segments, key_segments: (B, T) and (B, S) int32.
    Returns: (B, T, S) bool. A query always sees itself, so no row is empty, padding (segment 0) included.
    """
    seen = mask.sees(query_index[:, None] - key_index[None, :])
    return seen[None] & (query_segments[:, :, None] == key_segments[:, None, :])


def causal_window(mask: Mask, kernel: str) -> int | None:
    """The window, for a kernel that computes causal masks alone.

    Raises: UserError for a mask that it would compute wrongly.
    """
    if not mask.causal:
        raise UserError(
            f"{kernel} attention computes causal masks alone, not {mask}. Of training and evaluation, "
            "--config.model.attention=dense computes any."
        )
    return mask.window
