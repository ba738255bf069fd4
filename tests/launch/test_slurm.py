"""SLURM: requeueing, arrays, and a real job of four processes found through SLURM's own variables."""

import os
import subprocess
import sys

import pytest
from cloud_case import ROOT
from synthetic_shards import write_synthetic

TINY = """
import phijax.config


def get_config():
    c = phijax.config.defaults()
    sizes = dict(vocab_size=300, num_layers=1, model_dim=32, num_heads=4, num_kv_heads=4, head_dim=8, ffn_dim=64)
    c.model.update(sizes)
    c.data.phases = [
        dict(steps=3, sequence_length=64, global_batch_size=8, mixture=[dict(path="SHARDS", weight=1)]),
    ]
    c.optimizer.warmup_steps = 1
    c.logging.every_steps = 1
    c.logging.tensorboard = c.logging.plot = False
    return c
"""


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (75, True), (1, False), (2, False)])
def test_only_a_stopped_run_is_queued_again(cloud, code, requeued):
    cloud.script(start=[code])
    as_slurm = dict(SLURM_JOB_ID="4711", PYTHON="python", VERB="main")
    ended = cloud.run("slurm_gpu.sbatch", "--config=a.py", "--workdir=b", **as_slurm)
    assert ended.code == code
    step, *more = cloud.asked()
    assert step["name"] == "srun" and step["arguments"][-4:] == ["-m", "phijax.main", "--config=a.py", "--workdir=b"]
    assert [one["name"] for one in more] == (["scontrol"] if requeued else [])
    if requeued:
        assert more[0]["arguments"] == ["requeue", "4711"]


def test_the_array_and_the_job_that_ends_it(cloud):
    flags = ["--input=texts/*.jsonl", "--output=out", "--tokenizer=tok"]
    assert cloud.run("slurm_data_array.sbatch", "--submit=3", *flags).code == 0
    array, last = (one["arguments"] for one in cloud.asked())
    assert array[:2] == ["--parsable", "--array=0-2"] and array[-3:] == flags
    assert last[0] == "--dependency=afterany:4711" and last[-3:] == flags  # the id without the cluster's name


def test_an_array_prepares_what_one_machine_would(tmp_path):
    """The tasks of an array at once, then the last job: as SLURM would start them."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(6):
        (texts / f"{i}.txt").write_text(f"text number {i} of some words. " * 50)
    make = [sys.executable, "-m", "phijax.prepare", f"--input={texts}", "--block=32", "--workers=1"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    one, many = tmp_path / "one", tmp_path / "many"
    subprocess.run([*make, f"--output={one}", "--vocab_size=300"], env=environment, check=True, capture_output=True)
    flags = [f"--input={texts}", "--block=32", f"--tokenizer={one}", f"--output={many}"]
    script = ["launch/slurm_data_array.sbatch", *flags]
    environment |= {"PYTHON": sys.executable, "SLURM_CPUS_PER_TASK": "1"}
    parts = [{"SLURM_ARRAY_TASK_ID": str(i), "SLURM_ARRAY_TASK_COUNT": "2"} for i in range(2)]
    array = [subprocess.Popen(script, cwd=ROOT, env=environment | part) for part in parts]
    assert [task.wait(timeout=120) for task in array] == [0, 0]
    assert not (many / "manifest.json").exists()
    subprocess.run(script, cwd=ROOT, env=environment, check=True, capture_output=True)
    shard = next(path.name for path in one.iterdir() if path.suffix == ".arrayrecord")
    assert (many / shard).read_bytes() == (one / shard).read_bytes()


def slurm(index, count):
    """What srun sets for task `index` of `count` on two nodes, localhost being the first."""
    return {
        "SLURM_JOB_ID": str(100 + os.getpid() % 3000),  # JAX makes the port of it
        "SLURM_STEP_NODELIST": "localhost,localhost2",
        "SLURM_JOB_NODELIST": "localhost,localhost2",
        "SLURM_NTASKS": str(count),
        "SLURM_PROCID": str(index),
        "SLURM_LOCALID": str(index % 2),
        "SLURM_STEP_NUM_NODES": "2",
    }


@pytest.mark.slow
def test_four_processes_find_each_other_through_slurm(tmp_path):
    """No address, count or id is given on the command line: the same line on every task, as srun starts it."""
    write_synthetic(tmp_path / "shards", seed=1, documents=300)
    (tmp_path / "tiny.py").write_text(TINY.replace("SHARDS", str(tmp_path / "shards")))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "SLURM_"))}
    environment = kept | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "phijax.main", f"--config={tmp_path / 'tiny.py'}", f"--workdir={tmp_path / 'run'}"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    tasks = [subprocess.Popen(command, cwd=ROOT, env=environment | slurm(i, 4), **pipes) for i in range(4)]
    outputs = [task.communicate(timeout=200)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0] * 4, "\n".join(outputs)
    for index, output in enumerate(outputs):
        assert f"process {index}: all 4 processes are here" in output
    assert "done: 3 steps" in outputs[0]
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 3
