"""AdamW in Optax: schedules that read the state's step, clipping, decay on matrices only."""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from phijax.errors import UserError

Optimizer = optax.GradientTransformationExtraArgs


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Section `optimizer`."""

    learning_rate: float = 3e-4  # the peak
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"  # after the warmup
    warmup_steps: int = 2000  # in which the rate grows linearly from 0
    decay_fraction: float = 0.1  # wsd: share of all steps that the final linear decay takes
    final_fraction: float = 0.1  # of the peak, reached at the last step (wsd and linear usually 0)
    b1: float = 0.9  # decay of AdamW's first moment
    b2: float = 0.95  # and of its second
    eps: float = 1e-8  # added to the root of the second
    weight_decay: float = 0.1  # decoupled, on matrices
    clip_norm: float | None = 1.0  # of the whole gradient
    max_skipped_steps: int = 10  # not finite, in a row: then the run stops
    moments: Literal["device", "host"] = "device"  # whose memory Adam's two lie in, 8 bytes a parameter

    @property
    def moments_on_host(self) -> bool:
        return self.moments == "host"

    def check(self, total_steps: int) -> None:
        """Raises: UserError for numbers that make no schedule."""
        if not 0 <= self.warmup_steps <= total_steps:
            raise UserError(
                f"optimizer.warmup_steps={self.warmup_steps} does not lie between 0 and the {total_steps} steps of all "
                f"phases. Try --config.optimizer.warmup_steps={max(1, total_steps // 50)}"
            )
        if not 0 < self.decay_fraction <= 1 or not 0 <= self.final_fraction <= 1:
            raise UserError("optimizer.decay_fraction must be in (0, 1] and optimizer.final_fraction in [0, 1].")
        for name in ("learning_rate", "eps", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"optimizer.{name}={value} must be a number above 0.")
        if not 0 <= self.b1 < 1 or not 0 <= self.b2 < 1:
            raise UserError(f"optimizer.b1={self.b1} and optimizer.b2={self.b2} must be in [0, 1).")
        if not 0 <= self.weight_decay < math.inf:
            raise UserError(f"optimizer.weight_decay={self.weight_decay} must be 0 or above.")
        if self.max_skipped_steps < 1:
            raise UserError(f"optimizer.max_skipped_steps={self.max_skipped_steps} must be 1 or more.")


def learning_rate(config: OptimizerConfig, step: jax.Array, total_steps: int) -> jax.Array:
    """The rate of step 0, 1, ... total_steps - 1: linear warmup, then cosine, warmup-stable-decay, linear, or flat.

    Warmup reaches the peak at step `warmup_steps`. WSD: Hu et al. 2024, arXiv:2404.06395, section 4, with the linear
    decay of SmolLM2. The last step has final_fraction of the peak, exactly, unless flat or still warming up.
    """
    step = jnp.asarray(step, jnp.float32)
    warmup = jnp.minimum(1.0, (step + 1) / (config.warmup_steps + 1))
    last = max(total_steps - 1, 1)
    start = config.warmup_steps
    if config.schedule == "wsd":
        start = max(start, last - round(config.decay_fraction * total_steps))
    # XLA divides by multiplying with the reciprocal, so n / n need not be 1: both ends are made exact by themselves.
    left = jnp.where(step <= start, 1.0, jnp.clip((last - step) / max(last - start, 1), 0.0, 1.0))
    if config.schedule == "constant":
        remaining = 1.0
    elif config.schedule == "cosine":
        remaining = 0.5 * (1 - jnp.cos(jnp.pi * left))
    else:
        remaining = left
    fraction = config.final_fraction + (1 - config.final_fraction) * remaining
    return config.learning_rate * warmup * fraction


def make_optimizer(config: OptimizerConfig, decayed: Any, total_steps: int) -> Optimizer:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) whose update takes `step` and `grad_norm`.

    step: the state's own count. A step that is skipped must not advance bias correction but must advance the schedule,
    so the two counts part. grad_norm: of the whole gradient, so that any part of the parameters' tree, some of its
    branches or one layer of the stacked blocks, can be updated by itself (update.py).

    Args: decayed: the parameters' tree, True where weight decay applies.
    """
    return optax.chain(
        _clip(config.clip_norm) if config.clip_norm is not None else optax.identity(),
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=lambda tree: {branch: decayed[branch] for branch in tree}),
        _scale_by_schedule(config, total_steps),
    )


def _clip(limit: float) -> Optimizer:
    """Shortens a gradient longer than `limit` to it (Pascanu et al. 2013, arXiv:1211.5063, section 3.2)."""

    def update(updates, state, params=None, *, grad_norm, **_):
        return jax.tree.map(lambda g: jnp.where(grad_norm < limit, g, g / grad_norm * limit), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _scale_by_schedule(config: OptimizerConfig, total_steps: int) -> Optimizer:
    def update(updates, state, params=None, *, step, **_):
        rate = learning_rate(config, step, total_steps)
        return jax.tree.map(lambda u: -rate * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
