"""Checks over what all processes told about themselves: pure functions, the same answer on every process."""

import collections
import json
from collections.abc import Mapping, Sequence
from typing import Any

from phijax.readiness.check import FAIL, OK, WARNING, Check, grouped
from phijax.readiness.host import Host

MAX_SKEW = 2.0  # seconds; file times, locks and logs of several hosts are compared by people and by tokens that expire
ALWAYS_OPEN = 256  # files and sockets of Python, jax and its peers, beside shards
KEYS_SHOWN = 20  # of those that differ
SHOWN = 0.01  # of what is needed: parts below it are not named
TIGHT = 0.8  # of the free memory, above which a warning is due


def processes(hosts: Sequence[Host]) -> Check:
    count = collections.Counter(host.name for host in hosts)
    return Check("processes", OK, f"{len(hosts)} of them, hosts: {len(count)}")


def versions(hosts: Sequence[Host], of_config: Sequence[str] = ()) -> Check:
    """Every version must be the same everywhere: a mixed run compiles different programs and hangs, or worse.

    Args: of_config: `differences` of the config's keys.
    """
    labels = [f"{host.name} (process {i})" for i, host in enumerate(hosts)]
    differing = differences([host.versions for host in hosts], labels)
    advice = ["Install the same on every host"] * bool(differing) + ["Start all with one config"] * bool(of_config)
    if advice:
        of_config = [f"config: {line}" for line in of_config]
        return Check("versions", FAIL, "; ".join([*differing, *of_config]) + f". {', and s'.join(advice)}.")
    shown = ", ".join(f"{name} {hosts[0].versions[name]}" for name in ("python", "jax", "libtpu", "flax", "code"))
    return Check("versions", OK, shown)


def differing_keys(said: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of what each process says, the keys that are not there, or not equal, on all."""
    keys = dict.fromkeys(key for one in said for key in one)
    # As text: NaN is equal to itself there, and 1 is not True.
    return [key for key in keys if len({json.dumps(one[key]) if key in one else None for one in said}) > 1]


def differences(
    said: Sequence[Mapping[str, Any]], labels: Sequence[str], remarks: Sequence[Mapping[str, str]] | None = None
) -> list[str]:
    """One line a key that differs: "optimizer.learning_rate: 0.01 on 2 processes, 0.5 on node2 (process 2)".

    Args:
      said: of each process. labels: their names. remarks: what is shown beside a key's value and not compared.
    """
    lines, keys = [], differing_keys(said)
    for key in keys[:KEYS_SHOWN]:
        by_value = collections.defaultdict(list)
        for one, label, remark in zip(said, labels, remarks or [{}] * len(said), strict=True):
            shown = "absent" if key not in one else one[key] if isinstance(one[key], str) else repr(one[key])
            by_value[f"{shown} ({remark[key]})" if remark.get(key) else shown].append(label)
        lines.append(f"{key}: {grouped(by_value)}")
    return lines + [f"and {len(keys) - KEYS_SHOWN} other keys"] * (len(keys) > KEYS_SHOWN)


def clocks(skew: float | None) -> Check:
    """Args: skew: seconds between the clocks furthest apart; None for one process."""
    if skew is None:
        return Check("clocks", OK, "one process")
    if skew > MAX_SKEW:
        return Check("clocks", FAIL, f"{skew:.1f} s apart, more than {MAX_SKEW:g} s. Start NTP (chrony) on every host.")
    return Check("clocks", OK, f"at most {skew:.3f} s apart")


NO_CONFIG = "no --config"
BAD_CONFIG = "the config could not be used: see above"


def memory(hosts: Sequence[Host], needed: Sequence[Mapping[str, int] | None], why_unknown: str = NO_CONFIG) -> Check:
    """Args: needed: part -> bytes of its host that each process takes at its worst; None where that is not known."""
    known = [host.memory for host in hosts if host.memory is not None]
    if not known:
        return Check("memory", WARNING, "this system does not say how much memory is free")
    if None in needed:
        return Check("memory", OK, f"{min(known) / 1e9:.1f} GB free at least; compared with nothing ({why_unknown})")
    by_host, parts = collections.defaultdict(int), collections.defaultdict(collections.Counter)
    free = {}
    for host, own in zip(hosts, needed, strict=True):
        by_host[host.name] += sum(own.values())
        parts[host.name].update(own)
        free[host.name] = min(host.memory or max(known), free.get(host.name, host.memory or max(known)))
    tightest = max(by_host, key=lambda name: by_host[name] / max(free[name], 1))
    share = by_host[tightest] / max(free[tightest], 1)
    text = f"the run takes {by_host[tightest] / 1e9:.2f} of {free[tightest] / 1e9:.1f} GB free on {tightest}"
    shown = [f"{part} {size / 1e9:.2f}" for part, size in parts[tightest].items() if size > SHOWN * by_host[tightest]]
    text += f" ({'; '.join(shown)})" * (len(shown) > 1)
    if share > 1:
        has_steps = len(parts[tightest]) > 2  # on TPU and GPU hosts there are a save and moments alone
        smaller = "more micro-batches (data.micro_batches), " if has_steps else ""
        advice = f"Try --config.checkpoint.asynchronous=False, {smaller}or more hosts."
        return Check("memory", FAIL, f"{text}. {advice}")
    return Check("memory", WARNING if share > TIGHT else OK, text)


def disk(hosts: Sequence[Host], state_bytes: int | None, kept: int, why_unknown: str = NO_CONFIG) -> Check:
    """Args: state_bytes: of one checkpoint, None where that is not known. kept: as many lie there at once."""
    free = [host.disk for host in hosts if host.disk is not None]
    if not free:
        return Check("disk", OK, "the workdir is on an object store")
    if state_bytes is None:
        return Check("disk", OK, f"{min(free) / 1e9:.1f} GB free; compared with nothing ({why_unknown})")
    text = f"{kept} checkpoints of {state_bytes / 1e9:.2f} GB, {min(free) / 1e9:.1f} GB free"
    fits = kept * state_bytes <= min(free)
    return Check("disk", OK if fits else FAIL, text + ("" if fits else ". Lower checkpoint.keep_last, or make room."))


def open_files(hosts: Sequence[Host], shards: int) -> Check:
    """Args: shards: files that the data loader may hold open."""
    least = min(hosts, key=lambda host: host.open_files if host.open_files >= 0 else float("inf"))
    needed = ALWAYS_OPEN + shards
    text = f"{least.open_files:,} may be open, {needed:,} are needed"
    if 0 <= least.open_files < needed:
        return Check("open files", FAIL, f"{text} on {least.name}. Say `ulimit -n {2 * needed}` before the start.")
    return Check("open files", OK, text)


def devices(kinds: Sequence[Sequence[str]], hosts: Sequence[Host], expected: int | None) -> Check:
    """Args: kinds: of each process's own devices. expected: of all together, None for any number."""
    total = sum(map(len, kinds))
    by_value = collections.defaultdict(list)
    for host, own in zip(hosts, kinds, strict=True):
        by_value[f"{len(own)} x {' and '.join(sorted(set(own))) or 'nothing'}"].append(host.name)
    if len(by_value) > 1:
        return Check("devices", FAIL, f"not alike: {grouped(by_value)}")
    if expected is not None and total != expected:
        return Check("devices", FAIL, f"{total} are here, {expected} were expected ({grouped(by_value)})")
    return Check("devices", OK, f"{total} in all, {next(iter(by_value))} on every process")
