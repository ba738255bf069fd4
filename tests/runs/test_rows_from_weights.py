"""A task whose rows the weights of each step write: killed and resumed, it reads the rows that it would have read."""

import pathlib

import pytest
from run_case import last_step, learned, metrics, saved_steps, state

TASK = "--config.task=rollouts"


@pytest.mark.slow
def test_rows_of_the_weights_are_the_same_after_a_kill(runs, tmp_path):
    child = pathlib.Path(__file__).parent / "rollouts_child.py"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    ended = runs.run(whole, TASK, program=[str(child)])
    assert ended.code == 0, ended.output
    with runs.started(killed, TASK, program=[str(child)]) as process:
        process.wait_for(lambda: saved_steps(killed) and last_step(killed) > max(saved_steps(killed)), "a step to lose")
        process.kill()
    lost = last_step(killed)
    assert max(saved_steps(killed)) <= lost < 23, "steps are done again"
    ended = runs.run(killed, TASK, program=[str(child)])
    assert ended.code == 0 and "going on from step" in ended.output, ended.output
    assert learned(killed) == learned(whole)
    assert state(killed, 24) == state(whole, 24)
    # Every step learned from its own answers alone: half of each row, at every length.
    assert {line["predicted_tokens"] for line in metrics(whole).values()} == {8 * 33, 8 * 49}
    # The same command without the task is another run's data, and is refused.
    runs.run(killed).refused("This run began with another answers (greedy, now None)")
