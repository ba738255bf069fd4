"""Which token comes next: settings, and the compiled choice from logits."""

import dataclasses
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from phijax.errors import UserError
from phijax.model.kernels.rows import each_row

# Below it logits are not divided, which float32 would not hold: any two that differ are then further apart than draws
# reach, so the most likely token it is. Above its inverse all that is finite is equal.
LEAST_TEMPERATURE = 1e-30
MOST_PENALTY = 1e3
MOST_INT32 = 2**31 - 1


def _whole(value: Any) -> int | None:
    """The whole number that a value is; None for any other, and for what is true or false."""
    try:
        return None if _is_truth(value) else operator.index(value)
    except TypeError:
        return None


def _real(value: Any) -> float | None:
    """As `_whole`, of any number; texts and arrays of several are none."""
    if _is_truth(value) or isinstance(value, str | bytes | bytearray) or getattr(value, "ndim", 0):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _is_truth(value: Any) -> bool:
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) == "bool"


def _several(value: Any) -> tuple | None:
    """What was given alone or in a list; None for what is neither."""
    if isinstance(value, str) or _whole(value) is not None:
        return (value,)
    if isinstance(value, Mapping | bytes | bytearray):  # they would count as a list of keys, of numbers
        return None
    try:
        return tuple(value)
    except TypeError:
        return None


_RANGES = {  # setting -> what a value is read by, which are right, and in words
    "max_tokens": (_whole, lambda n: n >= 0, "a whole number, 0 (no token) or above"),
    "temperature": (_real, lambda x: 0 <= x < math.inf, "a number, 0 (the most likely token) or above"),
    "top_k": (_whole, lambda n: n >= 0, "a whole number, 0 (all tokens) or above"),
    "top_p": (_real, lambda x: 0 <= x <= 1, "a number from 0 (the most likely token) to 1 (all tokens)"),
    "min_p": (_real, lambda x: 0 <= x <= 1, "a number from 0 (all tokens) to 1"),
    "repetition_penalty": (
        _real,
        lambda x: 1 / MOST_PENALTY <= x <= MOST_PENALTY,
        f"a number from {1 / MOST_PENALTY:g} to {MOST_PENALTY:g}; 1 is none",
    ),
    "seed": (_whole, lambda n: 0 <= n < 2**32, "a whole number from 0 to 2^32 - 1"),
}


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a text is continued.

    max_tokens: at most so many; 0: none, only the prompt is checked.
    temperature: divides the logits; 0 takes the most likely token.
    top_k: only the k most likely tokens; 0: all.
    top_p: only the most likely tokens that together reach this probability; 1: all, 0: the most likely token.
    min_p: only tokens at least this times as likely as the most likely; 0: all.
    repetition_penalty: divides positive logits of tokens that occurred, multiplies negative ones; 1: none.
    seed: a row's draws depend on it, the row's number and how many tokens it has: not on the rest of the batch.
    stop: texts that end the answer and are not part of it. stop_ids: tokens that do, beside those of the checkpoint.
      One alone may be given without a list.

    All are checked here and nowhere else; numbers may be NumPy's or JAX's. Raises: UserError for what means nothing.
    """

    max_tokens: int = 256
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self):
        for name, (number, is_right, allowed) in _RANGES.items():
            value = number(getattr(self, name))
            if value is None or not is_right(value):
                raise UserError(f"{name}={getattr(self, name)!r}: must be {allowed}.")
            object.__setattr__(self, name, value)
        texts = _several(self.stop)
        if texts is None or not all(isinstance(text, str) and text for text in texts):
            raise UserError(f"stop={self.stop!r}: must be a text that is not empty, or a list of such texts.")
        ids = _several(self.stop_ids)
        if ids is None or not all(_whole(i) is not None and i >= 0 for i in ids):
            raise UserError(f"stop_ids={self.stop_ids!r}: must be the id of a token, 0 or above, or a list of ids.")
        object.__setattr__(self, "stop", texts)
        object.__setattr__(self, "stop_ids", tuple(map(_whole, ids)))

    @property
    def draws(self) -> bool:
        """Whether a token is drawn; else the most likely one is taken."""
        return self.temperature >= LEAST_TEMPERATURE and self.top_p > 0


class Settings(NamedTuple):
    """What a row's tokens are chosen by, (B,) each: arguments of one program, whatever their values.

    temperature: 0 where nothing is drawn. name: the row's own number; its draws depend on it, its seed and how many
    tokens it was given.
    """

    temperature: jax.Array  # float32
    top_k: jax.Array  # int32
    top_p: jax.Array  # float32
    min_p: jax.Array  # float32
    repetition_penalty: jax.Array  # float32
    seed: jax.Array  # uint32
    name: jax.Array  # int32

    @classmethod
    def of(cls, s: Sampling, name: int = 0) -> "Settings":
        """Of one row, (1,) each. A temperature or a top_k that is too large for its type becomes the largest there is,
        which means the same.
        """
        types = (np.float32, np.int32, np.float32, np.float32, np.float32, np.uint32, np.int32)
        temperature = min(s.temperature, 1 / LEAST_TEMPERATURE) if s.draws else 0
        top_k = min(s.top_k, MOST_INT32)
        values = (temperature, top_k, s.top_p, s.min_p, s.repetition_penalty, s.seed, name)
        return cls(*(np.array([value], dtype) for dtype, value in zip(types, values, strict=True)))


def choose(
    settings: Settings, logits: jax.Array, seen: jax.Array, given: jax.Array, count: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The next token of each row, and its log-probability under the model itself (before any setting).

    What no row asks for is not computed: sorting a vocabulary costs milliseconds a row on CPU.

    Args:
      logits: (B, V) float32, -inf where the vocabulary is padded.
      seen: (B, V) bool, tokens that occurred; given: (B,) int32, how many tokens each row was given.
      count: rows that count, each with bits of its own and what it asks for alone; None: all, together.
    Returns: (B,) int32 and (B,) float32.
    """

    def asked(logits: jax.Array, seen: jax.Array, given: jax.Array, *settings: jax.Array) -> jax.Array:
        return _asked(Settings(*settings), logits, seen, given)

    # Where nobody asks for anything this is a good part of a step in four bits: one condition, outside of the loop over
    # rows, and in the loop nothing but what rounds. A maximum has the same bits in any order.
    highest = jnp.max(logits, axis=-1)
    tokens = jax.lax.cond(
        jnp.any((settings.temperature > 0) | (settings.repetition_penalty != 1)),
        lambda: each_row(asked, count)(logits, seen, given, *settings),
        lambda: _first_of(logits, highest),
    )
    return tokens, each_row(_logprob, count)(logits, highest, tokens)


def _logprob(logits: jax.Array, highest: jax.Array, tokens: jax.Array) -> jax.Array:
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return chosen - highest - jnp.log(jnp.sum(jnp.exp(logits - highest[:, None]), axis=-1))


def _asked(settings: Settings, logits: jax.Array, seen: jax.Array, given: jax.Array) -> jax.Array:
    penalises = jnp.any(settings.repetition_penalty != 1)
    return _drawn(settings, _where_any(penalises, penalised, logits, seen, settings.repetition_penalty), given)


def _drawn(settings: Settings, logits: jax.Array, given: jax.Array) -> jax.Array:
    draws = settings.temperature > 0

    def draw(logits, seed, name, number):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), name), number)
        return jax.random.categorical(key, logits).astype(jnp.int32)

    def drawn():
        scaled = logits / jnp.where(draws, settings.temperature, 1)[:, None]
        limits = (settings.top_k, settings.top_p, settings.min_p)
        filters = jnp.any(draws & ((settings.top_k > 0) | (settings.top_p < 1) | (settings.min_p > 0)))
        kept = _where_any(filters, filtered, scaled, *limits)
        tokens = jax.vmap(draw)(kept, settings.seed, settings.name, given)
        return jnp.where(draws, tokens, most_likely(logits))

    return jax.lax.cond(jnp.any(draws), drawn, lambda: most_likely(logits))


def _where_any(condition: jax.Array, f: Callable[..., jax.Array], logits: jax.Array, *rest: jax.Array) -> jax.Array:
    """f(logits, *rest) where the condition holds, else the logits."""
    return jax.lax.cond(condition, f, lambda logits, *_: logits, logits, *rest)


def most_likely(logits: jax.Array) -> jax.Array:
    """(B, V) -> (B,) int32: argmax, the first of equals, NaN before all.

    As a maximum and a minimum it is vectorised on CPU, which argmax is not: 1.7 ms for 8 rows of 49,152.
    """
    return _first_of(logits, jnp.max(logits, axis=-1))


def _first_of(logits: jax.Array, highest: jax.Array) -> jax.Array:
    """(B, V), the maximum of each row (B,) -> (B,) int32, its first place."""
    index = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    found = (logits == highest[:, None]) | jnp.isnan(logits)
    return jnp.min(jnp.where(found, index, logits.shape[-1] - 1), axis=-1)


def penalised(logits: jax.Array, seen: jax.Array, penalty: jax.Array) -> jax.Array:
    """Keskar et al. 2019, arXiv:1909.05858, section 4.1, with transformers' sign rule. (B, V), penalty (B,)."""
    penalty = penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def filtered(logits: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array) -> jax.Array:
    """(B, V) -> (B, V) with -inf for what top-k, then top-p of the rest, then min-p exclude; ties are kept together.

    A row that asks for none (0, 1, 0) stays as it is. Settings are (B,).
    top-p: Holtzman et al. 2020, arXiv:1904.09751; min-p: Nguyen et al. 2024, arXiv:2407.01082.
    """
    top_k, top_p, min_p = top_k[:, None], top_p[:, None], min_p[:, None]
    falling = -jnp.sort(-logits, axis=-1)
    index = jnp.arange(falling.shape[-1])
    falling = jnp.where(index < jnp.where(top_k > 0, top_k, falling.shape[-1]), falling, -jnp.inf)
    p = jax.nn.softmax(falling)
    above = jnp.cumsum(p, axis=-1) - p  # probability of all that is more likely; 0 for the first
    # top_p = 1 keeps all, whatever the rounding of the sum; the first stays, though top_p be 0 in float32.
    kept = ((above < top_p) | (top_p >= 1) | (index == 0)) & (p >= min_p * p[..., :1]) & (falling > -jnp.inf)
    lowest = jnp.min(jnp.where(kept, falling, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= lowest, logits, -jnp.inf)
