"""What an objective declares is what batches hold, what a step shows, and what held-out data are given."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_training import QUICK, SMALL, host, mesh_of
from synthetic_shards import write_synthetic

from phijax.data.batch import TEXT_KEYS, BatchKey
from phijax.data.loader import DataConfig, Loader, held_out_batches, open_shard_rows
from phijax.data.mixture import Phase, Source
from phijax.data.rows import RowIndex, ShardRows
from phijax.errors import UserError
from phijax.evaluation.held_out import HeldOut
from phijax.model.backend import Backend
from phijax.model.cross_entropy import LossConfig
from phijax.training.objectives import Objective
from phijax.training.optimizer import OptimizerConfig, make_optimizer
from phijax.training.program import Recipe, initial_state, lower_eval_step, lower_train_step
from phijax.training.state import new_state
from phijax.training.step import train_step

K, LENGTH, ROWS = 3, 32, 16
TEACHER = {name: key for name, key in TEXT_KEYS.items() if name != "positions"} | {
    "teacher_ids": BatchKey(np.int32, (K,)),
    "teacher_logprobs": BatchKey(np.float32, (K,), padding=-1.0),
}


def distillation(c, backend, *, length, loss):
    """Cross entropy with a teacher's K best tokens, of a model that looks at one token: enough to sum by hand."""

    def function(params, frozen, batch, key):
        logits = params["embedding"][batch["tokens"]] @ params["head"].T
        logprobs = jax.nn.log_softmax(logits)
        ours = jnp.take_along_axis(logprobs, batch["teacher_ids"], -1)
        nll = -jnp.take_along_axis(logprobs, batch["targets"][..., None], -1)[..., 0]
        weights = batch["weights"]
        total = jnp.sum(weights[..., None] * -jnp.exp(batch["teacher_logprobs"]) * ours)
        sequences = jnp.any(batch["segment_ids"] > 0, 1).astype(jnp.float32)
        counts = {"tokens": jnp.sum(weights), "sequences": jnp.sum(sequences)}
        return total, counts, {"nll": jnp.sum(weights * nll), "hardest": jnp.sum(jnp.max(weights * nll, 1))}

    return Objective(TEACHER, {"nll": "tokens", "hardest": "sequences"}, function)


def taught(row):
    """A row of shards with what a teacher might have said of it."""
    ids = (row["targets"][:, None] + 7 * np.arange(K)) % 300
    logprobs = np.log(np.float32([0.6, 0.3, 0.1]))[(np.arange(LENGTH)[:, None] + np.arange(K)) % K]
    row = row | {"teacher_ids": ids.astype(np.int32), "teacher_logprobs": logprobs}
    return {name: row[name] for name in TEACHER}


class TaughtRows(ShardRows):
    def read(self, places, state=None):
        return [taught(row) for row in super().read(places)]


class TaughtIndex(RowIndex):
    def read(self, row):
        return taught(super().read(row))


def expected(rows, params):
    """Sums over rows in float64: loss, nll, hardest, tokens, sequences."""
    table, head = (np.asarray(params[name], np.float64) for name in ("embedding", "head"))
    logits = table[rows["tokens"]] @ head.T
    logprobs = logits - np.logaddexp.reduce(logits, -1, keepdims=True)
    weights = rows["weights"].astype(np.float64)
    nll = -np.take_along_axis(logprobs, rows["targets"][..., None], -1)[..., 0]
    cross = -np.exp(rows["teacher_logprobs"].astype(np.float64)) * np.take_along_axis(logprobs, rows["teacher_ids"], -1)
    hardest = (weights * nll).max(-1).sum()
    return (cross.sum(-1) * weights).sum(), (weights * nll).sum(), hardest, weights.sum(), len(weights)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_synthetic(tmp_path_factory.mktemp("taught") / "web", block=16))


@pytest.fixture(scope="module")
def recipe():
    return Recipe(SMALL, Backend(), OptimizerConfig(warmup_steps=0), LossConfig(), 4, 0, make_objective=distillation)


# Two replicas that sum two micro-batches each, rows over fsdp, time over context.
MESH = (2, 2, 2, 1)


def stacked(rows):
    return {name: np.stack([row[name] for row in rows]) for name in TEACHER}


def test_keys_with_axes_of_their_own_go_from_the_loader_over_the_mesh_into_the_step(folder, recipe):
    """A distillation's top K: two more keys (A, B, T, K), one sum by token, one by sequence."""
    mesh, config = mesh_of(*MESH), DataConfig((Phase(4, LENGTH, ROWS, (Source(folder),)),), micro_batches=2)
    plain = open_shard_rows(config, vocab_size=300, seed=0)
    source = TaughtRows(plain.phases, plain.shards, seed=0, begin=plain.begin)
    loader = Loader(source, recipe.objective(LENGTH).reads, config, mesh)
    program = lower_train_step(recipe, mesh, loader.shape_at(0)).compile(QUICK)
    state, batch_of = initial_state(recipe, mesh), loader.starting_at(0)
    for step in range(2):
        params, batch = host(state.params), batch_of(step, state)
        assert batch["teacher_ids"].shape == (2, ROWS // 2, LENGTH, K)
        assert {s.data.shape for s in batch["teacher_ids"].addressable_shards} == {(2, ROWS // 8, LENGTH // 2, K)}
        state, metrics = program(state, batch)
        rows = stacked([row for i in range(ROWS) for row in source.read([source.place(step, i)])])
        loss, nll, hardest, tokens, sequences = expected(rows, params)
        shown = {name: float(value) for name, value in metrics.items()}
        # float32 sums of 512 terms.
        assert shown["loss"] == pytest.approx(loss / tokens, rel=1e-5)
        assert shown["nll"] == pytest.approx(nll / tokens, rel=1e-5)
        assert shown["hardest"] == pytest.approx(hardest / sequences, rel=1e-5)
        assert (shown["weight"], shown["sequences"], shown["skipped"]) == (tokens, sequences, 0)
        assert abs(loss / tokens - nll / tokens) > 1e-3, "a K that went astray would show"


def test_held_out_data_are_scored_by_what_is_declared(folder, recipe):
    """The last batch is filled by the declared padding, which counts nowhere."""
    plain = open_shard_rows(DataConfig((Phase(1, LENGTH, 1, (Source(folder),)),)), vocab_size=300, seed=0)
    mesh, objective = mesh_of(*MESH), recipe.objective(LENGTH)
    index = TaughtIndex(plain.shards[folder], LENGTH, "", "web", begin=plain.begin)
    assert len(index) % 8
    program = lower_eval_step(recipe, mesh, (1, 8, LENGTH)).compile(QUICK)
    batches = functools.partial(
        held_out_batches, index, objective.reads, length=LENGTH, batch_size=8, max_rows=None, mesh=mesh
    )
    params = initial_state(recipe, mesh).params
    found = HeldOut("web", program, batches, objective.held_out)(params, {})
    loss, nll, hardest, tokens, sequences = expected(stacked([index.read(i) for i in range(len(index))]), params)
    assert found == {
        "heldout_loss/web": pytest.approx(loss / tokens, rel=1e-5),
        "heldout_nll/web": pytest.approx(nll / tokens, rel=1e-5),
        "heldout_hardest/web": pytest.approx(hardest / sequences, rel=1e-5),
        "heldout_tokens/web": tokens,
        "heldout_sequences/web": sequences,
    }


READS = {"chosen": BatchKey(np.float32), "pair": BatchKey(np.int32)}


def preference(params, frozen, batch, key):
    """By pairs; its `nll` by tokens."""
    pairs = jnp.sum((batch["pair"][:, 0] > 0).astype(jnp.float32))
    total = jnp.sum(params["w"] * batch["chosen"])
    return total, {"pairs": pairs, "tokens": jnp.float32(8)}, {"margin": 3 * total, "nll": jnp.sum(batch["chosen"])}


PREFERENCE = Objective(READS, {"margin": "pairs", "nll": "tokens"}, preference, divisor="pairs")


def one_step(objective, pairs: int):
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=0), {"w": True}, 10)
    state = new_state({"w": jnp.float32(2)}, optimizer)
    pair = (np.arange(4)[:, None] < pairs) * np.ones((1, 4, 6), np.int32)
    batch = {"chosen": np.ones((1, 4, 6), np.float32), "pair": pair.astype(np.int32)}
    return train_step(state, batch, objective=objective, optimizer=optimizer, seed=0)


def test_each_sum_has_its_own_divisor():
    _, metrics = one_step(PREFERENCE, pairs=3)
    named = {name: float(value) for name, value in metrics.by_name().items()}
    assert named["loss"] == 2 * 24 / 3 and named["margin"] == 3 * 2 * 24 / 3 and named["nll"] == 24 / 8
    assert (named["weight"], named["predicted_tokens"], named["skipped"]) == (3, 8, 0)
    assert named["grad_norm"] == 24 / 3
    assert PREFERENCE.shown == {"loss": "pairs", "margin": "pairs", "nll": "predicted_tokens"}
    assert list(PREFERENCE.held_out.items()) == [("loss", "pairs"), ("margin", "pairs"), ("nll", "tokens")]


def test_a_step_without_any_of_the_losss_divisor_changes_nothing():
    """However many tokens there are."""
    state, metrics = one_step(PREFERENCE, pairs=0)
    assert (float(state.params["w"]), int(state.skipped), float(metrics.counts["tokens"])) == (2, 1, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(divisor="words"), "divisors are tokens, pairs, sequences"),
        (dict(sums={"margin": "pairs", "nll": "token"}), "divisors are tokens, pairs, sequences"),
        (dict(score="accuracy"), "a score is the loss or one of the sums"),
        (dict(sums={"margin": "pairs"}), r"gave sums \['margin', 'nll'\]"),
        (dict(sums={"margin": "pairs", "nll": "sequences"}), r"counts \['pairs', 'tokens'\], not as declared"),
    ],
    ids=["divisor", "a sum's divisor", "score", "sums", "counts"],
)
def test_what_is_given_must_be_what_is_declared(changes, message):
    with pytest.raises(ValueError, match=message):
        one_step(Objective(**{**vars(PREFERENCE), **changes}), pairs=1)


@pytest.mark.parametrize("name", "grad_norm learning_rate predicted_tokens skipped_steps tokens perplexity".split())
def test_a_sum_may_not_take_the_name_of_what_is_always_shown(name):
    with pytest.raises(ValueError, match=f"'{name}'.* are shown of every step or set"):
        Objective(READS, {name: "pairs", "nll": "tokens"}, preference, divisor="pairs")


def test_a_key_that_is_read_but_not_declared_is_refused():
    with pytest.raises(UserError, match=r"has \['chosen', 'pair'\]; the objective declares that it reads \['chosen'\]"):
        one_step(Objective({"chosen": READS["chosen"]}, PREFERENCE.sums, preference, divisor="pairs"), pairs=1)
