"""One run on every mesh and on any number of processes: the same rows, the same losses; stopped and ended together."""

import contextlib
import signal

import numpy as np
import pytest
from run_case import EVERY, Ended, free_address, last_step, learned, mesh, metrics, saved_steps

from phijax.report.writers import read_metrics

# The promise is kept for the first steps: what differs is the order of sums, 1e-7 a step, which training amplifies.
TEN = ["--config.data.phases[0].steps=7", "--config.data.phases[1].steps=3"]
DATA, FSDP, MIXED, TENSOR = (8, 1, 1, 1), (1, 8, 1, 1), (1, 2, 2, 2), (1, 1, 1, 8)


def ten_steps(runs, workdir, sizes, *arguments) -> Ended:
    return runs.run(workdir, *TEN, *mesh(*sizes), *arguments, devices=8)


@pytest.fixture(scope="session")
def by_fsdp(runs):
    """Workdir of ten steps on eight devices of one process."""
    workdir = runs.folder / "fsdp"
    ended = ten_steps(runs, workdir, FSDP)
    assert ended.code == 0, ended.output
    return workdir


@contextlib.contextmanager
def started_together(runs, workdir, count, *arguments, sizes=FSDP):
    """`count` processes with eight devices between them."""
    address = free_address()
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                runs.started(
                    workdir,
                    *TEN,
                    *mesh(*sizes),
                    *arguments,
                    f"--coordinator_address={address}",
                    f"--process_count={count}",
                    f"--process_id={index}",
                    devices=8 // count,
                )
            )
            for index in range(count)
        ]


def run_together(runs, workdir, count, *arguments, sizes=FSDP) -> list[Ended]:
    with started_together(runs, workdir, count, *arguments, sizes=sizes) as processes:
        return [process.end() for process in processes]


@pytest.fixture(scope="session")
def by_two(runs):
    """Workdir of ten steps on two processes of four devices."""
    workdir = runs.folder / "two"
    for ended in run_together(runs, workdir, 2):
        assert ended.code == 0, ended.output
    return workdir


def same_rows_and_losses(workdir, reference, tolerance=1e-5):
    ours, theirs = metrics(workdir), metrics(reference)
    assert list(ours) == list(theirs) == list(range(10))
    for name in ("predicted_tokens", "tokens"):
        assert [line[name] for line in ours.values()] == [line[name] for line in theirs.values()]
    for name in ("loss", "heldout_loss/b"):
        logged = [[line[name] for line in lines.values() if name in line] for lines in (ours, theirs)]
        np.testing.assert_allclose(*logged, rtol=tolerance)


@pytest.mark.parametrize("sizes", [MIXED, TENSOR, pytest.param(DATA, marks=pytest.mark.slow)])
def test_another_mesh_has_the_same_rows_and_losses(runs, by_fsdp, tmp_path, sizes):
    ended = ten_steps(runs, tmp_path / "run", sizes)
    assert ended.code == 0, ended.output
    same_rows_and_losses(tmp_path / "run", by_fsdp)


@pytest.mark.slow
def test_moments_on_the_hosts_are_the_same_run(runs, by_fsdp, tmp_path):
    """Two processes keep them there, save and end; runs are taken up in the middle from there and to there."""
    there, host = tmp_path / "there", "--config.optimizer.moments=host"
    for ended in run_together(runs, there, 2, host):
        assert ended.code == 0, ended.output
    same_rows_and_losses(there, by_fsdp)
    for source, flags, change in ((there, [], "'host', from step 4 on 'device'"), (by_fsdp, [host], "'device', from")):
        ended = ten_steps(runs, runs.copy(source, tmp_path / f"from_{source.name}", EVERY), MIXED, *flags)
        assert ended.code == 0, ended.output
        assert f"config: optimizer.moments was {change}" in ended.output
        same_rows_and_losses(tmp_path / f"from_{source.name}", by_fsdp)


def test_sigterm_to_one_of_two_stops_both_and_another_mesh_goes_on(runs, by_fsdp, tmp_path):
    workdir = tmp_path / "run"
    with started_together(runs, workdir, 2) as processes:
        processes[1].wait_for(lambda: last_step(workdir) >= 1, "step 1")
        processes[1].signal(signal.SIGTERM)
        ended = [process.end() for process in processes]
    assert [each.code for each in ended] == [75, 75], ended
    stopped_at = saved_steps(workdir)[-1]
    assert 2 <= stopped_at < 10 and len(metrics(workdir)) == stopped_at
    again = ten_steps(runs, workdir, MIXED)
    assert again.code == 0 and f"going on from step {stopped_at}" in again.output, again.output
    same_rows_and_losses(workdir, by_fsdp)


def kill_one_of_two(runs, workdir, killed: int) -> None:
    """Kills it behind step 5; the other ends too; both start again and finish."""
    with started_together(runs, workdir, 2) as processes:
        processes[killed].wait_for(lambda: last_step(workdir) >= 5 and saved_steps(workdir), "step 5")
        processes[killed].kill()
        other = processes[1 - killed].end()
    assert other.code not in (0, 2, 75), other.output
    again = run_together(runs, workdir, 2)
    assert [each.code for each in again] == [0, 0], again
    assert "going on from step 4" in again[0].output or "going on from step 8" in again[0].output


def test_killing_one_of_two_ends_the_other_and_both_go_on(runs, by_fsdp, tmp_path):
    workdir = tmp_path / "run"
    kill_one_of_two(runs, workdir, killed=1)
    same_rows_and_losses(workdir, by_fsdp)
    done_twice = read_metrics(workdir / "metrics.superseded.jsonl")
    assert done_twice
    for line in done_twice:
        assert line["loss"] == metrics(workdir)[line["step"]]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_killing_one_of_two_changes_no_bit(runs, by_two, by_fsdp, tmp_path, killed):
    same_rows_and_losses(by_two, by_fsdp)
    kill_one_of_two(runs, tmp_path / "run", killed)
    assert learned(tmp_path / "run") == learned(by_two)


@pytest.mark.slow
def test_four_processes_then_two_then_one(runs, by_fsdp, tmp_path):
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    assert [each.code for each in run_together(runs, whole, 4)] == [0] * 4
    same_rows_and_losses(whole, by_fsdp)
    with started_together(runs, workdir, 4) as processes:
        processes[0].wait_for(lambda: last_step(workdir) >= 1, "step 1")
        processes[3].signal(signal.SIGTERM)
        ended = [process.end() for process in processes]
    assert [each.code for each in ended] == [75] * 4, ended
    assert saved_steps(workdir)[-1] < 8
    with started_together(runs, workdir, 2, sizes=(2, 2, 1, 2)) as processes:
        processes[0].wait_for(lambda: saved_steps(workdir)[-1] == 8, "step 8 saved")
        for process in processes:
            process.kill()
    again = ten_steps(runs, workdir, MIXED)
    assert again.code == 0, again.output
    same_rows_and_losses(workdir, by_fsdp)


@pytest.mark.slow
def test_one_user_error_of_two_processes_is_said_by_both(runs, tmp_path):
    for index, ended in enumerate(run_together(runs, tmp_path / "run", 2, sizes=(3, 1, 1, 1))):
        ended.refused(f"process {index} of 2: mesh {{'data': 3", "needs 3 devices, but there are 8")
