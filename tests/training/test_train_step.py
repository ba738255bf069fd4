"""The gated step on a model of two leaves, where every number can be followed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_training import SMALL, assert_bits_equal, host, host_batch, recipe

from phijax.data.batch import TEXT_KEYS
from phijax.errors import UserError
from phijax.model import params as model_params
from phijax.training.objectives import Objective, ReadBatch
from phijax.training.optimizer import OptimizerConfig, make_optimizer
from phijax.training.state import new_state
from phijax.training.step import accumulate, eval_step, train_step

ROWS, LENGTH, DIM, VOCAB = 8, 6, 3, 11
DECAYED = {"table": True, "scale": False}
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=0.1, warmup_steps=0, schedule="linear"), DECAYED, 20)


READS = {name: TEXT_KEYS[name] for name in ("tokens", "targets", "weights")}


def objective(function) -> Objective:
    return Objective(READS, {"nll": "tokens"}, function)


@objective
def squares(params, frozen, batch, key):
    """A weighted regression."""
    x = params["table"][batch["tokens"]]
    error = jnp.sum(x * params["scale"], -1) - batch["targets"]
    loss = jnp.sum(batch["weights"] * jnp.square(error))
    return loss, {"tokens": jnp.sum(batch["weights"])}, {"nll": loss}


@objective
def infinite_gradient(params, frozen, batch, key):
    """The slope of the square root at 0: the loss stays finite."""
    loss, *rest = squares.function(params, frozen, batch, key)
    return loss + jnp.sqrt(params["scale"][0] - jax.lax.stop_gradient(params["scale"][0])), *rest


@objective
def infinite_loss(params, frozen, batch, key):
    """No gradient flows from what is infinite."""
    loss, *rest = squares.function(params, frozen, batch, key)
    return loss + jnp.inf, *rest


def start(frozen=None):
    rng = np.random.default_rng(0)
    params = {
        "table": rng.standard_normal((VOCAB, DIM), np.float32),
        "scale": rng.standard_normal(DIM).astype(np.float32),
    }
    return new_state(jax.tree.map(jnp.asarray, params), OPTIMIZER, frozen)


def rows(micro_batches: int = 1, seed: int = 0) -> dict[str, np.ndarray]:
    """The same rows however they are cut; the weights of later rows are larger by far."""
    rng = np.random.default_rng(seed)
    weights = rng.random((ROWS, LENGTH)) * np.geomspace(0.01, 10, ROWS)[:, None]
    batch = {
        "tokens": rng.integers(0, VOCAB, (ROWS, LENGTH), dtype=np.int32),
        "targets": rng.integers(0, 5, (ROWS, LENGTH), dtype=np.int32),
        "weights": weights.astype(np.float32),
    }
    return {name: a.reshape(micro_batches, ROWS // micro_batches, LENGTH) for name, a in batch.items()}


@functools.cache
def program(objective=squares):
    return jax.jit(functools.partial(train_step, objective=objective, optimizer=OPTIMIZER, seed=0))


@functools.cache
def summed():
    return jax.jit(lambda state, batch: accumulate(squares, state, batch, jax.random.key(0)))


def expected_gradients(state, batch):
    """float64, by hand: sums over all rows."""
    table, scale = (np.asarray(state.params[name], np.float64) for name in ("table", "scale"))
    tokens, targets, weights = (batch[name].reshape(-1) for name in ("tokens", "targets", "weights"))
    slope = 2 * weights * (table[tokens] @ scale - targets)
    d_table = np.zeros_like(table)
    np.add.at(d_table, tokens, slope[:, None] * scale)
    return {"table": d_table, "scale": slope @ table[tokens]}


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_accumulated_gradients_are_those_of_all_rows(micro_batches):
    state, batch = start(), rows(micro_batches)
    gradients, loss_sum, counts, sums = summed()(state, batch)
    expected = expected_gradients(state, batch)
    for name, value in expected.items():  # float32 sums of 48 terms
        np.testing.assert_allclose(gradients[name], value, rtol=0, atol=1e-6 * np.abs(value).max())
        assert gradients[name].dtype == jnp.float32
    np.testing.assert_allclose(counts["tokens"], batch["weights"].sum(), rtol=1e-6)
    assert loss_sum == sums["nll"]


def test_a_mean_of_means_would_be_something_else():
    """That the test above could fail: each micro-batch divided by its own weight is far from the whole's mean."""
    state, batch = start(), rows(4)
    whole = jax.tree.map(lambda g: g / batch["weights"].sum(), expected_gradients(state, batch))
    parts = [{name: a[i] for name, a in batch.items()} for i in range(4)]
    means = [jax.tree.map(lambda g, p=p: g / p["weights"].sum(), expected_gradients(state, p)) for p in parts]
    for name, value in whole.items():
        mean_of_means = sum(m[name] for m in means) / 4
        assert np.abs(mean_of_means - value).max() > 0.1 * np.abs(value).max()


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_micro_batches_do_not_change_a_step(micro_batches):
    states, metrics = zip(*(program()(start(), rows(a)) for a in (1, micro_batches)), strict=True)
    for name, whole in metrics[0].by_name().items():
        np.testing.assert_allclose(metrics[1].by_name()[name], whole, rtol=1e-6, err_msg=name)
    # Adam divides each gradient by its own size, so a relative 1e-6 of it is one of the update: 0.1 here.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), states[0].params, states[1].params)


def test_the_step_is_the_optimizers_on_the_mean_gradient():
    state, batch = start(), rows(2)
    new, metrics = program()(state, batch)
    weight = batch["weights"].sum(dtype=np.float64)
    gradients = jax.tree.map(lambda g: jnp.float32(g / weight), expected_gradients(state, batch))
    norm = np.sqrt(sum(np.sum(np.float64(g) ** 2) for g in gradients.values()))
    updates, opt_state = OPTIMIZER.update(gradients, state.opt_state, state.params, step=0, grad_norm=jnp.float32(norm))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, new.params, optax.apply_updates(state.params, updates))
    jax.tree.map(close, new.opt_state, opt_state)
    assert norm > 1.0  # it is shown as it was before clipping
    np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-6)
    np.testing.assert_allclose(metrics.weight, weight, rtol=1e-6)
    assert (new.step, new.skipped, new.skipped_in_a_row) == (1, 0, 0)


def poisoned(value: float) -> dict[str, np.ndarray]:
    batch = rows(2)
    batch["weights"][1, 2, 3] = value
    return batch


@pytest.mark.parametrize(
    "objective, batch",
    [
        (squares, poisoned(np.nan)),
        (squares, poisoned(np.inf)),
        (infinite_gradient, rows(2)),
        (infinite_loss, rows(2)),
    ],
    ids=["nan_weight", "inf_weight", "gradient_alone", "loss_alone"],
)
def test_a_step_that_is_not_finite_changes_nothing(objective, batch):
    state, _ = program()(start(frozen={"base": jnp.arange(3.0)}), rows(2))  # moments and count are not zero
    before = host(state)
    after, metrics = program(objective)(state, batch)
    for part in ("params", "opt_state", "frozen"):
        assert_bits_equal(getattr(after, part), getattr(before, part))
    assert (after.step, after.skipped, after.skipped_in_a_row) == (2, 1, 1)
    assert (metrics.skipped, metrics.skipped_in_a_row) == (1, 1)
    # Each of the last two is seen by one of the two conditions only.
    finite = np.isfinite(metrics.loss), np.isfinite(metrics.grad_norm)
    assert (
        finite == {infinite_gradient: (True, False), infinite_loss: (False, True), squares: (False, False)}[objective]
    )


def test_a_parameter_that_is_not_finite_stays_as_it_is():
    state = start()
    state = state.replace(params={**state.params, "table": state.params["table"].at[4, 1].set(jnp.nan)})
    before = host(state)
    after, _ = program()(state, rows())
    assert_bits_equal(after.params, before.params)
    assert_bits_equal(after.opt_state, before.opt_state)


def test_counts_of_skipped_steps():
    """bad, bad, good, bad: 3 in all, 1 in a row at the end; the schedule counts all steps, Adam the good one."""
    state, counts = start(), []
    for bad in (True, True, False, True):
        state, _ = program()(state, poisoned(np.nan) if bad else rows(2))
        counts.append((int(state.step), int(state.skipped), int(state.skipped_in_a_row)))
    assert counts == [(1, 1, 1), (2, 2, 2), (3, 2, 0), (4, 3, 1)]
    assert optax.tree.get(state.opt_state, "count") == 1


def test_a_skipped_step_advances_the_schedule_but_not_adam():
    first, _ = program()(start(), rows(2))
    skipped, _ = program()(first, poisoned(np.nan))
    third, _ = program()(skipped, rows(2, seed=5))
    gradients = jax.tree.map(
        lambda g: jnp.float32(g / rows(2, seed=5)["weights"].sum(dtype=np.float64)),
        expected_gradients(first, rows(2, seed=5)),
    )

    def updated(step):
        norm = optax.tree.norm(gradients)
        updates, opt_state = OPTIMIZER.update(gradients, first.opt_state, first.params, step=step, grad_norm=norm)
        return optax.apply_updates(first.params, updates), opt_state

    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    params, opt_state = updated(2)
    jax.tree.map(close, third.params, params)
    jax.tree.map(close, third.opt_state, opt_state)
    assert optax.tree.get(third.opt_state, "count") == 2
    # The rate of the step before differs by more than the tolerance: the test could fail.
    assert np.abs(np.asarray(updated(1)[0]["table"]) - third.params["table"]).max() > 1e-4


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_step_without_a_predicted_token_changes_nothing_and_is_counted(micro_batches):
    """Weight decay and moments that are there already would move the weights; nothing is divided by zero."""
    before, _ = program()(start(), rows(micro_batches))
    empty = rows(micro_batches) | {"weights": np.zeros_like(rows(micro_batches)["weights"])}
    after, metrics = program()(before, empty)
    assert (metrics.loss, metrics.weight, metrics.grad_norm, metrics.skipped) == (0, 0, 0, 1)
    for name in ("params", "opt_state", "frozen"):
        assert_bits_equal(getattr(after, name), getattr(before, name))
    assert (int(after.step), int(after.skipped), int(after.skipped_in_a_row)) == (2, 1, 0)
    one = empty | {"weights": empty["weights"].copy()}
    one["weights"].flat[-1] = 1e-6  # a single token, of hardly any weight
    learned, metrics = program()(after, one)
    assert int(learned.skipped) == 1 and float(metrics.weight) > 0
    assert not np.array_equal(learned.params["table"], after.params["table"])


def test_a_step_without_a_predicted_token_neither_ends_nor_lengthens_a_row_of_bad_ones():
    bad, empty = rows(), rows() | {"weights": np.zeros((1, ROWS, LENGTH), np.float32)}
    state, counts = start(), []
    for objective, batch in ((infinite_loss, bad), (squares, empty), (infinite_loss, empty), (squares, bad)):
        state, metrics = program(objective)(state, batch)
        counts.append((int(metrics.skipped), int(metrics.skipped_in_a_row)))
    assert counts == [(1, 1), (2, 1), (3, 2), (3, 0)]


def test_each_micro_batch_has_its_own_key_and_each_step():
    """A key that repeated would give two micro-batches the same dropout."""

    @objective
    def drawn(params, frozen, batch, key):
        loss, weight, _ = squares.function(params, frozen, batch, key)
        return loss, weight, {"nll": jax.random.uniform(key) * jnp.array([1.0, 0.0]) + jnp.array([0.0, 1.0])}

    def total(seed, step, count):
        key = jax.random.fold_in(jax.random.key(seed), step)
        return sum(float(jax.random.uniform(jax.random.fold_in(key, i))) for i in range(count))

    run = functools.partial(train_step, objective=drawn, optimizer=OPTIMIZER, seed=7)
    for step in (0, 3):
        batch = rows(4)
        _, metrics = jax.jit(run)(start().replace(step=jnp.int32(step)), batch)
        draws = np.asarray(metrics.means["nll"]) * batch["weights"].sum()
        np.testing.assert_allclose(draws, [total(7, step, 4), 4.0], rtol=1e-5)


def abstract(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), tree)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_key_too_many_or_too_few_is_refused_while_tracing(micro_batches):
    """eval_shape runs nothing and takes no memory. With the real objective, whose keys are those of the loader."""
    objective, optimizer = recipe().objective(16), recipe().make_optimizer()
    params = abstract(model_params.abstract(SMALL))
    state = jax.eval_shape(lambda p: new_state(p, optimizer), params)
    batch = abstract(host_batch((micro_batches, 4, 16)))
    step = functools.partial(train_step, objective=objective, optimizer=optimizer, seed=0)
    evaluate = functools.partial(eval_step, objective=objective)

    def both(batch):
        for function, arguments in ((step, (state,)), (evaluate, (params, {}))):
            yield functools.partial(jax.eval_shape, function, *arguments, batch)

    for run in both(batch):
        run()
    for run in both(batch | {"loss_mask": batch["weights"]}):
        with pytest.raises(UserError, match=r"has 'loss_mask', which the objective does not read .*segment_ids"):
            run()
    for run in both({k: v for k, v in batch.items() if k != "segment_ids"}):
        with pytest.raises(UserError, match=r"reads 'segment_ids', which the batch lacks: it has .*'positions'"):
            run()


def test_read_batch_counts_what_was_read_not_what_was_listed():
    batch = ReadBatch({"a": 1, "b": 2, "c": 3})
    assert (list(batch), len(batch), batch["a"]) == (["a", "b", "c"], 3, 1)
    with pytest.raises(UserError, match=r"has 'b', 'c', which the objective does not read \(it reads a\)"):
        batch.check_all_read()
    assert dict(batch) == {"a": 1, "b": 2, "c": 3}
    batch.check_all_read()
