"""Three processes of which the third was started otherwise: all end with 2 and say what differs, and on whom."""

import contextlib
import shutil
import subprocess
import sys

import pytest
from run_case import LIMIT, ROOT, Ended, environment, free_address, metrics
from synthetic_shards import write_synthetic

THREE = [
    *(f"--config.data.phases[{number}].global_batch_size=6" for number in (0, 1)),
    *("--config.evaluation.batch_size=3", "--config.mesh.data=3", "--config.mesh.fsdp=1"),
    "--config.processes.initialization_timeout=60",
]


def start_three(runs, workdir, third=(), *, code=ROOT, together=()) -> list[Ended]:
    """Args: third: flags of the third process alone. code: where its phijax lies."""
    address = free_address()
    runs.share_compiled(workdir)
    common = [f"--config={runs.experiment}", f"--workdir={workdir}", *THREE, *together]
    common += [f"--coordinator_address={address}", "--process_count=3"]
    with contextlib.ExitStack() as stack:
        children = []
        for index in range(3):
            own = [*third] if index == 2 else []
            command = [sys.executable, "-m", "phijax.main", *common, *own, f"--process_id={index}"]
            folder = code if index == 2 else ROOT
            child = subprocess.Popen(
                command,
                cwd=folder,
                env=environment(1) | {"PYTHONPATH": str(folder)},
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            stack.callback(child.kill)
            children.append(child)
        outputs = [child.communicate(timeout=LIMIT)[0] for child in children]
    return [Ended(child.returncode, output) for child, output in zip(children, outputs, strict=True)]


def test_other_keys_and_other_code_are_named_by_all(runs, tmp_path):
    code = tmp_path / "checkout"
    shutil.copytree(ROOT / "phijax", code / "phijax", ignore=shutil.ignore_patterns("__pycache__"))
    with open(code / "phijax" / "training" / "step.py", "a") as file:
        file.write("# one line more\n")
    changes = {
        "optimizer.learning_rate": ("0.01", "0.5"),
        "seed": ("0", "4"),
        "data.phases[0].steps": ("14", "9"),
        "data.phases[1].global_batch_size": ("6", "3"),
    }
    third = [f"--config.{key}={theirs}" for key, (_, theirs) in changes.items()]
    for index, ended in enumerate(start_three(runs, tmp_path / "run", third, code=code)):
        ended.refused(f"process {index} of 3: ", "not started alike", "\n  version of code: ", " on 2 processes, ")
        for key, (ours, theirs) in changes.items():
            assert f"\n  {key}: {ours} on 2 processes, {theirs} on " in ended.output, ended.output
        assert ended.output.count("(process 2)\n") == 1 + len(changes), ended.output
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["compile_cache"]


def test_other_data_under_the_path_of_one_process_are_named(runs, tmp_path):
    other = write_synthetic(tmp_path / "other", seed=9, documents=300)
    third = [f"--config.data.phases[0].mixture[0].path={other}"]
    for ended in start_three(runs, tmp_path / "run", third):
        ended.refused(
            "\n  data.phases[0].mixture[0].path: digest ",
            f"({runs.shards / 'a'}) on 2 processes, digest ",
            f"({other}) on ",
            "(process 2)",
        )


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--config.optimizer.learning_rat=1", "there is no key 'optimizer.learning_rat'"),  # before they meet
        pytest.param(
            "--config.evaluation.sets[0].path=/nowhere", "No shards at /nowhere", marks=pytest.mark.slow
        ),  # after
    ],
)
def test_a_mistake_on_one_process_is_heard_by_all(runs, tmp_path, flag, said):
    first, second, third = start_three(runs, tmp_path / "run", [flag])
    for ended in (first, second):
        ended.refused("process 2 on ", f"cannot go on: {said if 'No' in said else ''}", said)
    third.refused("process 2 of 3: ", said)


@pytest.mark.slow
def test_folders_of_equal_content_train_together(runs, tmp_path):
    shutil.copytree(runs.shards / "a", tmp_path / "a")
    short = ["--config.data.phases[0].steps=2", "--config.data.phases[1].steps=1"]
    third = [f"--config.data.phases[0].mixture[0].path={tmp_path / 'a'}", f"--workdir={tmp_path}/./run"]
    for ended in start_three(runs, tmp_path / "run", third, together=short):
        assert ended.code == 0, ended.output
    assert len(metrics(tmp_path / "run")) == 3


@pytest.mark.slow
def test_another_workdir_on_one_process_is_named(runs, tmp_path):
    (tmp_path / "other").mkdir()
    third = [f"--workdir={tmp_path / 'other'}"]
    together = ["--config.processes.initialization_timeout=20"]
    for ended in start_three(runs, tmp_path / "run", third, together=together):
        ended.refused("--workdir: holds the run's lock", f"does not ({tmp_path / 'other'}) on ", "(process 2)")


@pytest.mark.slow
def test_other_start_weights_on_one_process_are_named(runs, unbroken, tmp_path):
    other = runs.copy(unbroken, tmp_path / "other", 4)
    own = [f"--config.init_from={unbroken}"]
    for ended in start_three(runs, tmp_path / "run", [f"--config.init_from={other}"], together=own):
        ended.refused("init_from: ", f"({unbroken}) on 2 processes, ", f"({other}) on ")
