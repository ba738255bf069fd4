"""Processes of one run must be started alike: each tells what decides the run, digests first, values where they differ.

Through the coordination service, before anything collective is compiled: processes that differ compile other programs,
which hang, abort, or train what none of them was asked to.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from phijax.errors import UserError
from phijax.parallel import processes
from phijax.parallel.processes import ProcessFailure
from phijax.readiness import comparison
from phijax.readiness.check import some

HEARD_SECONDS = 10.0  # who knows why all end waits as long for the others to have read it
# Where data and start weights lie may differ from host to host. What lies there may not, and is compared by digest.
_PATHS = re.compile(r"init_from|data\.phases\[\d+\]\.mixture\[\d+\]\.path|evaluation\.sets\[\d+\]\.path")


@dataclasses.dataclass
class Facts:
    """What one process says. values: dotted key -> JSON, equal everywhere. remarks: key -> what is shown beside it."""

    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    remarks: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(self, values: Mapping[str, Any], remarks: Mapping[str, str] | None = None) -> None:
        self.values.update(values)
        self.remarks.update(remarks or {})

    def update(self, other: "Facts") -> None:
        self.add(other.values, other.remarks)


@contextlib.contextmanager
def alike(what: str, seconds: float) -> Iterator[Facts]:
    """The block adds facts that must be equal on all processes; what fails inside of it is heard by all. Collective.

    Needs no device. Alone: nothing is compared.
    Args:
      what: serves once in a run. seconds: for all to come here.
    Raises, on every process: UserError for facts that differ, or that another process came to; ProcessFailure for a
      process that failed otherwise or did not come. The process that failed raises its own exception.
    """
    facts = Facts()
    try:
        yield facts
    except Exception as error:
        user = isinstance(error, UserError)
        said = {"failed": str(error) if user else f"{type(error).__name__}: {error}", "user": user}
        with contextlib.suppress(ProcessFailure):
            _tell(what, said, seconds)
            _heard(what)
        raise
    lines = differing(what, facts, seconds)
    if lines:
        _heard(what)
        raise UserError(
            "\n  ".join(["The processes of this run were not started alike:", *lines])
            + "\nStart all with the same command, experiment file and packages, and the same data."
        )


def differing(what: str, facts: Facts, seconds: float) -> list[str]:
    """A line for each key that is not equal on all processes, with every value and who says it. Collective.

    Raises: UserError, ProcessFailure: as `alike`, for processes that failed.
    """
    if not jax.distributed.is_initialized():
        return []
    told = _tell(what, {"digests": digests(facts.values)}, seconds)
    labels = [f"{said['host']} (process {i})" for i, said in enumerate(told)]
    if any("failed" in said for said in told):
        _heard(what)
        raise _failure({f"process {i} on {said['host']}": said for i, said in enumerate(told) if "failed" in said})
    sections = comparison.differing_keys([said["digests"] for said in told])
    if not sections:
        return []
    mine = {key: value for key, value in facts.values.items() if _section(key) in sections}
    told = _tell(f"{what}: values", {"values": mine, "remarks": facts.remarks}, seconds)
    return comparison.differences([said["values"] for said in told], labels, [said["remarks"] for said in told])


def digests(values: Mapping[str, Any]) -> dict[str, str]:
    """Section -> twelve hex digits over its keys and values: a few hundred bytes, whatever the size of the config."""
    by_section = itertools.groupby(sorted(values, key=lambda key: (_section(key), key)), key=_section)
    return {section: _digest({key: values[key] for key in keys}) for section, keys in by_section}


def of_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same everywhere of a config, a plain tree: all of it, but of paths only that they are given."""
    return {key: "given" if value and _PATHS.fullmatch(key) else value for key, value in flat(config).items()}


def of_data(fingerprint: Mapping[str, Any], held_out: Sequence[tuple[str, str]]) -> Facts:
    """What decides the rows.

    Args:
      fingerprint: the row source's. held_out: (path, digest) of each held-out set.
    """
    facts, first = Facts(), {}
    plain = flat(fingerprint, "data")
    for key, value in plain.items():
        place, _, name = key.rpartition(".")
        if name == "path":
            # Two mixtures that name one folder go on in it; two folders of equal content both begin at its first row.
            same = f", the folder of {first[value]}" if first.setdefault(value, key) != key else ""
            facts.add({key: f"digest {plain[f'{place}.digest'][:12]}{same}"}, {key: value})
        elif name != "digest":
            facts.add({key: value})
    for number, (path, digest) in enumerate(held_out):
        key = f"evaluation.sets[{number}].path"
        facts.add({key: f"digest {digest[:12]}"}, {key: path})
    return facts


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A plain tree as {"data.phases[0].steps": 10, ...}. An empty dict or list is a value."""
    if isinstance(tree, Mapping) and tree:
        parts = [(f"{prefix}.{name}".lstrip("."), child) for name, child in tree.items()]
    elif isinstance(tree, list | tuple) and tree:
        parts = [(f"{prefix}[{number}]", child) for number, child in enumerate(tree)]
    else:
        return {prefix: tree} if prefix else {}
    return {key: value for name, child in parts for key, value in flat(child, name).items()}


def _section(key: str) -> str:
    return re.split(r"[.\[]", key, maxsplit=1)[0]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _tell(what: str, content: dict[str, Any], seconds: float) -> list[dict[str, Any]]:
    content = {"host": os.uname().nodename, **content}
    return [json.loads(text) for text in processes.exchange(f"alike: {what}", json.dumps(content), seconds)]


def _heard(what: str) -> None:
    """Process 0, through whom all speak, must not leave before the others have read why."""
    with contextlib.suppress(ProcessFailure):
        processes.barrier(f"alike: {what}: heard", HEARD_SECONDS)


def _failure(failed: Mapping[str, Mapping[str, Any]]) -> Exception:
    by_text: dict[str, list[str]] = {}
    for process, said in failed.items():
        by_text.setdefault(said["failed"], []).append(process)
    text = "\n".join(f"{some(those)} cannot go on: {text}" for text, those in by_text.items())
    return UserError(text) if all(said["user"] for said in failed.values()) else ProcessFailure(text)
