"""What a check found, and the answers of all processes as one table with one verdict."""

import dataclasses
import json
from collections.abc import Mapping, Sequence

OK, WARNING, FAIL = "ok", "warning", "FAIL"
_WORST_LAST = (OK, WARNING, FAIL)
_SPEAKERS_SHOWN = 4


@dataclasses.dataclass(frozen=True)
class Check:
    """verdict: OK, WARNING or FAIL. text: what was seen, and for a failure what to do about it."""

    name: str
    verdict: str
    text: str


def encode(checks: Sequence[Check]) -> str:
    return json.dumps([dataclasses.asdict(check) for check in checks])


def decode(text: str) -> list[Check]:
    return [Check(**fields) for fields in json.loads(text)]


def merge(answers: Sequence[Sequence[Check]], hosts: Sequence[str]) -> list[Check]:
    """One row a check, in the first process's order: the worst verdict, and who gave it.

    Args:
      answers: the checks of each process. hosts: their names.
    """
    names = list(dict.fromkeys(check.name for checks in answers for check in checks))
    return [
        _merged([(i, c) for i, checks in enumerate(answers) for c in checks if c.name == name], hosts) for name in names
    ]


def _merged(said: Sequence[tuple[int, Check]], hosts: Sequence[str]) -> Check:
    worst = max((check.verdict for _, check in said), key=_WORST_LAST.index)
    speakers = [(i, check) for i, check in said if check.verdict == worst]
    first = speakers[0][1]
    if worst == OK or (len(speakers) == len(said) and len({check.text for _, check in speakers}) == 1):
        return first
    shown = [f"process {i} on {hosts[i]}: {check.text}" for i, check in speakers[:_SPEAKERS_SHOWN]]
    more = [f"and {len(speakers) - _SPEAKERS_SHOWN} more"] if len(speakers) > _SPEAKERS_SHOWN else []
    return Check(first.name, worst, "; ".join([*shown, *more]))


def ready(checks: Sequence[Check]) -> bool:
    return all(check.verdict != FAIL for check in checks)


def table(checks: Sequence[Check], seconds: float) -> list[str]:
    """Lines for people; the last one is the verdict."""
    width = max(len(check.name) for check in checks)
    lines = [f"{check.name:<{width}}  {check.verdict:<7}  {check.text}" for check in checks]
    failed = [check for check in checks if check.verdict == FAIL]
    warned = sum(check.verdict == WARNING for check in checks)
    if failed:
        return [*lines, f"NOT READY: {len(failed)} of {len(checks)} checks failed: {', '.join(c.name for c in failed)}"]
    return [*lines, f"READY: {len(checks)} checks in {seconds:.1f} s" + (f", {warned} warnings" if warned else "")]


def grouped(values: Mapping[str, Sequence[str]]) -> str:
    """{value: [hosts]} -> "0.10.2 on 3 processes, 0.10.1 on node7": what most say first, the others by name."""
    most, *others = sorted(values.items(), key=lambda item: -len(item[1]))
    first = f"{most[0]} on {most[1][0] if len(most[1]) == 1 else f'{len(most[1])} processes'}"
    return ", ".join([first, *(f"{value} on {some(hosts)}" for value, hosts in others)])


def some(hosts: Sequence[str]) -> str:
    """The first of them by name, and how many more."""
    more = f" and {len(hosts) - _SPEAKERS_SHOWN} more" if len(hosts) > _SPEAKERS_SHOWN else ""
    return ", ".join(hosts[:_SPEAKERS_SHOWN]) + more
