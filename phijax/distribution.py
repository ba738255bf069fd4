"""What this package is called where it is installed, which version it is, how its extras are installed.

On the package index `phijax` is somebody else's project with the same import name, so ours is another distribution.
"""

import importlib.metadata
import pathlib
import tomllib

import phijax

NAME = "phijax-lm"
OURS = "phi-3"  # stands in our package's docstring and in the summary of our distributions, NAME now and phijax once


def version() -> str:
    """pyproject.toml's, which is read in a checkout; an installation's metadata have a copy of it."""
    file = pathlib.Path(__file__).parent.parent / "pyproject.toml"
    if file.is_file():
        project = tomllib.loads(file.read_text(encoding="utf-8")).get("project", {})
        if project.get("name") == NAME:
            return project["version"]
    try:
        return importlib.metadata.version(NAME)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def install_hint(extra: str) -> str:
    """The command that brings an extra, for messages."""
    return f".venv/bin/pip install -e '.[{extra}]' in the checkout"


def foreign() -> str | None:
    """What to say when somebody else's phijax is here: installed beside ours, or imported in its place.

    An installation of ours under its old name is no stranger.
    """
    cure = "Remove it (pip uninstall phijax) and install this one again (.venv/bin/pip install -e . in the checkout)."
    if OURS not in (phijax.__doc__ or ""):
        return f"the package phijax at {phijax.__file__} is another project's. {cure}"
    for found in importlib.metadata.distributions(name="phijax"):
        summary = found.metadata["Summary"] or "no summary"
        if OURS not in summary:
            return f"phijax {found.version} ({summary}) is another project's package of the same import name. {cure}"
    return None
