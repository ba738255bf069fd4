"""glibc's heap in a training process: one temporary buffer at a time, the rest given back. In fresh processes."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt and malloc_trim are glibc's")

BEGIN = """
import ctypes
from phijax.parallel import hardware

assert hardware.keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
libc.free.argtypes = (ctypes.c_void_p,)
libc.posix_memalign.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)
SIZE = 64 << 20


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def step():
    place = ctypes.c_void_p()
    assert libc.posix_memalign(ctypes.byref(place), 64, SIZE) == 0
    libc.malloc(2 << 20)  # stays, untouched: the buffer's place does not end where the heap does
    ctypes.memset(place, 1, SIZE)
    most.append(resident())
    libc.free(place)


most = []
"""
STOLEN = """
step()
for _ in range(4):
    stolen = libc.malloc(1 << 20)  # out of the place that the step before has left
    ctypes.memset(stolen, 1, 1 << 20)
    step()
print((max(most) - most[0]) >> 20)
"""


def run(text: str) -> int:
    ended = subprocess.run([sys.executable, "-c", BEGIN + text], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return int(ended.stdout)


def test_a_program_never_has_its_buffer_beside_the_place_of_the_last_one():
    kept = "step = hardware.in_kept_memory(step, SIZE)\n"
    assert run(kept + STOLEN) < 16
    assert run(STOLEN) >= 60  # MiB: the heap by itself holds two


def test_freed_blocks_in_the_middle_of_the_heap_are_given_back():
    given_back = """
blocks = [libc.malloc(64 << 10) for _ in range(1024)]
for block in blocks:
    ctypes.memset(block, 1, 64 << 10)
for block in blocks[:-1]:
    libc.free(block)
before = resident()
assert hardware.give_back_freed_memory()
print((before - resident()) >> 20)
"""
    assert run(given_back) >= 60
