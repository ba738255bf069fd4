import pytest
from run_case import Runs
from synthetic_shards import write_synthetic


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Runs:
    """Two shard folders, an experiment on them, and the compiled programs of all its runs."""
    folder = tmp_path_factory.mktemp("runs")
    write_synthetic(folder / "shards" / "a", seed=1, documents=300)
    write_synthetic(folder / "shards" / "b", seed=2, documents=200)
    return Runs(folder, folder / "shards")


@pytest.fixture(scope="session")
def unbroken(runs):
    """Workdir of a run of one process and one device that nobody disturbed, all its checkpoints kept."""
    workdir = runs.folder / "unbroken"
    ended = runs.run(workdir)
    assert ended.code == 0, ended.output
    return workdir
