"""`phijax preflight` in processes: fit, unfit, hung."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import pytest
from synthetic_shards import write_synthetic

from phijax import config as configs
from phijax import preflight
from phijax.parallel.mesh import make_mesh
from phijax.planning.cpu_process import IMPORTED
from phijax.run.recipe import make_recipe
from phijax.training.program import abstract_state

ROOT = pathlib.Path(__file__).parents[2]
CHILD = pathlib.Path(__file__).with_name("preflight_child.py")
TINY = """
import phijax.config


def get_config():
    c = phijax.config.defaults()
    sizes = dict(vocab_size=300, num_layers=1, model_dim=32, num_heads=4, num_kv_heads=4, head_dim=8, ffn_dim=64)
    c.model.update(sizes)
    mixture = [dict(path="SHARDS", weight=1)]
    c.data.phases = [dict(steps=10, sequence_length=64, global_batch_size=8, mixture=mixture)]
    c.optimizer.warmup_steps = 2
    return c
"""


def start(arguments, program=("-m", "phijax.preflight"), devices=1):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.Popen(
        [sys.executable, *map(str, program), *arguments],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def end(child):
    output, _ = child.communicate(timeout=120)
    return child.returncode, output


def group(count, common, own=lambda index: [], program=("-m", "phijax.preflight"), present=None):
    """(exit code, output) of each process of one start."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    together = [f"--coordinator_address={address}", f"--process_count={count}"]
    children = [start([*common, *own(i), *together, f"--process_id={i}"], program) for i in (present or range(count))]
    return [end(child) for child in children]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preflight")
    write_synthetic(folder / "shards", seed=1, documents=300)
    path = folder / "tiny.py"
    path.write_text(TINY.replace("SHARDS", str(folder / "shards")))
    return path


def test_one_process_with_a_config(config, tmp_path):
    code, output = end(start([f"--config={config}", f"--workdir={tmp_path / 'run'}"], devices=4))
    assert code == 0, output
    rows = {line.split("  ")[0]: line for line in output.splitlines()}
    assert {"versions", "all-reduce", "storage", "config", "data", "memory", "disk", "open files"} <= set(rows)
    assert (
        "a row read" in rows["data"] and "mesh fsdp 4" in rows["config"] and "4 devices is right" in rows["all-reduce"]
    )
    assert output.splitlines()[-1].startswith("READY: 11 checks")


def test_moments_on_the_host_are_needed_beside_a_save(config):
    loaded = [configs.load(str(config), [("optimizer.moments", place)]) for place in ("host", "device")]
    mesh = make_mesh(loaded[0].mesh, jax.devices())
    there, here = (
        preflight.host_memory(one, abstract_state(make_recipe(one, dict(mesh.shape), "cpu", None), mesh))
        for one in loaded
    )
    # Parameters and both moments are a checkpoint; two thirds of it stay on the host.
    assert there["a save"] == here["a save"] and here["the optimizer's moments"] == 0
    assert there["the optimizer's moments"] == pytest.approx(there["a save"] * 2 / 3, rel=0.05)


def test_a_process_on_a_cpu_has_all_of_the_memory(config):
    needs = preflight.needs_of(configs.load(str(config), []))
    state = needs.state_bytes
    assert sum(needs.memory.values()) > IMPORTED + 2 * state  # one to train, one that is being written


def test_what_the_config_names_and_is_not_there(config, tmp_path):
    flags = ["--config.data.phases[0].mixture[0].path=/no/such/shards", "--devices=7"]
    code, output = end(start([f"--config={config}", f"--workdir={tmp_path / 'run'}", *flags]))
    assert code == 2 and "Traceback" not in output
    assert output.splitlines()[-1] == "NOT READY: 2 of 11 checks failed: devices, data"
    assert "/no/such/shards" in output


@pytest.mark.slow
def test_other_configs_and_another_folder_on_one_process(config, tmp_path):
    def own(index):
        return [f"--workdir={tmp_path / str(index)}", f"--config.seed={index}"]

    (code, output), (other, quiet) = group(2, [f"--config={config}", "--time_limit=100"], own)
    assert (code, other) == (2, 2), output + quiet
    assert "checks failed: versions, storage" in output
    assert "config: seed: 0 on " in output and "(process 0), 1 on " in output and "(process 1)" in output
    assert "what process 1 wrote is not seen here" in output and "NOT READY" not in quiet


def test_a_process_that_never_starts(tmp_path):
    ((code, output),) = group(2, [f"--workdir={tmp_path}", "--time_limit=6"], present=[0])
    assert code == 2
    assert "NOT READY: processes: process 1 of 2 did not report within 3 s" in output


def test_a_hung_all_reduce_ends_in_a_verdict(tmp_path):
    ends = group(2, [f"--workdir={tmp_path}", "--time_limit=20"], program=[CHILD, "hangs_in_all_reduce"])
    for index, (code, output) in enumerate(ends):
        assert code == 2, output
        assert f"NOT READY: all-reduce hung: not done after 10 s (process {index} of 2" in output


@pytest.mark.slow
def test_who_did_not_come_to_a_check_is_named(tmp_path):
    ends = group(2, [f"--workdir={tmp_path}", "--time_limit=20"], program=[CHILD, "never_comes_to_storage"])
    assert [code for code, _ in ends] == [2, 2]
    assert ("storage" in ends[0][1] and "[1] of 2" in ends[0][1]) or "Not come to it: process 1 of 2" in ends[0][1]


@pytest.mark.slow
def test_other_data_on_one_process_are_named(config, tmp_path):
    other = write_synthetic(tmp_path / "other", seed=5, documents=300)

    def own(index):
        return [f"--config.data.phases[0].mixture[0].path={other}"] if index else []

    (code, output), (second, _) = group(2, [f"--config={config}", f"--workdir={tmp_path / 'run'}"], own)
    assert (code, second) == (2, 2)
    assert "checks failed: data" in output and "data.phases[0].mixture[0].path: digest " in output
    assert f"({other}) on " in output and "(process 1)" in output


@pytest.mark.slow
def test_a_config_that_is_wrong_on_one_process_is_heard_by_the_other(config, tmp_path):
    flags = [f"--config={config}", f"--workdir={tmp_path}", "--time_limit=60"]
    ends = group(2, flags, lambda index: ["--config.seed=x"] * index)
    assert [code for code, _ in ends] == [2, 2]
    assert "NOT READY: processes: process 1 on " in ends[0][1] and "--config.seed=x: expected int" in ends[0][1]
