"""The decoder: one stack of equal blocks, scanned or unrolled, rematerialised here and nowhere else."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from phijax.errors import UserError
from phijax.model.backend import Backend
from phijax.model.block import Block
from phijax.model.config import ModelConfig
from phijax.model.kernels.splash import RESIDUALS
from phijax.model.norm import make_norm
from phijax.model.rope import inverse_frequencies, rope_table
from phijax.model.training_ops import TrainingOps
from phijax.model.vocabulary import embed, logits, with_positions
from phijax.model.weights import normal, weight, whole
from phijax.parallel import dealing, sharding

SAVEABLE = ("query", "key", "value", "attention", RESIDUALS, "mid", "gate", "up", "activation")

# Policy -> what the backward pass finds saved, from most memory to least. None: everything, nothing is recomputed.
REMAT_POLICIES: dict[str, tuple[str, ...] | None] = {
    "none": None,
    "save_all": SAVEABLE,
    "save_all_but_activation": tuple(name for name in SAVEABLE if name != "activation"),
    "save_mid_gate_up": ("attention", RESIDUALS, "mid", "gate", "up"),
    "save_attention": ("attention", RESIDUALS),
    "full": (),
}


class Decoder(nnx.Module):
    """Embedding (and a table of positions, where they are learned), L blocks, final norm, head.

    The blocks' leaves are declared once and stacked in front by `params`.
    """

    def __init__(self, c: ModelConfig):
        rows, start = (c.padded_vocab_size, c.model_dim), normal(c.model_dim**-0.5)
        self.embedding = weight(rows, ("vocab", "embed"), start, kind="embedding")
        self.position_embedding = position_table(c) if c.positions == "learned" else None
        self.blocks = Block(c)
        self.final_norm = make_norm(c, feeds=None if c.tied_head else "head")
        self.head = None if c.tied_head else weight(rows, ("vocab", "embed"), start, kind="head")
        self.c = c

    def hidden(
        self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array, backend: Backend, *, length: int
    ) -> jax.Array:
        """What the head sees.

        Args:
          tokens, positions, segment_ids: (B, T) int32.
          length: declared sequence length of the program; decides the LongRoPE list.
        Returns: (B, T, D) in the compute dtype, after the final norm.
        Raises: UserError for rows longer than a table of positions.
        """
        deals = backend.attention == "splash"  # the one path that takes rows dealt over `context`
        if deals:
            tokens, positions, segment_ids = (dealing.deal(x, 1) for x in (tokens, positions, segment_ids))
        frequencies = inverse_frequencies(self.c, length)
        rope = rope_table(self.c, positions, *frequencies, backend.dtype, by_matmul=backend.rope_by_matmul)
        ops = TrainingOps(self.c, rope, segment_ids, backend)
        x = embed(whole(self.embedding), tokens, backend.dtype)
        if self.position_embedding is not None:
            if tokens.shape[1] > self.c.max_position:
                raise UserError(
                    f"rows of {tokens.shape[1]} tokens; this model has learned {self.c.max_position} positions "
                    "(model.max_position)."
                )
            x = with_positions(x, self.position_embedding, positions)
        x = sharding.constrain(x, ("act_batch", "act_time", "act_embed"))
        body = rematerialised(lambda x, block: block(x, None, ops)[0], backend)
        if backend.scan_layers:
            x, _ = jax.lax.scan(lambda x, block: (body(x, block), None), x, self.blocks)
        else:
            for block in unstack(self.blocks, self.c.num_layers):
                x = body(x, block)
        x = self.final_norm(x)
        return dealing.undeal(x, 1) if deals else x

    def logits(self, hidden: jax.Array) -> jax.Array:
        """(B, T, D) -> (B, T, V) float32, the padded vocabulary cut off. Training never makes these in full."""
        return logits(hidden, self.output, vocab_size=self.c.vocab_size)

    def head_rows(self) -> jax.Array:
        """(padded V, D) float32, as the loss takes them."""
        return whole(self.output)

    @property
    def output(self) -> nnx.Param:
        """The head, or the embedding where they are tied."""
        return self.embedding if self.head is None else self.head


def position_table(c: ModelConfig) -> nnx.Param:
    """(max_position, D), whole on every chip, its start GPT-2's own: openai/gpt-2, src/model.py, `wpe`."""
    return weight((c.max_position, c.model_dim), ("position", "embed"), normal(0.01), decayed=True)


def rematerialised(body: Callable, backend: Backend) -> Callable:
    """`body` under the backend's policy: a name of REMAT_POLICIES, or names to save joined with '+'."""
    names = remat_names(backend.remat)
    if names is None:
        return body
    if backend.attention == "splash" and RESIDUALS in names:
        # The kernel's output is among its residuals: under both names it is kept twice (seen on the TPU compiler).
        names = tuple(name for name in names if name != "attention")
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    # Inside a scan nothing can be merged across iterations, and the barriers that prevent it cost copies.
    return jax.checkpoint(body, policy=policy, prevent_cse=not backend.scan_layers)


def remat_names(policy: str) -> tuple[str, ...] | None:
    """Raises: UserError for a policy that is neither known nor made of saveable names."""
    if policy in REMAT_POLICIES:
        return REMAT_POLICIES[policy]
    names = tuple(policy.split("+"))
    unknown = [name for name in names if name not in SAVEABLE]
    if unknown:
        raise UserError(
            f"model.remat={policy!r} is not known. Policies: {', '.join(REMAT_POLICIES)}; "
            f"or names to save joined with '+': {', '.join(SAVEABLE)}."
        )
    return names


def unstack(tree: Any, count: int) -> list[Any]:
    """A stacked tree -> `count` trees. Its gradient is one stack; sliced singly, each layer would add into zeros."""

    @jax.custom_vjp
    def split(tree):
        return [jax.tree.map(lambda a, i=i: a[i], tree) for i in range(count)]

    def backward(_, cotangents):
        return (jax.tree.map(lambda *rows: jnp.stack(rows), *cotangents),)

    split.defvjp(lambda tree: (split(tree), None), backward)
    return split(tree)
