"""Continuing a text, the plain way: the whole window is computed anew for every token. Small models, short texts."""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from phijax.model import params as model_params
from phijax.model.backend import Backend
from phijax.model.config import ModelConfig


def sample(
    c: ModelConfig,
    params: model_params.Params,
    backend: Backend,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
    stop: int,
    window: int,
) -> Iterator[int]:
    """Yields up to `max_tokens` ids that follow `prompt`, ending before the id `stop`.

    Args:
      temperature: divides the logits; 0 takes the most likely token.
      window: tokens that the model sees; older ones are dropped, so positions start anew. Also the declared length.
    """
    key = jax.random.key(seed)
    text = list(prompt)[-window:]
    for number in range(max_tokens):
        seen = text[-window:]
        tokens = np.zeros((1, window), np.int32)
        tokens[0, : len(seen)] = seen
        draw = jax.random.fold_in(key, number)
        token = int(_next(c, backend, window, params, tokens, len(seen) - 1, draw, jnp.float32(temperature)))
        if token == stop:
            return
        text.append(token)
        yield token


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _next(c, backend, window, params, tokens, last, key, temperature):
    """The id after place `last` of tokens (1, window); what stands behind it is not seen, since attention is causal."""
    decoder = model_params.module(c, params)
    positions = jnp.arange(window, dtype=jnp.int32)[None]
    hidden = decoder.hidden(tokens, positions, jnp.ones_like(positions), backend, length=window)
    logits = decoder.logits(jax.lax.dynamic_slice_in_dim(hidden, last, 1, axis=1))[0, 0]
    warm = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature > 0, warm, jnp.argmax(logits))
