"""`config.task` decides what is minimised and where rows come from, out of one table."""

import dataclasses

import numpy as np
import pytest
from synthetic_shards import write_synthetic

from phijax import config as configs
from phijax.data.batch import TEXT_KEYS, BatchKey
from phijax.data.loader import open_shard_rows
from phijax.errors import UserError
from phijax.run import recipe as recipes
from phijax.tasks import TASKS, Task
from phijax.training.objectives import Objective, next_token

SIZES = dict.fromkeys(("data", "fsdp", "context", "tensor"), 1)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = str(write_synthetic(tmp_path_factory.mktemp("tasks") / "web", block=16))
    phase = dict(steps=2, sequence_length=32, global_batch_size=2, mixture=[dict(path=folder, weight=1)])
    sets = [dict(name="web", path=folder)]
    tree = dict(data=dict(phases=[phase]), optimizer=dict(warmup_steps=0), evaluation=dict(sets=sets))
    return configs.from_dict(tree | dict(model=dict(preset="tiny")))


def test_an_unknown_task_is_refused_with_the_known_ones(tmp_path):
    assert configs.from_dict({"task": "pretrain"}).task == configs.Config().task == "pretrain"
    for wrong in ("pretran", "sft"):
        with pytest.raises(UserError, match=rf"task='{wrong}' must be {', '.join(TASKS)}\."):
            configs.from_dict({"task": wrong})
    experiment = tmp_path / "experiment.py"
    experiment.write_text("import phijax.config\n\ndef get_config():\n    return phijax.config.defaults()\n")
    with pytest.raises(UserError, match=r"task='pretran' must be pretrain\. Nearest: 'pretrain'"):
        configs.load(str(experiment), [("task", "pretran")])


def test_pretraining_predicts_the_next_token_of_shards(config):
    recipe = recipes.make_recipe(config, SIZES, "cpu", None)
    assert recipe.make_objective is next_token and recipes.declared(config, recipe).reads == TEXT_KEYS
    rows = recipes.open_rows(config, recipe.model)
    assert rows.fingerprint() == open_shard_rows(config.data, vocab_size=recipe.model.vocab_size, seed=0).fingerprint()
    assert [row["tokens"].shape for row in recipes.rows_of_step_0(config, recipe, rows)] == [(32,), (32,)]


def taught(c, backend, *, length, loss):
    """An objective that reads what no row of shards has."""
    reads = TEXT_KEYS | {"teacher": BatchKey(np.float16, (4,))}
    return Objective(reads, {"kl": "pairs"}, next_token(c, backend, length=length, loss=loss).function)


def test_the_table_decides_objective_and_rows_together(config, monkeypatch):
    opened = []

    def open_rows(data, *, vocab_size, seed):
        opened.append((data, vocab_size, seed))
        return open_shard_rows(data, vocab_size=vocab_size, seed=seed)

    monkeypatch.setitem(TASKS, "taught", Task(taught, open_rows))
    config = dataclasses.replace(config, task="taught", seed=5)
    recipe = recipes.make_recipe(config, SIZES, "cpu", None)
    assert recipes.declared(config, recipe).shown == {"loss": "predicted_tokens", "kl": "pairs"}
    rows = recipes.open_rows(config, recipe.model)
    assert opened == [(config.data, recipe.model.vocab_size, 5)]
    message = r"A row has nothing as 'teacher'; the objective reads float16 \(32, 4\)"
    with pytest.raises(UserError, match=message):
        next(recipes.rows_of_step_0(config, recipe, rows))
    with pytest.raises(UserError, match=message):  # before anything is trained, not at the first evaluation
        recipes.open_evaluation(config, recipe, rows, SIZES)
    monkeypatch.setattr(type(rows), "needs_params", True)
    assert list(recipes.rows_of_step_0(config, recipe, rows)) == [], "there are no weights yet"


def test_the_best_step_is_by_a_score_that_the_task_has(config, monkeypatch):
    monkeypatch.setitem(TASKS, "taught", Task(taught, open_shard_rows))
    for task, ends_well in (("pretrain", True), ("taught", False)):
        keep = dataclasses.replace(config.checkpoint, keep_best="heldout_perplexity/web")
        asked = dataclasses.replace(config, task=task, checkpoint=keep)
        if ends_well:
            assert recipes.best_score(asked, recipes.make_recipe(asked, SIZES, "cpu", None)) == keep.keep_best
        else:
            with pytest.raises(UserError, match=r"nor the loss of one"):
                recipes.make_recipe(asked, SIZES, "cpu", None)
