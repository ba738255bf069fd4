"""What is minimised, and what is shown of it: parameters and one micro-batch -> sums, nothing divided yet."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from phijax.data.batch import TEXT_KEYS, BatchKey
from phijax.errors import UserError
from phijax.model import params as model_params
from phijax.model.backend import Backend
from phijax.model.config import ModelConfig
from phijax.model.cross_entropy import NLL, LossConfig, cross_entropy

Sums = dict[str, jax.Array]  # scalars, float32

# What a sum is divided by where it is shown -> the metric that says how much of it there was.
DIVISORS = {"tokens": "predicted_tokens", "pairs": "pairs", "sequences": "sequences"}
# Names of what is shown beside an objective's sums, of a step or of held-out data.
TAKEN = frozenset(
    "loss weight grad_norm skipped skipped_in_a_row learning_rate skipped_steps perplexity".split()
    + [*DIVISORS, *DIVISORS.values()]
)


@dataclasses.dataclass(frozen=True, eq=False)
class Objective:
    """A function to minimise, and what it declares; everything else follows from the declaration.

    reads: every key of its batches. A key more or less is an error, and so is one that it does not look at.
    sums: name of an auxiliary sum -> its divisor. The quotients are metrics of a step, and scores of held-out data.
    divisor: of the loss, and so of the gradients. A step that has none of it changes nothing.
    score: the sum that held-out data are judged by, as `heldout_loss`: one of `sums`, or "loss" itself.
    function: (params, frozen, micro-batch of (B, T, ...) arrays, key) -> (loss sum, divisor -> how many there are,
      auxiliary sums), float32 scalars.
    """

    reads: Mapping[str, BatchKey]
    sums: Mapping[str, str]
    function: Callable[[Any, Any, Mapping[str, jax.Array], jax.Array], tuple[jax.Array, Sums, Sums]]
    divisor: str = "tokens"
    score: str = "loss"

    def __post_init__(self):
        unknown = {self.divisor, *self.sums.values()} - set(DIVISORS)
        if unknown or self.score not in {"loss", *self.sums}:
            raise ValueError(f"divisors are {', '.join(DIVISORS)}, a score is the loss or one of the sums: {self}")
        if taken := TAKEN & set(self.sums):
            raise ValueError(f"{sorted(taken)} are shown of every step or set; the objective's sums need other names")

    def __call__(self, params: Any, frozen: Any, batch: Mapping[str, jax.Array], key: jax.Array):
        """`function`, held to what is declared. Raises: UserError for other batch keys, ValueError for other sums."""
        read = ReadBatch(batch)
        loss_sum, counts, sums = self.function(params, frozen, read, key)
        read.check_all_read()
        if set(read) != set(self.reads):
            raise UserError(f"the batch has {sorted(read)}; the objective declares that it reads {sorted(self.reads)}.")
        if set(sums) != set(self.sums) or set(counts) != {self.divisor, *self.sums.values()}:
            raise ValueError(f"the objective gave sums {sorted(sums)} and counts {sorted(counts)}, not as declared")
        return loss_sum, counts, sums

    @property
    def held_out(self) -> dict[str, str]:
        """Sum -> divisor, of what held-out data are given: the score first, then all that is declared."""
        return {self.score: self.divisor, **self.sums}

    @property
    def shown(self) -> dict[str, str]:
        """Metric of a step -> the metric that says of how much it is the mean."""
        return {name: DIVISORS[divisor] for name, divisor in {"loss": self.divisor, **self.sums}.items()}


MakeObjective = Callable[..., Objective]  # as next_token


def next_token(c: ModelConfig, backend: Backend, *, length: int, loss: LossConfig) -> Objective:
    """Pretraining and SFT: weighted cross entropy of `targets`.

    `nll` is the plain negative log-likelihood, without z-loss and smoothing, in nats.
    """

    def function(params, frozen, batch, key):
        del frozen, key  # nothing is frozen and nothing is random
        decoder = model_params.module(c, params)
        x = decoder.hidden(batch["tokens"], batch["positions"], batch["segment_ids"], backend, length=length)
        total, nll = cross_entropy(
            x, decoder.head_rows(), batch["targets"], batch["weights"], vocab_size=c.vocab_size, loss=loss
        )
        return total, {"tokens": jnp.sum(batch["weights"])}, {NLL: nll}

    return Objective(TEXT_KEYS, {NLL: "tokens"}, function, score=NLL)


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
