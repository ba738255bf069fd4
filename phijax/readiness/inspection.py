"""All checks in order, on all processes at once, and what they found as one list."""

import dataclasses
import json
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath

from phijax.parallel import processes
from phijax.parallel.processes import Processes
from phijax.readiness import agreement, check, comparison, probes
from phijax.readiness.agreement import Facts
from phijax.readiness.check import FAIL, Check
from phijax.readiness.host import Host, this_host
from phijax.readiness.limit import TimeLimit


@dataclasses.dataclass(frozen=True)
class Needs:
    """Of the run on this process. memory: part -> bytes that it takes of its host at the worst; None if not known.

    state_bytes: of a checkpoint, None if not known. kept: checkpoints that lie in the workdir at once. shards: files of
    data. checks: of what the config names. data: what must be the same everywhere of it.
    """

    memory: Mapping[str, int] | None = None
    state_bytes: int | None = None
    kept: int = 0
    shards: int = 0
    checks: tuple[Check, ...] = ()
    data: Facts = dataclasses.field(default_factory=Facts)


def inspect(
    world: Processes,
    limit: TimeLimit,
    workdir: epath.Path,
    config: Mapping[str, Any],
    needs_of: Callable[[], Needs],
    expected_devices: int | None,
) -> list[Check]:
    """Collective. What needs no device comes first: a pod whose hosts differ may hang in its first collective.

    Args:
      config: a plain tree; empty where none was given.
      needs_of: called when devices may be looked at.
    Raises: ProcessFailure when a process does not come to a check.
    """

    def tell(name: str, content: dict) -> list[dict]:
        return [json.loads(text) for text in processes.exchange(f"preflight {name}", json.dumps(content), limit.left)]

    limit.doing("versions")
    own = {"host": dataclasses.asdict(this_host(workdir)), "token": uuid.uuid4().hex[:12]}
    told = tell("versions", own)
    of_config = agreement.differing("preflight config", Facts(agreement.of_config(config)), limit.left)
    token, hosts = told[0]["token"], [Host(**fields["host"]) for fields in told]
    limit.doing("clocks")
    skew = probes.clock_skew(world.count, limit.left)
    limit.doing("devices")  # the first look at one: on a pod it waits for the other hosts
    kinds = [fields["kinds"] for fields in tell("devices", {"kinds": [d.device_kind for d in jax.local_devices()]})]
    limit.doing("all-reduce")
    answers = [attempt("all-reduce", lambda: probes.all_reduce(jax.devices()))]
    limit.doing("storage")
    answers.append(probes.storage(workdir, token, world.index, world.count, limit.left))
    limit.doing("config and data")
    needs = needs_of()
    answers += needs.checks
    limit.doing("verdict")
    told = tell("verdict", {"memory": needs.memory, "shards": needs.shards, "checks": check.encode(answers)})
    found = check.merge([check.decode(fields["checks"]) for fields in told], [host.name for host in hosts])
    if all(one.verdict != FAIL for one in found if one.name == "data"):  # what could not be opened is absent there
        of_data = agreement.differing("preflight data", needs.data, limit.left)
        found = [Check("data", FAIL, "; ".join(of_data)) if of_data and one.name == "data" else one for one in found]
    why_unknown = comparison.BAD_CONFIG if config else comparison.NO_CONFIG
    return [
        comparison.processes(hosts),
        comparison.versions(hosts, of_config),
        comparison.clocks(skew),
        comparison.devices(kinds, hosts, expected_devices),
        *found,
        comparison.memory(hosts, [fields["memory"] for fields in told], why_unknown),
        comparison.disk(hosts, needs.state_bytes, needs.kept, why_unknown),
        comparison.open_files(hosts, max(fields["shards"] for fields in told)),
    ]


def attempt(name: str, act: Callable[[], Check]) -> Check:
    """What `act` finds; an exception of a device or a library is a failed check, not the end of the others."""
    try:
        return act()
    except Exception as error:
        return Check(name, FAIL, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
