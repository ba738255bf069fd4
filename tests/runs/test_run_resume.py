"""What a run may change when it is started again, what it may not, and what starting from its weights is."""

import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from quick_compilation import QUICK
from run_case import EVERY, STEPS, Ended, flip_byte, learned, metrics, saved_steps

from phijax import config as configs
from phijax.checkpoint import host_memory, manifest, reading
from phijax.checkpoint.config import CheckpointConfig
from phijax.checkpoint.lock import WriterLock
from phijax.checkpoint.run_state import RunCheckpoints
from phijax.data.batch import TEXT_KEYS, batch_sharding
from phijax.data.loader import Loader
from phijax.errors import UserError
from phijax.model import params
from phijax.parallel.mesh import make_mesh
from phijax.run import assemble, resume
from phijax.run import recipe as recipes
from phijax.training.step import eval_step

AT = 4 * EVERY  # in the second phase, two steps behind its start


@pytest.fixture
def halfway(runs, unbroken, tmp_path) -> pathlib.Path:
    return runs.copy(unbroken, tmp_path / "run", AT)


def unchanged(workdir: pathlib.Path) -> bool:
    return saved_steps(workdir)[-1] == AT and not (workdir / "config_history.jsonl").exists()


def test_a_run_from_before_segments_began_with_end_of_text_keeps_its_rows(runs, halfway, unbroken):
    """Its manifests say nothing of it: first tokens of documents stay without a loss, and new steps are silent too."""
    for step in saved_steps(halfway):
        folder = halfway / "checkpoints" / str(step)
        content = reading.read_manifest(folder)
        del content["identity"]["data"]["begin"]
        kept = {key: content[key] for key in ("leaves", "identity", "extra")}
        manifest.write(folder, step=step, version=content["format"], **kept)
    ended = runs.run(halfway)
    assert ended.code == 0, ended.output
    whole, old = (
        {step: line["predicted_tokens"] for step, line in metrics(workdir).items()} for workdir in (unbroken, halfway)
    )
    assert all(old[step] < whole[step] == 8 * 96 for step in range(AT, STEPS))
    assert "begin" not in reading.read_manifest(halfway / "checkpoints" / str(STEPS))["identity"]["data"]


def test_another_model_is_refused_by_key(runs, halfway):
    ended = runs.run(halfway, "--config.model.ffn_dim=72", "--config.model.norm_eps=1e-6")
    ended.refused(
        f"The checkpoint of step {AT} is of another model: model.ffn_dim was 64, now 72 (and 1 more)",
        "--config.init_from",
    )
    assert unchanged(halfway)


def test_a_run_that_was_refused_leaves_no_config_that_the_next_start_would_differ_from(runs, tmp_path, monkeypatch):
    """Whatever refuses it before its first step; of a start that saved nothing there is nothing to compare with."""
    config = configs.load(str(runs.experiment), [("seed", "5"), ("data.verify", "false")])
    with monkeypatch.context() as without_memory:
        without_memory.setattr(host_memory, "available_bytes", lambda: 1)
        with pytest.raises(UserError, match="host memory"):
            assemble.train(config, epath.Path(tmp_path / "run"))
    assert not (tmp_path / "run/config.json").exists()
    said: list[str] = []
    for seed in (5, 6):
        resume.keep_config(dataclasses.replace(config, seed=seed), epath.Path(tmp_path), 0, said.append)
    assert said == [] and not (tmp_path / "config_history.jsonl").exists()
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 6


PHASES = {
    "a phase that has ended": (["data.phases[0].steps=13"], ["data.phases[0].steps was 14, now 13", "has ended"]),
    "its batch": (["data.phases[0].global_batch_size=16"], ["data.phases[0].global_batch_size was 8, now 16"]),
    "the phase under way": (
        ["data.phases[1].sequence_length=64"],
        [
            "data.phases[1].sequence_length was 96, now 64",
            "is under way (step 16)",
            "set its steps to 2, and add a phase",
        ],
    ),
    "its mixture": (["data.phases[1].mixture[0].path=SHARDS/a"], ["data.phases[1].mixture was", "set its steps to 2"]),
    "its end, before now": (["data.phases[1].steps=1"], ["ends before step 16", "At least 2"]),
    "the seed": (["seed=1"], ["another seed (0, now 1)", "start a new workdir"]),
}


@pytest.fixture(scope="module")
def other_pasts(runs, unbroken, tmp_path_factory) -> dict[str, tuple[pathlib.Path, Ended]]:
    """What -> (workdir, how a start with that change ended)."""
    folder = tmp_path_factory.mktemp("pasts")
    workdirs = [runs.copy(unbroken, folder / str(number), AT) for number in range(len(PHASES))]
    changes = [[f"--config.{change}".replace("SHARDS", str(runs.shards)) for change in c] for c, _ in PHASES.values()]
    ended = runs.run_all([(workdir, change, 1) for workdir, change in zip(workdirs, changes, strict=True)])
    return dict(zip(PHASES, zip(workdirs, ended, strict=True), strict=True))


@pytest.mark.parametrize("what", PHASES)
def test_another_past_is_refused(other_pasts, what):
    workdir, ended = other_pasts[what]
    ended.refused(*PHASES[what][1])
    assert unchanged(workdir)


def test_an_added_phase_is_taken(runs, unbroken, halfway):
    """With another rate too, and other habits of saving, logging and evaluating: all said, all kept."""
    longer = runs.folder / "longer.py"
    added = f'dict(c.data.phases[1], steps=4, mixture=[dict(path="{runs.shards}/a", weight=1)])'
    longer.write_text(
        runs.experiment.read_text().replace(
            "    return c", f"    c.data.phases = [*c.data.phases, {added}]\n    return c"
        )
    )
    changes = {
        "optimizer.learning_rate": (0.01, 0.02),
        "checkpoint.every_steps": (EVERY, 5),
        "logging.every_steps": (1, 3),
        "evaluation.every_steps": (8, 7),
    }
    ended = runs.run(halfway, *(f"--config.{key}={new}" for key, (_, new) in changes.items()), config=longer)
    assert ended.code == 0, ended.output
    for key, (old, new) in changes.items():
        assert f"config: {key} was {old}, from step {AT} on {new}" in ended.output
    (line,) = map(json.loads, (halfway / "config_history.jsonl").read_text().splitlines())
    phases = line["changed"].pop("data.phases")
    assert line["step"] == AT and line["changed"] == {key: list(values) for key, values in changes.items()}
    assert phases[0] == phases[1][:2] and phases[1][2]["steps"] == 4
    assert json.loads((halfway / "config.json").read_text())["optimizer"]["learning_rate"] == 0.02
    rows = [json.loads(line) for line in (halfway / "metrics.jsonl").read_text().splitlines()]
    now = {row["step"]: row for row in rows if row["step"] >= AT}
    assert list(now) == [18, 20, 21, 24, 27]  # every third, those that end a seventh, the last
    assert {20, 27} == {step for step, row in now.items() if "heldout_loss/b" in row}
    assert saved_steps(halfway) == [4, 8, 12, 16, 20, 25, 28]
    before = metrics(unbroken)
    assert now[18]["learning_rate"] > 1.9 * before[18]["learning_rate"]
    assert [now[step]["predicted_tokens"] for step in (18, 20, 21)] == [
        before[step]["predicted_tokens"] for step in (18, 20, 21)
    ], "the rows of the phase before are as they were"


def test_a_finished_run_goes_on_with_more_steps(runs, unbroken, tmp_path):
    workdir = runs.copy(unbroken, tmp_path / "run", STEPS)
    ended = runs.run(workdir, "--config.data.phases[1].steps=12")
    assert ended.code == 0 and f"going on from step {STEPS}" in ended.output, ended.output
    assert len(metrics(workdir)) == STEPS + 2
    before = learned(unbroken)
    assert {step: line for step, line in learned(workdir).items() if step < STEPS} == before


@functools.cache
def assembled(experiment: pathlib.Path):
    """(config, recipe, mesh, loader) of the experiment, in this process, on one device."""
    config = configs.load(str(experiment))
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    recipe = recipes.make_recipe(config, dict(mesh.shape), "cpu", None)
    return config, recipe, mesh, Loader(recipes.open_rows(config, recipe.model), TEXT_KEYS, config.data, mesh)


def test_init_from_begins_at_step_0_with_those_weights(runs, unbroken, as_llama, tmp_path):
    step = unbroken / "checkpoints" / str(STEPS)
    starts = [(tmp_path / "run", step), (tmp_path / "other", as_llama)]
    ends = runs.run_all([(workdir, [f"--config.init_from={start}"], 1) for workdir, start in starts])
    for ended, (_, start) in zip(ends, starts, strict=True):
        assert ended.code == 0 and f"weights of {start}" in ended.output, ended.output
    assert learned(tmp_path / "run") == learned(tmp_path / "other"), "the same weights, whatever file they came from"
    first = metrics(tmp_path / "run")[0]
    _, recipe, mesh, loader = assembled(runs.experiment)
    like = {"params": params.abstract(recipe.model, mesh)}
    weights = reading.restore_arrays(step, like, partial=True)["params"]
    batch = loader.starting_at(0)(0, None)
    score = functools.partial(eval_step, objective=recipe.objective(64))
    nll, weight = jax.jit(score, compiler_options=QUICK)(weights, {}, jax.device_put(batch, batch_sharding(mesh)))
    assert first["predicted_tokens"] == float(weight)
    # Another program than the train step's: the order of sums differs. The weights of step 20 are 1e-2 away.
    np.testing.assert_allclose(first["loss"], float(nll / weight), rtol=2e-6)
    assert first["learning_rate"] == metrics(unbroken)[0]["learning_rate"], "the schedule begins anew"


def weights_only(folder: pathlib.Path, source: pathlib.Path, change) -> pathlib.Path:
    """A checkpoint of the parameters of `source` after `change`, saved by what saves runs; its step's folder."""
    stored = reading.read_manifest(source)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {
        leaf["path"]: jax.ShapeDtypeStruct(tuple(leaf["shape"]), leaf["dtype"], sharding=here)
        for leaf in stored["leaves"]
        if leaf["path"].startswith("params/")
    }
    leaves = reading.restore_arrays(source, like, partial=True)
    assert set(manifest.flatten(params.nested(leaves))) == set(like)
    with WriterLock(folder, break_lock=False, log=print) as lock:
        config = dataclasses.replace(CheckpointConfig(), asynchronous=False)
        checkpoints = RunCheckpoints(folder, config, identity=stored["identity"], version=1, lock=lock, log=print)
        checkpoints.save(7, params.nested(change(leaves)))
        checkpoints.wait()
    return folder / "7"


def without_head(leaves: dict) -> dict:
    return {path: leaf for path, leaf in leaves.items() if path != "params/head"}


def with_nan(leaves: dict) -> dict:
    return leaves | {"params/head": leaves["params/head"].at[3, 5].set(jnp.nan)}


def test_init_from_refuses_what_is_not_these_weights(runs, unbroken, as_llama, tmp_path):
    """A parameter without a value in the file, one of another shape, a flipped byte, no checkpoint at all."""
    source = unbroken / "checkpoints" / str(STEPS)
    lacking = weights_only(tmp_path / "lacking", source, without_head)
    damaged = tmp_path / "damaged"
    shutil.copytree(source, damaged)
    flipped = flip_byte(damaged / "state")
    cases = [
        (lacking, [], ["params/head: not in the checkpoint"]),
        (
            source,
            ["--config.model.ffn_dim=72"],
            ["is the checkpoint of another model", "model.ffn_dim is 64 there, 72 here"],
        ),
        (
            as_llama,
            ["--config.model.num_layers=2", "--config.model.norm_eps=1e-6"],
            ["another model", "model.num_layers is 1 there, 2 here", "model.norm_eps is 1e-05 there, 1e-06 here"],
        ),
        (damaged, [], [f"{flipped.relative_to(damaged)} has changed since it was written"]),
        (source.parent, [], [str(source.parent), "manifest.json"]),
    ]
    commands = [
        (tmp_path / str(number), [f"--config.init_from={folder}", *more], 1)
        for number, (folder, more, _) in enumerate(cases)
    ]
    for (workdir, _, _), ended, (_, _, texts) in zip(commands, runs.run_all(commands), cases, strict=True):
        ended.refused(*texts)
        assert not (workdir / "metrics.jsonl").exists() and not saved_steps(workdir)


def test_steps_that_are_not_finite_are_skipped_counted_and_end_the_run(runs, unbroken, tmp_path):
    poisoned = weights_only(tmp_path / "poisoned", unbroken / "checkpoints" / str(STEPS), with_nan)
    workdir = tmp_path / "run"
    ended = runs.run(workdir, f"--config.init_from={poisoned}", "--config.optimizer.max_skipped_steps=6")
    ended.failed(1, "error: 6 updates in a row, up to step 5, had a loss or gradient that is not finite", "no step was")
    rows = metrics(workdir)
    assert [row["skipped_steps"] for row in rows.values()] == list(range(1, len(rows) + 1))
    assert all(np.isnan(row["loss"]) for row in rows.values())
    assert saved_steps(workdir) == [], "step 4 was due, after four updates that were skipped"
    assert "Nothing was saved before. Lower optimizer.learning_rate" in ended.output
    assert not (workdir / "writer.lock").exists()
