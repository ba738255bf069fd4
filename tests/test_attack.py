"""benchmarks/attack.py for a minute or two: everything that it attacks holds, and it can tell."""

import json
import os
import pathlib
import random
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from attacks import flips  # noqa: E402
from attacks.tries import Outcome, tried  # noqa: E402


def attack(section: str, *arguments: str) -> None:
    command = [sys.executable, "benchmarks/attack.py", section, *arguments]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    environment = kept | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_killed():
    attack("kills", "--seed=1", "--first=4", "--count=3")  # a run, a preparation, an export


@pytest.mark.slow
def test_flipped():
    attack("flips", "--seed=1", "--count=20")


@pytest.mark.slow
def test_flipped_programs():
    attack("compile_cache", "--seed=1", "--count=3")


def test_tries_are_numbered_remembered_and_judged(tmp_path, capsys):
    """What is known is not tried again, and a failure of an earlier start is one of this one's too."""
    results, seen = tmp_path / "results.jsonl", []

    def ready(folder: pathlib.Path):
        def attempt(number: int, chance: random.Random) -> Outcome:
            seen.append((number, chance.random()))
            return Outcome("a thing", "broken" if number == 2 else "held", failed=number == 2)

        return attempt

    def failed(numbers: range, seed: int = 0) -> int:
        return tried("section", ready, tmp_path, numbers, seed, str(results))

    assert failed(range(0, 3)) == 1
    assert failed(range(1, 5)) == 1 and [number for number, _ in seen] == [0, 1, 2, 3, 4]
    assert failed(range(3, 5)) == 0 and len(seen) == 5
    assert failed(range(4, 5), seed=1) == 0 and len(seen) == 6
    assert seen[5][1] == random.Random("1 4").random() != seen[4][1] == random.Random("0 4").random()
    assert [json.loads(line)["number"] for line in results.read_text().splitlines()] == [0, 1, 2, 3, 4, 4]
    said = capsys.readouterr().out
    assert "3 to try, 0 known already" in said and "FAILED 2, a thing: broken" in said and "2  a thing: held" in said


@pytest.mark.parametrize(
    "said, came",
    [
        ("{folder}/state/d/0.0 has another digest.", "refused by name"),
        ("{folder} holds what cannot be.", "refused by its folder's name alone"),
        ("{folder}: state/d/10.0 has another digest.", "refused by its folder's name alone"),
        ("something is wrong.", "refused without its name"),
    ],
)
def test_a_message_that_names_the_folder_alone_is_counted_apart(tmp_path, said, came):
    folder = tmp_path / "state-0.0"
    outcome = flips.refused("checkpoint", folder, folder / "state" / "d" / "0.0", "bit 3", said.format(folder=folder))
    assert (outcome.came, outcome.failed) == (came, came == "refused without its name")
