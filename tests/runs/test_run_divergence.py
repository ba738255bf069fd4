"""A run whose learning rate was far too high: what it leaves, how it goes on, and going back to an older step."""

import json
import shlex

import pytest
from run_case import EVERY, STEPS, learned, saved_steps

from phijax.report.writers import read_metrics

AT = 4 * EVERY
LIMIT = "--config.optimizer.max_skipped_steps=3"


def trained(workdir) -> dict[int, dict]:
    """What was learned, without evaluations: with keep_best there are more of them."""
    return {step: {k: v for k, v in line.items() if "heldout" not in k} for step, line in learned(workdir).items()}


@pytest.fixture(scope="module")
def diverged(runs, unbroken, tmp_path_factory):
    """(workdir, end) of a run that went on from step 16 at a rate of 1e30, saving every step and keeping one.

    Step 16's update is finite and ruins the weights, which is seen in the step after: 17 is saved as a good one.
    """
    workdir = runs.copy(unbroken, tmp_path_factory.mktemp("diverged") / "run one", AT)
    pace = ["--config.checkpoint.every_steps=1", "--config.checkpoint.keep_last=1"]
    return workdir, runs.run(workdir, "--config.optimizer.learning_rate=1e30", *pace, LIMIT)


def test_a_diverging_run_keeps_its_last_good_step_and_says_what_to_type(diverged):
    workdir, ended = diverged
    ended.failed(1, "error: 3 updates in a row, up to step 19", "step 16 was the last good one", "(it is 1e+30)")
    assert saved_steps(workdir) == [AT]
    assert f"no update was good after step {AT + 1}" in ended.output
    command = shlex.split(ended.output.splitlines()[-1])
    assert command[1:3] == ["-m", "phijax.main"] and f"--workdir={workdir}" in command
    assert command[-2:] == [LIMIT, f"--config.checkpoint.restore_step={AT}"]
    (said,) = [event for event in read_metrics(workdir / "events.jsonl") if event["event"] == "skipped"]
    assert said["step"] == 17 and "not finite" in said["reason"]


def test_with_the_rate_back_it_goes_on_as_if_nothing_had_been(runs, unbroken, diverged):
    workdir, _ = diverged
    ended = runs.run(workdir, f"--config.checkpoint.restore_step={AT}")
    assert ended.code == 0 and f"going on from step {AT}" in ended.output, ended.output
    assert learned(workdir) == learned(unbroken)
    assert saved_steps(workdir) == [16, 20, 24]


def test_going_back_repeats_the_steps_and_keeps_the_others(runs, unbroken, tmp_path):
    workdir = runs.copy(unbroken, tmp_path / "run", STEPS)
    command = ["--config.checkpoint.restore_step=12", "--config.checkpoint.keep_best=b"]
    ended = runs.run(workdir, *command)
    assert ended.code == 0 and "going on from step 12" in ended.output, ended.output
    assert "best so far by heldout_loss/b" in ended.output
    assert trained(workdir) == trained(unbroken), "the position of the data is the step"
    names = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert names == {"4", "8", "12", "16", "16.aside1", "20", "20.aside1", "24", "24.aside1"}
    superseded = (workdir / "metrics.superseded.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in superseded if line.endswith("}")] == list(range(12, STEPS))
    history = [json.loads(line) for line in (workdir / "config_history.jsonl").read_text().splitlines()]
    (went_back,) = [line for line in history if "went_back_to" in line]
    assert (went_back["step"], went_back["set_aside"]) == (12, [16, 20, 24])
    assert [e["set_aside"] for e in read_metrics(workdir / "events.jsonl") if e["event"] == "went_back"] == [
        [16, 20, 24]
    ]
    scores = {}
    for step in (16, 20, 24):
        extra = json.loads((workdir / "checkpoints" / str(step) / "manifest.json").read_text())["extra"]
        scores[step] = extra["scores"]["heldout_loss/b"]
    assert scores[20] == read_metrics(workdir / "metrics.jsonl")[19]["heldout_loss/b"]
    again = runs.run(workdir, *command)
    assert again.code == 0 and "went back to step 12 before" in again.output, again.output
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == names
