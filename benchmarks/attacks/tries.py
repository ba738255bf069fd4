"""Many tries of one attack: numbered, seeded, remembered, counted."""

import collections
import dataclasses
import json
import pathlib
import random
import time
from collections.abc import Callable, Sequence


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a try ended. what: was attacked; came: of it, one of a few texts that are counted; detail: for people."""

    what: str
    came: str
    failed: bool = False
    detail: str = ""
    kills: int = 0


Try = Callable[[int, random.Random], Outcome]


def tried(
    section: str,
    ready: Callable[[pathlib.Path], Try],
    folder: pathlib.Path,
    numbers: Sequence[int],
    seed: int,
    results: str | None,
) -> int:
    """-> how many failed, of these numbers, those of earlier starts too."""
    path = pathlib.Path(results) if results else folder / "results.jsonl"
    known = _known(path, section, seed)
    found = {number: known[number] for number in numbers if number in known}
    left = [number for number in numbers if number not in found]
    print(f"{section}, seed {seed}: {len(left)} to try, {len(found)} known already", flush=True)
    attempt = ready(folder) if left else None
    began, spoken = time.monotonic(), 0.0
    for done, number in enumerate(left, start=1):
        outcome = attempt(number, random.Random(f"{seed} {number}"))
        found[number] = outcome
        line = {"section": section, "seed": seed, "number": number, **dataclasses.asdict(outcome)}
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if outcome.failed:
            print(f"FAILED {number}, {outcome.what}: {outcome.came}\n{outcome.detail}", flush=True)
        passed = time.monotonic() - began
        if done == 1 or passed > spoken + 60 or done == len(left):
            spoken = passed
            rest = passed / done * (len(left) - done)
            print(f"{done} of {len(left)}, {passed / done:.1f} s each, {rest / 60:.1f} minutes to go", flush=True)
    _tell(found.values())
    return sum(outcome.failed for outcome in found.values())


def _known(path: pathlib.Path, section: str, seed: int) -> dict[int, Outcome]:
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    names = [field.name for field in dataclasses.fields(Outcome)]
    return {
        line["number"]: Outcome(**{name: line[name] for name in names})
        for line in lines
        if (line["section"], line["seed"]) == (section, seed)
    }


def _tell(outcomes: Sequence[Outcome]) -> None:
    counts = collections.Counter((outcome.what, outcome.came) for outcome in outcomes)
    for (what, came), count in sorted(counts.items()):
        print(f"{count:>6}  {what}: {came}")
    if kills := sum(outcome.kills for outcome in outcomes):
        print(f"{kills:>6}  kills")
    print(f"{sum(outcome.failed for outcome in outcomes):>6}  failed", flush=True)
