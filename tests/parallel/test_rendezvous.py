"""The wait for all processes, between threads of one process."""

import json
import socket
import threading
import time

import pytest

from phijax.errors import UserError
from phijax.parallel import rendezvous
from phijax.parallel.rendezvous import Failed, ProcessFailure, gather


@pytest.fixture
def address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def gather_all(address, calls, timeout=3.0, failed=None):
    """Runs gather(count, index) for each of `calls` at once: (results or failures, what was written).

    Args: failed: index -> Failed, of those that come to say so.
    """
    results, lines = [None] * len(calls), []

    def call(slot, count, index):
        try:
            results[slot] = gather(address, count, index, timeout, lines.append, (failed or {}).get(index))
        except (ProcessFailure, UserError) as failure:
            results[slot] = failure

    threads = [threading.Thread(target=call, args=(slot, *arguments)) for slot, arguments in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results, lines


def test_all_here_in_any_order(address):
    results, _ = gather_all(address, [(4, 2), (4, 3), (4, 0), (4, 1)])
    assert results == [None, None, address, None]
    with socket.socket() as jax_next:  # the port is free for the service that follows
        jax_next.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        jax_next.bind(rendezvous.split_address(address))


def test_everyone_present_hears_who_is_missing(address):
    results, _ = gather_all(address, [(4, 0), (4, 2)], timeout=1.0)
    host = socket.gethostname()
    for failure in results:
        assert f"processes 1, 3 of 4 did not report within 1 s (here: 0 on {host}, 2 on {host})" in str(failure)


@pytest.mark.parametrize("who", [0, 2])
def test_a_process_that_cannot_go_on_is_heard_by_all(address, who):
    results, _ = gather_all(address, [(3, 0), (3, 1), (3, 2)], failed={who: Failed("there is no key 'x'.", 2)})
    for failure in results:
        assert type(failure) is UserError
        assert str(failure) == f"process {who} on {socket.gethostname()} cannot go on: there is no key 'x'."


def test_one_mistake_of_all_is_said_once_and_a_crash_is_no_mistake(address):
    calls, mistake = [(3, 0), (3, 1), (3, 2)], Failed("no such file", 2)
    results, _ = gather_all(address, calls, failed=dict.fromkeys(range(3), mistake))
    assert {str(failure) for failure in results} == {"processes 0, 1, 2 cannot go on: no such file"}
    results, _ = gather_all(address, calls, failed={1: mistake, 2: Failed("OSError: stale", 1)})
    assert {type(failure) for failure in results} == {ProcessFailure} and "OSError: stale" in str(results[0])


def test_who_cannot_go_on_is_named_beside_who_is_missing(address):
    results, _ = gather_all(address, [(3, 0), (3, 1)], timeout=1.0, failed={1: Failed("no such file", 2)})
    for failure in results:
        assert "cannot go on: no such file\nprocess 2 of 3 did not report" in str(failure)


@pytest.mark.parametrize("letter", ["x", "\U0001f600", '"'])
def test_a_long_reason_fits_into_a_line_and_says_that_there_is_more(address, letter):
    results, _ = gather_all(address, [(2, 0), (2, 1)], failed={1: Failed(letter * 100_000, 2)})
    assert letter * 200 in str(results[0]) and "... (all of it in its log)" in str(results[0])


def test_two_processes_with_one_id(address):
    results, _ = gather_all(address, [(3, 0), (3, 1), (3, 1)], timeout=1.0)
    assert sorted("was started as process 1, which" in str(failure) for failure in results[1:]) == [False, True]
    assert "process 2 of 3 did not report" in str(results[0])


@pytest.mark.parametrize(
    "call, message", [((5, 1), "was started for 5 processes, process 0 for 2"), ((2, 2), "was started as process 2;")]
)
def test_a_process_of_another_run_is_refused_and_told_why(address, call, message):
    lines, results = [], []
    coordinator = threading.Thread(target=lambda: results.append(gather(address, 2, 0, 5.0, lines.append)))
    coordinator.start()
    assert message in str(gather_all(address, [call])[0][0])
    assert gather_all(address, [(2, 1)])[0] == [None]
    coordinator.join()
    assert results == [address] and message in lines[0]


def test_noise_on_the_port_changes_nothing(address):
    noise = [
        b"GET / HTTP/1.1\r\n\r\n\n",
        b"\n",
        b"[]\n",
        b"[" * 4000 + b"\n",
        b"x" * 10_000,
        b'{"run": "phijax", "process_id": true}\n',
        b"",
    ]
    done = threading.Event()

    def speak(data):
        while not done.is_set():
            try:
                with socket.create_connection(rendezvous.split_address(address), timeout=1) as connection:
                    connection.sendall(data)
                    return
            except OSError:
                done.wait(0.05)

    speakers = [threading.Thread(target=speak, args=(data,)) for data in noise]
    for speaker in speakers:
        speaker.start()
    coordinator = threading.Thread(target=gather_all, args=(address, [(2, 0)]))
    results = []
    late = threading.Thread(target=lambda: results.extend(gather_all(address, [(2, 1)])[0]))
    coordinator.start()
    for speaker in speakers:
        speaker.join()
    late.start()
    late.join()
    done.set()
    coordinator.join()
    assert results == [None]


def test_a_process_that_left_may_come_again(address):
    lines = []
    results = []
    coordinator = threading.Thread(target=lambda: results.append(gather(address, 3, 0, 5.0, lines.append)))
    coordinator.start()
    place = rendezvous.split_address(address)
    introduction = dict(run="phijax", process_id=1, process_count=3, host="first", pid=1)
    with rendezvous._connect(address, *place, deadline=float("inf"), timeout=5) as connection:
        connection.sendall(json.dumps(introduction).encode() + b"\n")
    while not lines:
        time.sleep(0.01)
    assert lines == ["process 1 on first left before all were here"]
    assert gather_all(address, [(3, 1), (3, 2)])[0] == [None, None]
    coordinator.join()
    assert results == [address]


def test_the_end_of_process_0_is_noticed(address):
    with socket.create_server(rendezvous.split_address(address)) as server:
        threading.Thread(target=lambda: server.accept()[0].close()).start()
        with pytest.raises(ProcessFailure, match="ended before all 2 processes were here"):
            gather(address, 2, 1, 3.0, print)


def test_a_port_in_use_is_named(address):
    with socket.create_server(rendezvous.split_address(address)):
        with pytest.raises(ProcessFailure, match=f"cannot listen on {address}: Address already in use"):
            gather(address, 2, 0, 0.5, print)


def test_a_name_that_is_loopback_here_is_bound_on_all_interfaces(monkeypatch):
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 9))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **keywords: found)
    lines = []
    assert rendezvous._bind_place("node1", 9, lines.append) == (socket.AF_INET, ("0.0.0.0", 9))
    assert lines == ["node1 is 127.0.1.1 to this machine; listening on all interfaces, port 9"]
    assert rendezvous._bind_place("localhost", 9, lines.append)[1] == ("127.0.1.1", 9)


@pytest.mark.parametrize("address", ["host", "host:", ":80", "host:0", "host:70000", "host:http"])
def test_not_an_address(address):
    with pytest.raises(ValueError, match="HOST:PORT"):
        rendezvous.split_address(address)


def test_version_6_address():
    assert rendezvous.split_address("[::1]:80") == ("::1", 80)
