"""The rows that are being decoded, as one value: a row enters, all take a step, a row leaves.

Each function takes a batch and returns the next one; what it was given is donated. A row has a slot; its numbers depend
neither on which one it is nor on the others. Settings, limits and stops are arrays, so that no setting, and neither a
row that comes nor one that goes, compiles anything anew.
"""

import functools
from collections.abc import Collection, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from phijax.inference import programs
from phijax.inference.sampling import Sampling, Settings, choose
from phijax.model import cached
from phijax.model.config import ModelConfig
from phijax.model.inference_layout import InferenceLayout


class Rows(NamedTuple):
    """Where each row stands and what it asks for; (B,) where nothing else is said.

    A row that is done keeps being computed, at one place, until another takes its slot or no row after it is left.
    """

    tokens: jax.Array  # int32, the next to be fed
    positions: jax.Array  # int32, its place
    given: jax.Array  # int32, how many tokens the row was given
    limits: jax.Array  # int32, how many it may be given
    done: jax.Array  # bool; true of an empty slot
    frequencies: jax.Array  # (B, R/2) float32, radians per token
    settings: Settings
    seen: jax.Array  # (B, V) bool, tokens that occurred
    stops: jax.Array  # (B, V) bool, tokens that end the row


class Batch(NamedTuple):
    """The cache may have fewer rows than `rows`: of a batch of one, the others are surplus."""

    cache: cached.Cache
    rows: Rows


class Chosen(NamedTuple):
    """What a step gave to each row. Of a row that was done before it means nothing."""

    tokens: jax.Array  # (B,) int32
    logprobs: jax.Array  # (B,) float32, under the model before any setting
    logits: jax.Array  # (B, padded V) float32, what the token was chosen from


def empty(c: ModelConfig, cache: cached.Cache, rows: int, where: NamedSharding) -> Batch:
    """Over an empty cache, or one that a row is to enter with. where: of the rows, whole on every device."""
    one = row(c, [0], frequencies=np.zeros(c.rotary_dim // 2), limit=0, sampling=Sampling(temperature=0))
    one = one._replace(done=np.array([True]))
    return Batch(cache, jax.device_put(jax.tree.map(lambda a: np.repeat(a, rows, axis=0), one), where))


def row(
    c: ModelConfig,
    ids: Sequence[int],
    *,
    frequencies: np.ndarray,
    limit: int,
    sampling: Sampling,
    name: int = 0,
    stop_ids: Collection[int] = (),
) -> Rows:
    """One row, (1, ...) each, that continues `ids`.

    Args:
      limit: at most so many tokens; sampling.max_tokens is not read.
      name: the row's own number, for its draws.
      stop_ids: tokens that end it; sampling.stop_ids are not read.
    """

    def members(tokens: Collection[int]) -> np.ndarray:
        out = np.zeros((1, c.padded_vocab_size), bool)
        out[0, [token for token in tokens if token < c.vocab_size]] = True  # no other token is ever chosen
        return out

    def number(value: int) -> np.ndarray:
        return np.array([value], np.int32)

    return Rows(
        tokens=number(ids[-1]),
        positions=number(len(ids) - 1),
        given=number(0),
        limits=number(limit),
        done=np.array([False]),
        frequencies=np.asarray(frequencies, np.float32)[None],
        settings=Settings.of(sampling, name),
        seen=members(ids),
        stops=members(stop_ids),
    )


def enter(
    layout: InferenceLayout,
    batch: Batch,
    slot: int,
    new: Rows,
    prompt: cached.Cache | None,
    logits: jax.Array,
    *,
    own_bits: bool,
) -> tuple[Batch, Chosen]:
    """A row begins in a slot that is empty or done; its first token is chosen.

    Args:
      new: as `row` gives it.
      prompt: cache of one row, of which the batch's cache is as long or longer; None: the batch's has the row already.
      logits: (1, padded V), the model's behind the row's ids.
      own_bits: each row's bits depend on it alone, which needs one device.
    Returns: the batch, and what was chosen, of one row.
    """
    last = int(new.positions[0]) + int(new.limits[0])
    assert last < programs.places(layout, batch.cache), "the row is longer than the cache"
    cache = batch.cache if prompt is None else programs.insert(layout, batch.cache, prompt, np.int32(slot))
    where = batch.rows.tokens.sharding
    rows, chosen = _entered(where, batch.rows, np.int32(slot), new, logits, np.int32(1) if own_bits else None)
    return Batch(cache, rows), chosen


def step(
    c: ModelConfig,
    layout: InferenceLayout,
    attention_factor: float,
    weights: cached.Weights,
    batch: Batch,
    count: int | None,
) -> tuple[Batch, Chosen]:
    """Feeds each row's token and chooses its next.

    Args: count: rows beyond so many are done, and are not computed; each of the others has bits of its own. None: no
      such promise, as on several devices.
    """
    rows, counted = batch.rows, None if count is None else np.int32(count)
    logits, cache = programs.step(
        c, layout, attention_factor, weights, batch.cache, rows.tokens, rows.positions, rows.frequencies, counted
    )
    rows, chosen = _continued(rows.tokens.sharding, rows, logits, counted)
    return Batch(cache, rows), chosen


def leave(batch: Batch, slot: int) -> Batch:
    """The row in the slot is done; another may enter there."""
    return batch._replace(rows=_left(batch.rows, np.int32(slot)))


def turned(layout: InferenceLayout, batch: Batch, slot: int, prompt: cached.Cache, frequencies: np.ndarray) -> Batch:
    """The row in the slot goes on over another cache, whose keys were rotated by these frequencies (R/2,)."""
    cache = programs.insert(layout, batch.cache, prompt, np.int32(slot))
    return Batch(cache, _turned(batch.rows, np.int32(slot), np.asarray(frequencies, np.float32)))


@functools.partial(jax.jit, static_argnums=(0,), donate_argnums=(1,))
def _entered(where, rows: Rows, slot: jax.Array, new: Rows, logits: jax.Array, count) -> tuple[Rows, Chosen]:
    # Two of it, since arrays of one row have other bits (`each_row`).
    pair, twice = jax.tree.map(lambda a: jnp.concatenate([a, a]), (new, logits))
    pair, chosen = _chosen(pair, twice, count)
    rows = jax.tree.map(lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b[:1], slot, 0), rows, pair)
    return _kept_at(where, rows), jax.tree.map(lambda a: a[:1], chosen)


@functools.partial(jax.jit, static_argnums=(0,), donate_argnums=(1,))
def _continued(where, rows: Rows, logits: jax.Array, count: jax.Array | None) -> tuple[Rows, Chosen]:
    rows, chosen = _chosen(rows, logits, count)
    return _kept_at(where, rows), chosen


@functools.partial(jax.jit, donate_argnums=(0,))
def _left(rows: Rows, slot: jax.Array) -> Rows:
    return rows._replace(done=rows.done.at[slot].set(True))


@functools.partial(jax.jit, donate_argnums=(0,))
def _turned(rows: Rows, slot: jax.Array, frequencies: jax.Array) -> Rows:
    return rows._replace(frequencies=rows.frequencies.at[slot].set(frequencies))


def _kept_at(where: NamedSharding, rows: Rows) -> Rows:
    """Where they were: logits may be cut over chips, and rows that came to be cut so were another program's."""
    return jax.lax.with_sharding_constraint(rows, where)


def _chosen(rows: Rows, logits: jax.Array, count: jax.Array | None) -> tuple[Rows, Chosen]:
    settings = rows.settings._replace(  # what is done asks for nothing
        temperature=jnp.where(rows.done, 0, rows.settings.temperature),
        repetition_penalty=jnp.where(rows.done, 1, rows.settings.repetition_penalty),
    )
    tokens, logprobs = choose(settings, logits, rows.seen, rows.given, count)
    tokens = jnp.where(rows.done, rows.tokens, tokens)
    each, new = jnp.arange(tokens.shape[0]), ~rows.done
    given = rows.given + new
    rows = rows._replace(
        tokens=tokens,
        positions=rows.positions + new,
        given=given,
        done=rows.done | rows.stops[each, tokens] | (given >= rows.limits),
        seen=rows.seen.at[each, tokens].set(True),
    )
    return rows, Chosen(tokens, logprobs, logits)
