"""phijax.main with one more task: rows that the weights of the step write, as in training on a model's own answers."""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from phijax import tasks
from phijax.data.loader import open_shard_rows
from phijax.data.rows import ShardRows
from phijax.tasks import Task
from phijax.training.objectives import next_token


@jax.jit
def answered(table, head, tokens):
    """Rows (n, T) whose second half is, token by token, the best guess after the one before: of a model of pairs."""

    def one(token, _):
        best = jnp.argmax(table[token] @ head.T, -1).astype(jnp.int32)
        return best, best

    half = tokens.shape[1] // 2
    _, answers = jax.lax.scan(one, tokens[:, half - 1], length=half)
    return jnp.concatenate([tokens[:, :half], answers.T], 1)


class Rollouts(ShardRows):
    """Prompts of shards, answered by the weights; the answers alone are learned from."""

    needs_params = True

    def beginning_with(self, begin):
        return Rollouts(self.phases, self.shards, seed=self.seed, begin=begin)

    def fingerprint(self):
        return super().fingerprint() | {"answers": "greedy"}

    def read(self, places, state):
        prompts = super().read(places)
        table, head = (state.params[name] for name in ("embedding", "head"))
        written = np.array(answered(table, head, np.stack([row["tokens"] for row in prompts])))
        rows = []
        for row, tokens in zip(prompts, written, strict=True):
            weights = (np.arange(len(tokens)) >= len(tokens) // 2 - 1).astype(np.float32)
            rows.append(row | {"tokens": tokens, "targets": np.roll(tokens, -1), "weights": weights})
        return rows


def open_rollouts(data, *, vocab_size, seed):
    prompts = open_shard_rows(data, vocab_size=vocab_size, seed=seed)
    return Rollouts(prompts.phases, prompts.shards, seed=seed, begin=prompts.begin)


if __name__ == "__main__":
    tasks.TASKS["rollouts"] = Task(next_token, open_rollouts)  # before the config's types are made of the table
    from phijax import main

    sys.exit(main.entry())
