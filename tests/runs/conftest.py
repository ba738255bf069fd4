import pytest
from run_case import Runs
from synthetic_shards import write_synthetic

from phijax.interchange.huggingface import export as huggingface_export
from phijax.interchange.huggingface import folder as huggingface_folder
from phijax.interchange.huggingface.families import FAMILIES
from phijax.interchange.open import open_checkpoint


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


@pytest.fixture(scope="session")
def as_llama(unbroken, tmp_path_factory):
    """The last step of `unbroken` as a Hugging Face folder, in float32."""
    folder = tmp_path_factory.mktemp("exported") / "llama"
    opened = open_checkpoint(unbroken)
    written = huggingface_export.folder(opened, FAMILIES["llama"], None)
    huggingface_folder.write(opened, folder, written, max_shard_bytes=20_000)
    return folder
