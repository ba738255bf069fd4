"""What we are called on the package index, which version this is, and strangers of the same import name."""

import os
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

import phijax
from phijax import distribution

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
STRANGER = "Physics-informed networks in JAX"


def installed(folder: pathlib.Path, name: str, summary: str) -> pathlib.Path:
    """A folder for sys.path in which a distribution of that name lies."""
    info = folder / f"{name.replace('-', '_')}-9.8.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.8\nSummary: {summary}\n")
    return folder


def command(arguments: list[str], *folders: pathlib.Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    return subprocess.run(
        [sys.executable, "-P", *arguments], env=environment, cwd=folders[0], capture_output=True, text=True
    )


def test_the_distribution_is_not_the_package_indexs_phijax():
    assert PROJECT["name"] == distribution.NAME == "phijax-lm"
    assert list(PROJECT["scripts"]) == ["phijax"]
    assert distribution.OURS in PROJECT["description"] and distribution.OURS in phijax.__doc__


def test_the_version_is_pyprojects_without_an_installation(monkeypatch):
    monkeypatch.setattr(sys, "path", [])  # nothing is installed
    assert phijax.__version__ == PROJECT["version"]


def test_the_version_of_an_installation_is_its_metadatas(monkeypatch, tmp_path):
    monkeypatch.setattr(distribution, "__file__", str(tmp_path / "phijax" / "distribution.py"))
    monkeypatch.setattr(sys, "path", [str(installed(tmp_path, "phijax-lm", "phi-3"))])
    assert phijax.__version__ == "9.8"
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "another"\nversion = "1"\n')
    assert phijax.__version__ == "9.8"
    monkeypatch.setattr(sys, "path", [])
    assert phijax.__version__ == "unknown"


@pytest.mark.parametrize("arguments", [["phijax", "--version"], ["phijax.main", "--version", "--config=x"]])
def test_every_command_says_its_version(arguments):
    ended = command(["-X", "importtime", "-m", *arguments], ROOT)
    assert (ended.returncode, ended.stdout) == (0, f"phijax {PROJECT['version']}\n")
    assert "| phijax" in ended.stderr and "| jax" not in ended.stderr


@pytest.mark.parametrize(
    ("name", "summary", "said"),
    [
        ("phijax", STRANGER, f"warning: phijax 9.8 ({STRANGER}) is another project's package of the same import name."),
        ("PhiJAX", STRANGER, "is another project's package"),
        ("phijax", PROJECT["description"], ""),  # ours, as it was called once
        ("phijax-lm", PROJECT["description"], ""),
        ("phijaxlike", STRANGER, ""),
    ],
)
def test_a_stranger_that_is_installed_beside_us_is_one_line(tmp_path, name, summary, said):
    ended = command(["-m", "phijax", "--version"], ROOT, installed(tmp_path, name, summary))
    assert ended.returncode == 0
    assert said in ended.stderr and ended.stderr.count("\n") == bool(said), ended.stderr
    assert not said or "pip uninstall phijax" in ended.stderr


def test_a_library_user_is_told_nothing(tmp_path):
    ended = command(["-c", "import phijax"], ROOT, installed(tmp_path, "phijax", STRANGER))
    assert (ended.returncode, ended.stderr) == (0, "")


def test_the_command_says_when_a_stranger_hides_us(tmp_path):
    (tmp_path / "phijax").mkdir()
    (tmp_path / "phijax" / "__init__.py").write_text("raise ImportError('theirs is not even imported')")
    program = ["-c", "import phijax_lm; phijax_lm.main()", "--version"]
    ended = command(program, tmp_path, ROOT)
    assert ended.returncode == 2 and ended.stderr.startswith(f"error: the package phijax in {tmp_path / 'phijax'} is")
    assert "Traceback" not in ended.stderr and "pip install -e ." in ended.stderr
    assert command(program, ROOT, tmp_path).stdout == f"phijax {PROJECT['version']}\n"


def test_a_stranger_whose_init_lies_over_ours_is_said(monkeypatch):
    monkeypatch.setattr(phijax, "__doc__", STRANGER)
    assert "another project's" in distribution.foreign()


def texts():
    """Every text of the checkout that people read or run."""
    skipped = {".git", ".venv", ".venv-peers", "build", "dist", "__pycache__", ".pytest_cache", ".ruff_cache"}
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in skipped and not name.endswith(".egg-info")]
        for file in files:
            path = pathlib.Path(folder, file)
            if path != pathlib.Path(__file__) and (path.suffix in SUFFIXES or "." not in file):
                yield path


SUFFIXES = {".py", ".md", ".sh", ".sbatch", ".toml", ".txt", ".yaml", ".yml", ".cpu", ".gpu", ".tpu"}
# "phijax[tpu]", and "pip install phijax" with any flags and quotes; a path to the checkout or a wheel is fine.
FROM_THE_INDEX = re.compile(r"""phijax(-lm)?\[[a-z]|pip3? install(\s+-\S+)*\s+["']?phijax(-lm)?(["'`\s]|==|$)""")


def test_nobody_is_told_to_install_phijax_from_the_index():
    found = [path for path in texts() if FROM_THE_INDEX.search(path.read_text(errors="replace"))]
    assert found == []
    for told in ("pip install 'phijax[tpu]'", 'pip install "phijax[wandb]"', "pip install -U phijax", "`phijax[gguf]`"):
        assert FROM_THE_INDEX.search(told)


def test_extras_that_messages_name_are_there():
    named = {
        extra
        for path in texts()
        for extras in re.findall(
            r"pip install -e '\.\[([a-z,]+)\]'|install_hint\([\"'](\w+)", path.read_text(errors="replace")
        )
        for extra in "".join(extras).split(",")
    }
    assert {"tpu", "gcs", "gguf"} <= named <= set(PROJECT["optional-dependencies"])


def test_the_test_extra_holds_the_extras_that_tests_need():
    extras = PROJECT["optional-dependencies"]
    for name in ("data", "gcs", "gguf", "tpu", "tokenizers"):
        assert set(extras[name]) <= set(extras["test"]), name
    assert not [line for lines in extras.values() for line in lines if line.startswith("phijax")]
