"""Held-out loss: over all tokens of a set, each once, against log-softmax in float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from quick_compilation import QUICK
from synthetic_shards import small_tokenizer, write_synthetic

from phijax.data import loader
from phijax.data.batch import TEXT_KEYS
from phijax.data.rows import RowIndex
from phijax.data.shards import Shards
from phijax.errors import UserError
from phijax.evaluation.held_out import EvaluationConfig, HeldOut, HeldOutSet, check_sets, score_name
from phijax.model import params
from phijax.model.backend import Backend
from phijax.model.config import ModelConfig
from phijax.model.cross_entropy import LossConfig
from phijax.parallel.sharding import MESH_AXES
from phijax.training import program
from phijax.training.optimizer import OptimizerConfig

LENGTH = 32
MEANS = {"nll": "tokens"}  # as next-token prediction declares them
END = small_tokenizer().end_of_text
MODEL = ModelConfig(
    vocab_size=300,
    model_dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=64,
    max_position=64,
)


def test_the_loss_is_a_mean_over_tokens_not_over_batches():
    sums = {"a": (10.0, 4.0), "b": (2.0, 1.0), "empty": (0.0, 0.0)}
    evaluator = HeldOut("web", lambda p, f, batch: tuple(map(jnp.float32, sums[batch])), lambda: iter(sums), MEANS)
    expected = {
        "heldout_loss/web": 12 / 5,
        "heldout_perplexity/web": math.exp(12 / 5),
        "heldout_tokens/web": 5.0,
    }
    assert evaluator(None, None) == expected
    assert evaluator(None, None) == expected  # the set starts anew


def test_sums_of_many_batches_keep_their_last_digit():
    # Summed in float32, every 1 after 2**24 would be lost.
    parts = [2.0**24] + [1.0] * 64
    evaluator = HeldOut("web", lambda p, f, part: (jnp.float32(0), jnp.float32(part)), lambda: parts, MEANS)
    assert evaluator(None, None)["heldout_tokens/web"] == 2**24 + 64


def test_a_loss_beyond_all_bounds_still_has_a_perplexity():
    evaluator = HeldOut("web", lambda p, f, part: (jnp.float32(1e9), jnp.float32(1)), lambda: [0], MEANS)
    assert evaluator(None, None)["heldout_perplexity/web"] == math.exp(700)


def test_params_and_frozen_are_handed_on():
    seen = []
    HeldOut("web", lambda *a: (seen.append(a), (jnp.float32(1), jnp.float32(1)))[1], lambda: ["batch"], MEANS)("p", "f")
    assert seen == [("p", "f", "batch")]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return Shards.open(write_synthetic(tmp_path_factory.mktemp("validation") / "web", documents=30, block=16))


@pytest.fixture(scope="module")
def recipe():
    # z-loss and smoothing belong to training: the held-out loss is the plain one.
    loss = LossConfig(z_loss=0.1, label_smoothing=0.2)
    return program.Recipe(MODEL, Backend(), OptimizerConfig(), loss, total_steps=10, seed=0)


@functools.cache
def compiled(recipe, mesh_shape, rows):
    mesh = Mesh(np.array(jax.devices()[: math.prod(mesh_shape)]).reshape(mesh_shape), MESH_AXES)
    return mesh, program.lower_eval_step(recipe, mesh, (1, rows, LENGTH)).compile(QUICK)


@functools.cache
def start(mesh):
    return jax.jit(lambda: params.init(MODEL, 0), out_shardings=params.shardings(MODEL, mesh))()


def scores(recipe, shards, mesh_shape, rows, max_rows=None):
    mesh, step = compiled(recipe, mesh_shape, rows)
    evaluator = HeldOut(
        "web",
        step,
        functools.partial(
            loader.held_out_batches,
            RowIndex(shards, LENGTH, "", "web", begin=END),
            TEXT_KEYS,
            length=LENGTH,
            batch_size=rows,
            max_rows=max_rows,
            mesh=mesh,
        ),
        MEANS,
    )
    return evaluator(start(mesh), {})


def expected_scores(shards, max_rows=None):
    """All rows at once, logits in full, log-softmax in float64; (loss, weight) of the first `max_rows`."""
    index = RowIndex(shards, LENGTH, "", "", begin=END)
    rows = [index.read(i) for i in range(len(index))]
    row = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    logits = np.asarray(all_logits(row["tokens"], row["positions"], row["segment_ids"]), np.float64)
    logprobs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    picked = np.take_along_axis(logprobs, row["targets"][..., None], axis=-1)[..., 0]
    counted = row["weights"][:max_rows]
    return -float((picked[:max_rows] * counted).sum() / counted.sum()), float(counted.sum())


@functools.partial(jax.jit, compiler_options=QUICK)
def all_logits(tokens, positions, segment_ids):
    decoder = params.module(MODEL, params.init(MODEL, 0))
    return decoder.logits(decoder.hidden(tokens, positions, segment_ids, Backend(), length=LENGTH))


@pytest.mark.parametrize(("mesh_shape", "rows"), [((1, 1, 1, 1), 7), ((1, 2, 2, 2), 8)])
def test_a_set_is_scored_as_by_log_softmax(recipe, shards, mesh_shape, rows):
    """Whatever mesh and batch size, rows that fill the last batch included."""
    assert len(RowIndex(shards, LENGTH, "", "", begin=END)) % rows
    loss, weight = expected_scores(shards)
    found = scores(recipe, shards, mesh_shape, rows)
    assert found["heldout_tokens/web"] == weight
    # float32 logits on both sides: what remains is the order of sums.
    assert found["heldout_loss/web"] == pytest.approx(loss, rel=1e-6)
    assert found["heldout_perplexity/web"] == pytest.approx(math.exp(loss), rel=1e-5)


def test_max_rows_are_the_first_ones(recipe, shards):
    loss, weight = expected_scores(shards, max_rows=10)
    found = scores(recipe, shards, (1, 1, 1, 1), 7, max_rows=10)
    assert found["heldout_tokens/web"] == weight
    assert found["heldout_loss/web"] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (EvaluationConfig(sets=(HeldOutSet("", "x"),)), "every set needs a name and a path"),
        (EvaluationConfig(sets=(HeldOutSet("x", ""),)), "every set needs a name and a path"),
        (EvaluationConfig(sets=(HeldOutSet("x", "a"), HeldOutSet("x", "b"))), "the name 'x' is there twice"),
        (EvaluationConfig(every_steps=0), r"evaluation.every_steps=0 must be at least 1"),
        (EvaluationConfig(max_rows=0), r"evaluation.max_rows=0 must be at least 1"),
        (EvaluationConfig(batch_size=-1), r"evaluation.batch_size=-1 must be at least 1"),
        (EvaluationConfig(sequence_length=0), r"evaluation.sequence_length=0 must be at least 1"),
    ],
)
def test_sets_that_could_not_be_scored_are_refused(config, message):
    check_sets(EvaluationConfig(sets=(HeldOutSet("x", "a"), HeldOutSet("y", "a"))))
    with pytest.raises(UserError, match=message):
        check_sets(config)


def test_of_no_token_the_loss_is_not_zero_which_would_be_the_best():
    nothing = HeldOut(
        "web", lambda params, frozen, batch: (jnp.float32(0), jnp.float32(0)), lambda: [None, None], MEANS
    )
    found = nothing({}, {})
    assert math.isnan(found["heldout_loss/web"]) and math.isnan(found["heldout_perplexity/web"])
    assert found["heldout_tokens/web"] == 0


def test_the_best_is_by_a_set_or_by_a_metric_of_one():
    sets = EvaluationConfig(sets=(HeldOutSet("web", "a"), HeldOutSet("code", "b")))
    assert score_name(sets, None, "nll") is None
    assert score_name(sets, "code", "nll") == score_name(sets, "heldout_loss/code", "nll") == "heldout_loss/code"
    assert score_name(sets, "heldout_perplexity/web", "nll") == "heldout_perplexity/web"
    for wrong in ("cod", "loss", "heldout_tokens/web"):
        with pytest.raises(UserError, match=rf"keep_best='{wrong}' is neither a set of evaluation.sets \(web, code\)"):
            score_name(sets, wrong, "nll")
    with pytest.raises(UserError, match="there is none"):
        score_name(EvaluationConfig(), "web", "nll")
    assert score_name(sets, "code", "loss") == "heldout_loss/code"
    with pytest.raises(UserError, match=r"nor the loss of one \(heldout_loss/web, say\)"):
        score_name(sets, "heldout_perplexity/web", "loss")  # of what is no log-likelihood there is none


def test_every_declared_sum_is_a_score_over_its_own_divisor():
    sums = [(6.0, 3.0, 8.0, 2.0, 4.0), (0.0, 1.0, 2.0, 0.0, 1.0)]
    means = {"loss": "pairs", "margin": "pairs", "nll": "tokens"}
    evaluator = HeldOut("web", lambda p, f, part: tuple(map(jnp.float32, part)), lambda: sums, means)
    assert evaluator(None, None) == {
        "heldout_loss/web": 6 / 2,
        "heldout_margin/web": 4 / 2,
        "heldout_nll/web": 10 / 5,
        "heldout_pairs/web": 2,
        "heldout_tokens/web": 5,
    }
