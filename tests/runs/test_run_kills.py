"""Killed at any instant and started again, a run is the run that nobody killed: every logged number, bit for bit."""

import json
import pathlib
import random
import shutil
import signal
import time

import pytest
from run_case import EVERY, STEPS, Runs, flip_byte, free_address, last_step, learned, metrics, saved_steps, state

from phijax.report.writers import read_metrics


def same_as_unbroken(workdir: pathlib.Path, unbroken: pathlib.Path) -> None:
    assert len(metrics(workdir)) == STEPS
    assert learned(workdir) == learned(unbroken)
    assert state(workdir, STEPS) == state(unbroken, STEPS)


def check_events(workdir: pathlib.Path, lives: int) -> None:
    """Goodput's file after `lives` lives, some of them too short to open it."""
    events = read_metrics(workdir / "events.jsonl")
    starts = [event["step"] for event in events if event["event"] == "start"]
    assert 1 < len(starts) <= lives and starts[0] == 0 and all(step % EVERY == 0 for step in starts), starts
    assert events[-1]["event"] == "progress" and events[-1]["step"] == STEPS
    assert 0 < metrics(workdir)[STEPS - 1]["goodput"] < 1


def kill_during_steps(process, workdir: pathlib.Path, chance: random.Random) -> None:
    target = min(max(saved_steps(workdir), default=0) + chance.randrange(1, 2 * EVERY), STEPS - 2)
    process.wait_for(lambda: last_step(workdir) >= target, f"step {target}")
    time.sleep(chance.uniform(0, 0.02))
    process.kill()


def kill_during_save(process, workdir: pathlib.Path, chance: random.Random) -> None:
    before = max(saved_steps(workdir), default=0)
    marks = workdir / "checkpoints"
    # Of a save of this life: what dead ones have left is removed at the start.
    saving = [marks / str(step) / "unfinished.json" for step in range(before + EVERY, STEPS, EVERY)]
    process.wait_for(lambda: last_step(workdir) >= before and any(map(pathlib.Path.exists, saving)), "in a save")
    time.sleep(chance.uniform(0, 0.1))
    process.kill()


def kill_behind_save(process, workdir: pathlib.Path, chance: random.Random) -> None:
    """As soon as a step is saved: the lines of the steps that it holds must be on the disk already."""
    before = saved_steps(workdir)
    process.wait_for(lambda: saved_steps(workdir) != before, "a saved step")
    process.kill()


def kill_during_start(process, workdir: pathlib.Path, chance: random.Random) -> None:
    process.wait_for((workdir / "writer.lock").exists, "at work")
    time.sleep(chance.uniform(0, 1.5))
    process.kill()


def killed_again_and_again(runs: Runs, workdir: pathlib.Path, unbroken: pathlib.Path, seed: int, kills: list) -> None:
    chance, lives = random.Random(seed), 1
    for kill in kills:
        # Asynchronous or not is for every life to choose; not: the next step begins only when the save has ended.
        with runs.started(workdir, f"--config.checkpoint.asynchronous={kill is not kill_behind_save}") as process:
            kill(process, workdir, chance)
            assert (workdir / "writer.lock").exists()
        lives += 1
        if max(saved_steps(workdir), default=0) > STEPS - 2 * EVERY:
            break
    ended = runs.run(workdir)
    assert ended.code == 0, ended.output
    assert "taken over" in ended.output
    same_as_unbroken(workdir, unbroken)
    check_events(workdir, lives)
    superseded = workdir / "metrics.superseded.jsonl"
    for line in read_metrics(superseded) if superseded.exists() else []:  # what was done twice, was done alike
        assert line["loss"] == metrics(unbroken)[line["step"]]["loss"]


def test_killed_three_times(runs, unbroken, tmp_path):
    kills = [kill_during_steps, kill_during_save, kill_behind_save]
    killed_again_and_again(runs, tmp_path / "run", unbroken, seed=5, kills=kills)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_killed_many_times(runs, unbroken, tmp_path, seed):
    kinds = [kill_during_start, kill_during_steps, kill_during_save, kill_behind_save]
    kills = random.Random(seed).choices(kinds, k=10)
    killed_again_and_again(runs, tmp_path / "run", unbroken, seed, kills)


def test_sigterm_saves_and_the_next_start_finishes(runs, unbroken, tmp_path):
    workdir = tmp_path / "run"
    with runs.started(workdir) as process:
        process.wait_for(lambda: last_step(workdir) >= 5, "step 5")
        process.signal(signal.SIGTERM)
        ended = process.end()
    assert ended.code == 75, ended.output
    assert "SIGTERM: saving after this step" in ended.output
    stopped_at = saved_steps(workdir)[-1]
    assert 6 <= stopped_at < STEPS
    assert f"saved step {stopped_at}" in ended.output
    assert len(metrics(workdir)) == stopped_at, "every step up to the stop is logged, and none after it"
    assert not (workdir / "writer.lock").exists()
    again = runs.run(workdir)
    assert again.code == 0, again.output
    assert f"going on from step {stopped_at}" in again.output
    same_as_unbroken(workdir, unbroken)
    assert not (workdir / "metrics.superseded.jsonl").exists()


def stopped_at_its_start(process, is_there, name: str) -> None:
    process.wait_for(is_there, name)
    process.signal(signal.SIGTERM)
    ended = process.end()
    assert ended.code == 75, ended.output
    assert "SIGTERM: stopped; the same command can be started again" in ended.output
    assert "Traceback" not in ended.output, ended.output


def test_sigterm_while_the_start_weights_are_opened(runs, tmp_path):
    """An experiment file is Python: this one makes their opening take for ever."""
    workdir, slow = tmp_path / "run", tmp_path / "slow.py"
    waits = "import time\nfrom phijax.run import start\nstart.open_checkpoint = lambda *a, **k: time.sleep(600)\n"
    slow.write_text(runs.experiment.read_text() + waits)
    with runs.started(workdir, f"--config.init_from={tmp_path}", config=slow) as process:
        stopped_at_its_start(process, (workdir / "writer.lock").exists, "at work")
    assert not (workdir / "writer.lock").exists() and saved_steps(workdir) == [] and last_step(workdir) == -1


def test_sigterm_while_the_config_is_read(runs, tmp_path):
    waiting, config = tmp_path / "waiting", tmp_path / "slow.py"
    config.write_text(f"import pathlib, time\npathlib.Path({str(waiting)!r}).touch()\ntime.sleep(600)\n")
    with runs.started(tmp_path / "run", config=config) as process:
        stopped_at_its_start(process, waiting.exists, "reading")


def test_sigterm_while_it_waits_for_other_processes(runs, tmp_path):
    alone = [f"--coordinator_address={free_address()}", "--process_count=2", "--process_id=0"]
    with runs.started(tmp_path / "run", *alone) as process:
        stopped_at_its_start(process, lambda: "waiting for 2 processes" in process.said(), "waiting")


def test_a_finished_run_started_again_does_nothing(runs, unbroken, tmp_path):
    """Nor does it begin anew from other weights; and a config.json torn by a power cut is not in its way."""
    workdir = runs.copy(unbroken, tmp_path / "run", STEPS)
    (workdir / "config.json").write_text('{"task": ')
    ended = runs.run(workdir, "--config.init_from=nowhere")
    assert ended.code == 0, ended.output
    assert f"going on from step {STEPS}" in ended.output and "config.json cannot be read; written" in ended.output
    assert json.loads((workdir / "config.json").read_text())["task"] == "pretrain"
    same_as_unbroken(workdir, unbroken)


def test_a_flipped_byte_is_refused_by_name_and_the_step_before_is_used(runs, unbroken, tmp_path):
    workdir = runs.copy(unbroken, tmp_path / "run", 4 * EVERY)
    flipped = flip_byte(workdir / "checkpoints" / str(4 * EVERY) / "state")
    ended = runs.run(workdir)
    assert ended.code == 0, ended.output
    name = flipped.relative_to(workdir / "checkpoints" / str(4 * EVERY))
    assert f"checkpoints/16 is damaged: {name} has changed since it was written" in ended.output
    assert "Using step 12 instead." in ended.output and "going on from step 12" in ended.output
    same_as_unbroken(workdir, unbroken)


def test_no_whole_checkpoint_is_refused_and_nothing_is_begun_anew(runs, unbroken, tmp_path):
    workdir = runs.copy(unbroken, tmp_path / "run", 2 * EVERY)
    damaged = [flip_byte(workdir / "checkpoints" / str(step)) for step in (EVERY, 2 * EVERY)]
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    ended = runs.run(workdir)
    ended.refused("has steps, but none is whole", "choose another --workdir", *(path.name for path in damaged))
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_compiled_program_torn_by_a_kill_is_compiled_again(runs, unbroken, tmp_path):
    workdir = runs.copy(unbroken, tmp_path / "run", 4 * EVERY)
    (workdir / "compile_cache").unlink()
    shutil.copytree(runs.folder / "compiled", workdir / "compile_cache")
    for entry in (workdir / "compile_cache").glob("*-cache"):
        entry.write_bytes(entry.read_bytes()[:1000])
    ended = runs.run(workdir)
    assert ended.code == 0, ended.output
    same_as_unbroken(workdir, unbroken)
