"""Who is here? Before jax.distributed starts, every process reports to process 0, on the port that JAX uses afterwards.

JAX's own start-up (jax 0.10.2) waits in C++ and then aborts the interpreter: nothing can be caught, and the message
names nobody. Here the wait is ours, so it ends with a sentence that says which processes are missing and where the
others run.

One TCP connection per process, one JSON line in each direction:
  process -> coordinator  {"run": "phijax", "process_id": 3, "process_count": 4, "host": "node3", "pid": 4711}
  coordinator -> process  {"go": true} or {"go": false, "reason": "...", "code": 2}
A process that cannot go on (its config is wrong, say) comes too, with "failed" and the "code" that it ends with: then
all hear of it, who would wait for it otherwise. Nothing else is read from the port, a line is at most LINE_LIMIT bytes,
and whoever speaks otherwise is hung up on.
"""

import contextlib
import errno
import ipaddress
import json
import os
import selectors
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn

from phijax.errors import EXIT_CRASH, EXIT_USER_ERROR, RunFailure, UserError

LINE_LIMIT = 4096
REASONS_SHOWN = 20  # of processes that cannot go on
RETRY_SECONDS = 0.2
REPORT_SECONDS = 10.0  # how often process 0 says who is still missing
VERDICT_GRACE_SECONDS = 10.0  # process 0 started later than the others, so its time-out ends later than theirs


@dataclass(frozen=True)
class Failed:
    """Why a process comes without being able to go on, and the exit code that it ends with."""

    text: str
    code: int


class ProcessFailure(RunFailure):
    """Another process or its machine failed. The message stands alone; a new start may well succeed (exit code 1)."""


def split_address(address: str) -> tuple[str, int]:
    """ "host:port" or "[v6]:port" -> (host, port). Raises ValueError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{address!r} is not HOST:PORT")
    return host.strip("[]"), int(port)


def gather(
    address: str, count: int, index: int, timeout: float, write: Callable[[str], None], failed: Failed | None = None
) -> str | None:
    """Returns once all `count` processes are here; raises ProcessFailure within `timeout` seconds otherwise.

    On process 0 returns the address that the coordinator has bound, for JAX to bind next; None on the others.

    Args:
      failed: this process comes to say so. It and all others then raise.
    Raises: also UserError: another process came with a mistake of its user.
    """
    host, port = split_address(address)
    introduction = dict(run="phijax", process_id=index, process_count=count, host=socket.gethostname(), pid=os.getpid())
    if failed is not None:
        introduction |= {"failed": failed.text, "code": failed.code}
    if index == 0:
        return _coordinate(host, port, introduction, timeout, write)
    _report_in(address, host, port, introduction, timeout)
    return None


@dataclass(eq=False)
class _Peer:
    """One open connection at process 0; `introduction` is empty until its line has come."""

    connection: socket.socket
    received: bytes = b""
    introduction: dict = field(default_factory=dict)

    def answer(self, **message) -> None:
        # A peer that went away meanwhile is noticed by JAX's heartbeat; there is nobody left to tell.
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")
        self.connection.close()


def _coordinate(host: str, port: int, own: dict, timeout: float, write: Callable[[str], None]) -> str:
    deadline, count = time.monotonic() + timeout, own["process_count"]
    listener, bound = _listen(host, port, deadline, write)
    here: dict[int, _Peer] = {}
    with listener, selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        next_report = time.monotonic() + REPORT_SECONDS
        while len(here) < count - 1:
            now = time.monotonic()
            if now >= deadline:
                _refuse_all(here, own, _missing_message(here, count, timeout))
            if now >= next_report:
                write(f"still waiting for {_processes(_missing(here, count))} of {count}")
                next_report = now + REPORT_SECONDS
            for key, _ in selector.select(min(deadline, next_report) - now):
                if key.fileobj is listener:
                    connection, _ = listener.accept()
                    connection.setblocking(False)
                    selector.register(connection, selectors.EVENT_READ, _Peer(connection))
                else:
                    _hear(key.data, selector, here, count, write)
        for key in list(selector.get_map().values()):
            if key.data is not None and key.data not in here.values():
                key.data.connection.close()
    # After the listener is closed: JAX binds this port in the next moment.
    if any("failed" in introduction for introduction in _all_here(here, own)):
        _refuse_all(here, own)
    for peer in here.values():
        peer.connection.setblocking(True)
        peer.answer(go=True)
    return bound


def _all_here(here: dict[int, _Peer], own: dict) -> list[dict]:
    return [own, *(here[index].introduction for index in sorted(here))]


def _refuse_all(here: dict[int, _Peer], own: dict, missing: str | None = None) -> NoReturn:
    """Ends the wait for all: some failed before they came, or did not come at all."""
    failed = [introduction for introduction in _all_here(here, own) if "failed" in introduction]
    by_text: dict[str, list[dict]] = {}
    for introduction in failed:
        by_text.setdefault(introduction["failed"], []).append(introduction)
    reasons = [f"{_named(those)} cannot go on: {text}" for text, those in list(by_text.items())[:REASONS_SHOWN]]
    more = [f"and {len(by_text) - REASONS_SHOWN} other reasons"] if len(by_text) > REASONS_SHOWN else []
    reason = "\n".join([*reasons, *more, *([missing] if missing else [])])
    users = bool(failed) and all(introduction["code"] == EXIT_USER_ERROR for introduction in failed)
    code = EXIT_USER_ERROR if users else EXIT_CRASH
    for peer in here.values():
        peer.connection.setblocking(True)
        peer.answer(go=False, reason=reason, code=code)
    raise _failure(reason, code)


def _named(introductions: list[dict]) -> str:
    if len(introductions) == 1:
        return f"process {introductions[0]['process_id']} on {introductions[0]['host']}"
    return _processes([introduction["process_id"] for introduction in introductions])


def _failure(reason: str, code: int) -> Exception:
    return UserError(reason) if code == EXIT_USER_ERROR else ProcessFailure(reason)


def _hear(peer: _Peer, selector, here: dict[int, _Peer], count: int, write: Callable[[str], None]) -> None:
    """Reads what `peer` sent: its introduction, its end, or noise."""
    try:
        data = peer.connection.recv(LINE_LIMIT)
    except BlockingIOError:
        return
    except OSError:
        data = b""
    peer.received += data
    known = peer.introduction.get("process_id")
    if not data or known is not None or len(peer.received) > LINE_LIMIT:
        selector.unregister(peer.connection)
        peer.connection.close()
        if known is not None:
            del here[known]
            write(f"process {known} on {peer.introduction['host']} left before all were here")
        return
    if not peer.received.endswith(b"\n"):
        return
    introduction = _parse(peer.received)
    if introduction is None:
        selector.unregister(peer.connection)
        peer.connection.close()
        return
    refusal = _refusal(introduction, here, count)
    if refusal:
        write(refusal)
        selector.unregister(peer.connection)
        peer.answer(go=False, reason=refusal)
        return
    if "failed" in introduction:
        write(f"{_named([introduction])} cannot go on; the others hear of it when all are here")
    peer.introduction = introduction
    here[introduction["process_id"]] = peer


def _parse(line: bytes) -> dict | None:
    """The introduction in `line`, or None when a port scanner or a health check is speaking."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    fields = {"run": str, "process_id": int, "process_count": int, "host": str, "pid": int}
    if not isinstance(message, dict) or message.get("run") != "phijax":
        return None
    if "failed" in message:
        fields |= {"failed": str, "code": int}
    return message if all(type(message.get(name)) is kind for name, kind in fields.items()) else None


def _refusal(introduction: dict, here: dict[int, _Peer], count: int) -> str | None:
    index, who = introduction["process_id"], f"{introduction['host']} (pid {introduction['pid']})"
    if introduction["process_count"] != count:
        return f"{who} was started for {introduction['process_count']} processes, process 0 for {count}"
    if not 0 < index < count:
        return f"{who} was started as process {index}; besides process 0 there are 1 to {count - 1}"
    if index in here:
        other = here[index].introduction
        return f"{who} was started as process {index}, which {other['host']} (pid {other['pid']}) is already"
    return None


def _missing(here: dict[int, _Peer], count: int) -> list[int]:
    return [index for index in range(1, count) if index not in here]


def _processes(indices: list[int]) -> str:
    shown = ", ".join(map(str, indices[:20])) + (f" and {len(indices) - 20} more" if len(indices) > 20 else "")
    return f"process {shown}" if len(indices) == 1 else f"processes {shown}"


def _missing_message(here: dict[int, _Peer], count: int, timeout: float) -> str:
    rows = [(0, socket.gethostname())] + sorted((i, peer.introduction["host"]) for i, peer in here.items())
    shown = ", ".join(f"{i} on {host}" for i, host in rows[:20]) + (" ..." if len(rows) > 20 else "")
    return (
        f"{_processes(_missing(here, count))} of {count} did not report within {timeout:g} s (here: {shown}). "
        "Start the same command once per process and look at the logs of the missing ones."
    )


def _listen(host: str, port: int, deadline: float, write: Callable[[str], None]) -> tuple[socket.socket, str]:
    """Binds the given address only, since neither this port nor JAX's asks who is calling."""
    family, place = _bind_place(host, port, write)
    while True:
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(place)
            break
        except OSError as error:
            listener.close()
            if error.errno == errno.EADDRNOTAVAIL and place[0] not in ("::", "0.0.0.0"):
                write(f"{host} is not an address of this machine; listening on all interfaces, port {port}")
                family, place = socket.AF_INET, ("0.0.0.0", port)
                continue
            # In use: most often the run before this one, whose process 0 has not quite ended.
            if error.errno != errno.EADDRINUSE or time.monotonic() >= deadline:
                raise ProcessFailure(f"process 0 cannot listen on {host}:{port}: {error.strerror}") from error
            time.sleep(RETRY_SECONDS)
    listener.listen(1024)
    listener.setblocking(False)
    shown = f"[{place[0]}]" if family == socket.AF_INET6 else place[0]
    return listener, f"{shown}:{port}"


def _bind_place(host: str, port: int, write: Callable[[str], None]) -> tuple[int, tuple]:
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ProcessFailure(f"process 0 cannot resolve its own coordinator address {host}: {error}") from error
    meant_here = host == "localhost" or host == place[0]
    if ipaddress.ip_address(place[0]).is_loopback and not meant_here:
        # Debian writes `127.0.1.1 node1` into node1's /etc/hosts: bound there, no other machine could connect.
        write(f"{host} is {place[0]} to this machine; listening on all interfaces, port {port}")
        return socket.AF_INET, ("0.0.0.0", port)
    return family, place


def _report_in(address: str, host: str, port: int, introduction: dict, timeout: float) -> None:
    start, count = time.monotonic(), introduction["process_count"]
    with _connect(address, host, port, start + timeout, timeout) as connection:
        connection.sendall(_line(introduction))
        connection.settimeout(timeout + VERDICT_GRACE_SECONDS)
        try:
            with connection.makefile("rb") as lines:
                line = lines.readline(64 * LINE_LIMIT)  # reasons list hosts, so they are longer than an introduction
        except TimeoutError:
            raise ProcessFailure(f"process 0 at {address} took this process's call and then said nothing") from None
        except OSError:
            line = b""
    if not line:
        raise ProcessFailure(f"process 0 at {address} ended before all {count} processes were here; see its log")
    try:
        verdict = json.loads(line)
        going = verdict["go"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ProcessFailure(f"what listens at {address} is not process 0 of this run") from None
    if not going:
        raise _failure(str(verdict.get("reason")), verdict.get("code", EXIT_CRASH))


def _line(introduction: dict) -> bytes:
    """At most LINE_LIMIT bytes: what failed may have much to say. All of it is in its own log."""
    line = json.dumps(introduction).encode() + b"\n"
    for room in (LINE_LIMIT * 3 // 4, LINE_LIMIT // 16):  # characters: plain ones, and those that take twelve bytes
        if len(line) > LINE_LIMIT:
            shorter = introduction["failed"][:room] + " ... (all of it in its log)"
            line = json.dumps(introduction | {"failed": shorter}).encode() + b"\n"
    return line


def _connect(address: str, host: str, port: int, deadline: float, timeout: float) -> socket.socket:
    while True:
        try:
            return socket.create_connection((host, port), timeout=max(0.1, min(5.0, deadline - time.monotonic())))
        except OSError as error:  # refused: process 0 is not up yet; unknown name: neither is its DNS entry
            if time.monotonic() + RETRY_SECONDS >= deadline:
                raise ProcessFailure(
                    f"process 0 could not be reached at {address} within {timeout:g} s ({error}). "
                    "Was it started, and is the address the same on every process?"
                ) from None
            time.sleep(RETRY_SECONDS)
