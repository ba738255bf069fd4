"""One optimizer step and one evaluation step: pure."""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from phijax.parallel import sharding
from phijax.training import update
from phijax.training.objectives import DIVISORS, Objective
from phijax.training.optimizer import Optimizer
from phijax.training.state import TrainState


@flax.struct.dataclass
class Metrics:
    """Scalars of one step, on the device; float32 but for the counts (int32)."""

    loss: jax.Array  # the mean that is minimised
    weight: jax.Array  # of how much it is the mean: tokens that were predicted, say
    grad_norm: jax.Array  # before clipping
    skipped: jax.Array
    skipped_in_a_row: jax.Array
    means: dict[str, jax.Array]  # the objective's sums, each over its divisor
    counts: dict[str, jax.Array]  # divisors other than the loss's

    def by_name(self) -> dict[str, jax.Array]:
        """Flat, counts under the names of metrics."""
        own = {name: value for name, value in vars(self).items() if name not in ("means", "counts")}
        counts = {DIVISORS[divisor]: count for divisor, count in self.counts.items()}
        return own | self.means | counts


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    *,
    objective: Objective,
    optimizer: Optimizer,
    seed: int,
    moments_on_host: bool = False,
) -> tuple[TrainState, Metrics]:
    """One optimizer step over `batch`, leaves (A, B, T, ...): A micro-batches, gradients summed in float32.

    Args:
      moments_on_host: those of state.opt_state lie in the hosts' memory, before and after (state.place).
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    grads, loss_sum, counts, sums = accumulate(objective, state, batch, key)
    weight_sum = counts[objective.divisor]
    # Divided once at the end: packed rows hold unequal counts, so a mean of means would favour short rows.
    divisors = {name: jnp.maximum(count, 1.0) for name, count in counts.items()}
    weight = divisors[objective.divisor]
    grads = jax.tree.map(lambda g: g / weight, grads)
    norm = optax.tree.norm(grads)
    # Decided here, not on the host: metrics are read one step late, when a NaN would be in the donated state already.
    finite = jnp.isfinite(norm) & jnp.isfinite(loss_sum)
    # Without a trained label all gradients are 0, but weight decay and the moments would still move the weights.
    ok = finite & (weight_sum > 0)
    bad, unchanged = (~finite).astype(jnp.int32), (~ok).astype(jnp.int32)
    updated = update.by_layer if moments_on_host else update.at_once
    of_this_step = functools.partial(optimizer.update, step=state.step, grad_norm=norm)
    params, opt_state = updated(of_this_step, ok, grads, state.opt_state, state.params)
    state = state.replace(
        params=params,
        opt_state=opt_state,
        step=state.step + 1,
        skipped=state.skipped + unchanged,
        skipped_in_a_row=(state.skipped_in_a_row + bad) * unchanged,
    )
    metrics = Metrics(
        loss=loss_sum / weight,
        means={name: sums[name] / divisors[divisor] for name, divisor in objective.sums.items()},
        counts={name: count for name, count in counts.items() if name != objective.divisor},
        weight=weight_sum,
        grad_norm=norm,
        skipped=state.skipped,
        skipped_in_a_row=state.skipped_in_a_row,
    )
    return state, metrics


def accumulate(objective: Objective, state: TrainState, batch: dict[str, jax.Array], key: jax.Array) -> tuple[Any, ...]:
    """(gradients, loss sum, counts, auxiliary sums) over the A micro-batches of `batch`, leaves (A, B, T, ...).

    Of more than one, each replica sums its own rows and the sums cross `data` once, at the end: left to itself the
    partitioner makes every layer's gradients cross in every micro-batch, and between slices `data` is a slow network.
    """
    count = next(iter(batch.values())).shape[0]
    if count == 1 or sharding.mesh_sizes()["data"] == 1:
        return _accumulate(objective, state.params, state.frozen, batch, key)

    def replica(*arguments):
        return jax.lax.psum(_accumulate(objective, *arguments), "data")

    whole = jax.sharding.PartitionSpec()
    rows = jax.sharding.PartitionSpec(None, "data")
    return jax.shard_map(
        replica, in_specs=(whole, whole, rows, whole), out_specs=whole, axis_names={"data"}, check_vma=False
    )(state.params, state.frozen, batch, key)


def _accumulate(objective, params, frozen, batch, key):
    """As `accumulate`; inside the shard_map `batch` is one replica's rows."""

    def gradients(micro, index):
        def loss(params):
            loss_sum, counts, sums = objective(params, frozen, micro, jax.random.fold_in(key, index))
            return loss_sum, (counts, sums)

        (loss_sum, (counts, sums)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return grads, loss_sum, counts, sums

    first = {name: leaf[0] for name, leaf in batch.items()}
    count = next(iter(batch.values())).shape[0]
    if count == 1:
        return gradients(first, 0)

    def add(sums, part):
        micro, index = part
        micro = {name: sharding.constrain(leaf, ("act_batch", "act_time")) for name, leaf in micro.items()}
        # Behind a barrier, or the TPU compiler tries to move sums over chips out of the loop and on some meshes fails
        # with an internal error of that pass (while_loop_all_reduce_code_motion; the libtpu that jax 0.10.2 takes).
        return jax.tree.map(jnp.add, sums, jax.lax.optimization_barrier(gradients(micro, index))), None

    # From zeros, all in one loop: a micro-batch before the loop is a second copy of the program, and where the loop
    # then turns once the compiler takes it apart and holds the activations of both (mini: 24.7 GiB where 13.0 do).
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(gradients, first, 0))
    sums, _ = jax.lax.scan(add, zeros, (batch, jnp.arange(count)))
    return sums


def eval_step(params: Any, frozen: Any, batch: dict[str, jax.Array], *, objective: Objective) -> tuple[jax.Array, ...]:
    """Sums over one batch, leaves (1, B, T, ...): those of `objective.held_out`, then the counts of their divisors.

    Nothing is divided: batches are unequal.
    """
    micro = {name: leaf[0] for name, leaf in batch.items()}
    loss_sum, counts, sums = objective(params, frozen, micro, jax.random.key(0))
    values = {"loss": loss_sum, **sums}
    means = objective.held_out
    return *(values[name] for name in means), *(counts[divisor] for divisor in dict.fromkeys(means.values()))
