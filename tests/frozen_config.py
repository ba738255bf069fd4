"""The config as text that a review reads. After a change that is meant: python tests/frozen_config.py

config_keys.txt: every key that can be set. experiments/NAME.txt: what that experiment sets otherwise than the defaults.
"""

import ast
import json
import pathlib
import sys
from typing import Any

TESTS = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent))

from phijax import config  # noqa: E402, where it is started as a script

KEYS_FILE = TESTS / "config_keys.txt"


def experiments() -> list[pathlib.Path]:
    """The files under experiments/ that are experiments."""
    return [path for path in sorted((TESTS.parent / "experiments").glob("*.py")) if _has_get_config(path)]


def frozen_experiment(path: pathlib.Path) -> pathlib.Path:
    return TESTS / "experiments" / f"{path.stem}.txt"


def key_lines() -> str:
    return "".join(f"{key}\n" for key in sorted(config.keys()))


def experiment_lines(path: pathlib.Path) -> str:
    """A line `key = value` for each value that is not the default, records of lists one by one."""
    default, found = _leaves(config.to_dict(config.Config())), _leaves(config.to_dict(config.load(str(path))))
    changed = {key: value for key, value in found.items() if key not in default or default[key] != value}
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in changed.items())


def _leaves(value: Any, key: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        parts = [(f"{key}.{name}".lstrip("."), part) for name, part in value.items()]
    elif isinstance(value, list) and value:
        parts = [(f"{key}[{i}]", part) for i, part in enumerate(value)]
    else:
        return {key: value}
    return {name: leaf for part_key, part in parts for name, leaf in _leaves(part, part_key).items()}


def _has_get_config(path: pathlib.Path) -> bool:
    return any(
        isinstance(node, ast.FunctionDef) and node.name == "get_config" for node in ast.parse(path.read_text()).body
    )


def main() -> None:
    KEYS_FILE.write_text(key_lines())
    for path in experiments():
        frozen_experiment(path).write_text(experiment_lines(path))


if __name__ == "__main__":
    main()
