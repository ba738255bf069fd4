"""What is minimised: parameters and one micro-batch -> sums over its tokens."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from phijax.errors import UserError
from phijax.model import params as model_params
from phijax.model.backend import Backend
from phijax.model.config import ModelConfig
from phijax.model.cross_entropy import LossConfig, cross_entropy

# (params, frozen, micro-batch of (B, T) arrays, key) -> (loss sum, weight sum, auxiliary sums)
Objective = Callable[[Any, Any, Mapping[str, jax.Array], jax.Array], tuple[jax.Array, jax.Array, dict[str, jax.Array]]]


def next_token(c: ModelConfig, backend: Backend, *, length: int, loss: LossConfig) -> Objective:
    """Pretraining and SFT: weighted cross entropy of `targets`.

    Auxiliary `nll`: the plain negative log-likelihood, without z-loss and smoothing, in nats.
    """

    def objective(params, frozen, batch, key):
        del frozen, key  # nothing is frozen and nothing is random
        decoder = model_params.module(c, params)
        x = decoder.hidden(batch["tokens"], batch["positions"], batch["segment_ids"], backend, length=length)
        total, nll = cross_entropy(
            x, decoder.head_rows(), batch["targets"], batch["weights"], vocab_size=c.vocab_size, loss=loss
        )
        return total, jnp.sum(batch["weights"]), {"nll": nll}

    return objective


class ReadBatch(Mapping):
    """A micro-batch that remembers, while the step is traced, which of its keys were read."""

    def __init__(self, arrays: Mapping[str, jax.Array]):
        self._arrays = dict(arrays)
        self._read: set[str] = set()

    def __getitem__(self, name: str) -> jax.Array:
        if name not in self._arrays:
            raise UserError(f"the objective reads {name!r}, which the batch lacks: it has {sorted(self._arrays)}.")
        self._read.add(name)
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def check_all_read(self) -> None:
        """Raises: UserError when a key was carried along but never used: a mask, say, that silently does nothing."""
        unread = sorted(set(self._arrays) - self._read)
        if unread:
            raise UserError(
                f"the batch has {', '.join(map(repr, unread))}, which the objective does not read (it reads "
                f"{', '.join(sorted(self._read))}). Remove it from the batch, or take an objective that uses it."
            )
