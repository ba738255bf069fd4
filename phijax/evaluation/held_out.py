"""Held-out loss and perplexity by data set, in the training loop, on its mesh, without recompiling."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from phijax.errors import UserError


@dataclasses.dataclass(frozen=True)
class HeldOutSet:
    """A shard folder that is read in file order, once."""

    name: str = ""  # of its metrics, as heldout_loss/NAME
    path: str = ""  # a folder of shards


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Section `evaluation`."""

    every_steps: int = 1000  # between two evaluations; one more after the last step
    sets: tuple[HeldOutSet, ...] = ()
    sequence_length: int | None = None  # None: the first phase's
    batch_size: int | None = None  # None: a micro-batch of the first phase
    max_rows: int | None = None  # of each set; None: all


def check_sets(config: EvaluationConfig) -> None:
    """Raises: UserError for sets whose scores could not be told apart or found."""
    names = [held_out.name for held_out in config.sets]
    for held_out in config.sets:
        if not held_out.name or not held_out.path:
            raise UserError(f"evaluation.sets: every set needs a name and a path, not {held_out}.")
        if names.count(held_out.name) > 1:
            raise UserError(f"evaluation.sets: the name {held_out.name!r} is there twice.")
    for name in ("every_steps", "sequence_length", "batch_size", "max_rows"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"evaluation.{name}={value} must be at least 1.")


def score_name(config: EvaluationConfig, asked: str | None) -> str | None:
    """The metric that `checkpoint.keep_best` means: of a set's name its loss. None stays None. Raises: UserError."""
    names = [held_out.name for held_out in config.sets]
    metrics = [f"heldout_{kind}/{name}" for name in names for kind in ("loss", "perplexity")]
    if asked is None or asked in metrics:
        return asked
    if asked in names:
        return f"heldout_loss/{asked}"
    raise UserError(
        f"checkpoint.keep_best={asked!r} is neither a set of evaluation.sets ({', '.join(names) or 'there is none'}) "
        f"nor the loss or perplexity of one{f' ({metrics[0]}, say)' if metrics else ''}."
    )


class HeldOut:
    """One data set's evaluator: called with (params, frozen), gives its metrics."""

    def __init__(
        self,
        name: str,
        step: Callable[[Any, Any, Any], tuple[jax.Array, jax.Array]],
        batches: Callable[[], Iterable[Any]],
    ):
        """
        Args:
          step: compiled; (params, frozen, batch) -> sums (nll in nats, weight).
          batches: starts the set anew.
        """
        self._name = name
        self._step = step
        self._batches = batches

    def __call__(self, params: Any, frozen: Any) -> dict[str, float]:
        """Loss in nats a token and perplexity, over all tokens of the set, summed in float64 on the host."""
        sums = [self._step(params, frozen, batch) for batch in self._batches()]
        nll = sum(float(jnp.float32(part)) for part, _ in sums)
        weight = sum(float(jnp.float32(part)) for _, part in sums)
        loss = nll / weight if weight else math.nan  # of no token: 0 would be the best loss there is
        return {
            f"heldout_loss/{self._name}": loss,
            f"heldout_perplexity/{self._name}": math.exp(min(loss, 700.0)),
            f"heldout_tokens/{self._name}": weight,
        }
