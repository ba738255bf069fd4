"""The command `phijax` of an installation: looks whether `phijax` is ours before it imports it.

Another project on the package index has the same import name. Installed beside this one it may come first, and then
nothing of ours would run that could say so. The checks of what does run are in phijax/distribution.py.
"""

import importlib.util
import pathlib
import sys


def main() -> None:
    spec = importlib.util.find_spec("phijax")
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not any((pathlib.Path(folder) / "distribution.py").is_file() for folder in folders):
        where = f"the package phijax in {folders[0]} is another project's" if folders else "the package phijax is gone"
        print(
            f"error: {where}. Say `{sys.executable} -m pip uninstall phijax`, then install this one again: "
            "`.venv/bin/pip install -e .` in the checkout of phijax-lm.",
            file=sys.stderr,
        )
        sys.exit(2)
    from phijax.__main__ import main as command

    command()
