"""Checks that do something: a sum over all devices, files written and read, clocks read at one instant."""

import time
from collections.abc import Sequence

import jax
import numpy as np
import tensorstore
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from phijax.parallel import processes
from phijax.readiness.check import FAIL, OK, Check
from phijax.storage import durable

SUM_WIDTH = 1 << 18  # int32 of each device: 1 MiB, enough to use every link
FILE_BYTES = 8 << 20
CLOCK_ROUNDS = 5


def all_reduce(devices: Sequence) -> Check:
    """Device i gives i + 1; on each the sum must be n (n + 1) / 2: none is left out, none is counted twice."""
    n = len(devices)
    mesh = Mesh(np.asarray(devices), ("all",))

    def values(index):
        return np.full((1, SUM_WIDTH), index[0].indices(n)[0] + 1, np.int32)

    array = jax.make_array_from_callback((n, SUM_WIDTH), NamedSharding(mesh, PartitionSpec("all")), values)
    total = jax.jit(lambda x: x.sum(0), out_shardings=NamedSharding(mesh, PartitionSpec()))
    jax.block_until_ready(total(array))  # compiled, links opened
    started = time.perf_counter()
    result = jax.block_until_ready(total(array))
    seconds = time.perf_counter() - started
    seen = {int(value) for shard in result.addressable_shards for value in np.unique(shard.data)}
    if seen != {n * (n + 1) // 2}:
        return Check("all-reduce", FAIL, f"the sum over {n} devices is {sorted(seen)[:4]}, not {n * (n + 1) // 2}")
    return Check("all-reduce", OK, f"the sum over {n} devices is right, {seconds * 1e3:.1f} ms for 1 MiB of each")


def storage(workdir: epath.Path, token: str, index: int, count: int, seconds: float) -> Check:
    """Each process writes a file, reads it, and reads the next one's: the workdir must be one for all of them.

    TensorStore, which writes checkpoints, has a client of its own for buckets and is asked as well. Collective.
    Args: token: the same on all processes and of this start alone. seconds: for all to have written.
    """
    folder = workdir / f"preflight-{token}"
    problems, rates = _write_and_read(folder, token, index)
    processes.barrier("preflight written", seconds)
    neighbour = (index + 1) % count
    if not problems:
        problems = _read_other(folder, token, neighbour)
    processes.barrier("preflight read", seconds)
    if index == 0:
        try:
            folder.rmtree()
        except Exception as error:  # whatever the client of this storage raises
            problems += [f"{folder} cannot be removed: {error}"]
    if problems:
        return Check("storage", FAIL, "; ".join(problems))
    return Check("storage", OK, f"{workdir}: written and read by every process, {rates}")


def _write_and_read(folder: epath.Path, token: str, index: int) -> tuple[list[str], str]:
    data, file = _bytes(token, index), folder / f"{index}.bin"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        file.write_bytes(data)
        written = time.perf_counter()
        back = file.read_bytes()
        read = time.perf_counter()
        if back != data:
            return [f"{file} is read otherwise than it was written ({len(back):,} bytes of {len(data):,})"], ""
        _through_tensorstore(folder / f"tensorstore-{index}", data[:4096])
    except Exception as error:  # whatever the client of this storage raises
        return [f"{folder}: {type(error).__name__}: {error}"], ""
    rates = (FILE_BYTES / max(b - a, 1e-9) / 1e6 for a, b in ((started, written), (written, read)))
    return [], "{:.0f} and {:.0f} MB/s here".format(*rates)


def _through_tensorstore(folder: epath.Path, data: bytes) -> None:
    durable.check_name(folder, orbax=True)
    store = tensorstore.KvStore.open(durable.kvstore(folder)).result()
    store.write("probe", data).result()
    back = store.read("probe").result().value
    if back != data:
        raise OSError("TensorStore reads otherwise than it wrote")


def _read_other(folder: epath.Path, token: str, index: int) -> list[str]:
    file = folder / f"{index}.bin"
    try:
        if file.read_bytes() == _bytes(token, index):
            return []
        return [f"{file} holds something else than process {index} wrote"]
    except Exception as error:  # whatever the client of this storage raises
        seen = f"what process {index} wrote is not seen here ({type(error).__name__})"
        return [f"{seen}: is --workdir one folder for all hosts?"]


def _bytes(token: str, index: int) -> bytes:
    return np.random.default_rng([index, *token.encode()]).bytes(FILE_BYTES)


def clock_skew(count: int, seconds: float) -> float | None:
    """Seconds between the clocks furthest apart, as read right after a barrier; the least of several rounds.

    It can be too large by what processes take to leave a barrier (milliseconds), not too small by more than that.
    """
    if count == 1:
        return None
    spreads = []
    for number in range(CLOCK_ROUNDS):
        processes.barrier(f"preflight clock {number}", seconds)
        told = processes.exchange(f"preflight time {number}", repr(time.time()), seconds)
        times = [float(text) for text in told]
        spreads.append(max(times) - min(times))
    return min(spreads)
