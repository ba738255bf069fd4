"""Held-out scores by data set, in the training loop, on its mesh, without recompiling."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from phijax.errors import UserError
from phijax.model.cross_entropy import NLL


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


def score_name(config: EvaluationConfig, asked: str | None, score: str) -> str | None:
    """The metric that `checkpoint.keep_best` means: of a set's name its loss. None stays None.

    Args: score: the objective's, which the loss is the mean of.
    Raises: UserError.
    """
    names = [held_out.name for held_out in config.sets]
    kinds = ["loss", "perplexity"] if score == NLL else ["loss"]
    metrics = [f"heldout_{kind}/{name}" for name in names for kind in kinds]
    if asked is None or asked in metrics:
        return asked
    if asked in names:
        return f"heldout_loss/{asked}"
    raise UserError(
        f"checkpoint.keep_best={asked!r} is neither a set of evaluation.sets ({', '.join(names) or 'there is none'}) "
        f"nor the {' or '.join(kinds)} of one{f' ({metrics[0]}, say)' if metrics else ''}."
    )


class HeldOut:
    """One data set's evaluator: called with (params, frozen), gives its metrics."""

    def __init__(
        self,
        name: str,
        step: Callable[[Any, Any, Any], tuple[jax.Array, ...]],
        batches: Callable[[], Iterable[Any]],
        means: Mapping[str, str],
    ):
        """
        Args:
          step: compiled; (params, frozen, batch) -> the sums of `means`, then the counts of their divisors.
          batches: starts the set anew.
          means: sum -> divisor, as the objective declares them, the score first (Objective.held_out).
        """
        self._name = name
        self._step = step
        self._batches = batches
        self._means = dict(means)

    def __call__(self, params: Any, frozen: Any) -> dict[str, float]:
        """Means over the whole set, summed in float64 on the host: the score as loss, in nats as perplexity too."""
        names = [*self._means, *dict.fromkeys(self._means.values())]
        totals = dict.fromkeys(names, 0.0)
        parts = [self._step(params, frozen, batch) for batch in self._batches()]
        for part in parts:  # all steps are dispatched before the first is awaited
            for name, value in zip(names, part, strict=True):
                totals[name] += float(jnp.float32(value))
        score, out = names[0], {}
        for name, divisor in self._means.items():
            count = totals[divisor]
            mean = totals[name] / count if count else math.nan  # of nothing: 0 would be the best loss there is
            out["loss" if name == score else name] = mean
            if name == score == NLL:
                out["perplexity"] = math.exp(min(mean, 700.0))
        out |= {divisor: totals[divisor] for divisor in self._means.values()}
        return {f"heldout_{name}/{self._name}": value for name, value in out.items()}
