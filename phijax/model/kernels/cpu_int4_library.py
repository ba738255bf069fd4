"""The compiled half of `cpu_int4.py`: built by this machine's compiler when it is first wanted, kept for the next time.

PHIJAX_CPU_KERNEL: "auto" (the best path that this CPU has), the name of a path, or "off" for plain XLA.
"""

import ctypes
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import tempfile
import warnings

import jax

from phijax.errors import UserError, nearest_name

VARIABLE = "PHIJAX_CPU_KERNEL"
PATHS = ("generic", "avx2", "avxvnni", "avx512vnni")  # their numbers in the source, the best last
PRODUCT, GATED, ATTEND = TARGETS = ("phijax_cpu_int4_product", "phijax_cpu_int4_gated", "phijax_cpu_int4_attend")
HEADERS = tuple(f"cpu_int4_{name}.h" for name in ("tiles", "cache", "attention", "prompt", "threads"))
SOURCES = tuple(pathlib.Path(__file__).with_name(name) for name in ("cpu_int4.cc", *HEADERS))
COMPILERS = ("c++", "g++", "clang++")
# Contraction would let the compiler sum differently for other numbers of rows; traps and errno keep loops from vectors.
MATHS = ("-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno")
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", *MATHS, "-pthread")
SECONDS = 300
LIBRARY_FILE, DIGEST_FILE = "cpu_int4.so", "sha256"


def path() -> str | None:
    """The path to compute by; None: there is none, by choice or, with a warning that says why, for want of a compiler.

    Raises: UserError for a choice that this CPU does not have.
    """
    choice = os.environ.get(VARIABLE, "auto")
    if choice == "off":
        return None
    if choice != "auto" and choice not in PATHS:
        near = nearest_name(choice, (*PATHS, "auto", "off"))
        raise UserError(
            f"{VARIABLE}={choice} is not one of auto, off, {', '.join(PATHS)}." + (f" Nearest: {near}." if near else "")
        )
    library = loaded()
    if library is None:
        return None
    there = [name for number, name in enumerate(PATHS) if library.phijax_cpu_int4_has(number)]
    if choice not in ("auto", *there):
        raise UserError(f"{VARIABLE}={choice}: this CPU has {', '.join(there)}. auto takes the best of them.")
    return there[-1] if choice == "auto" else choice


@functools.lru_cache(maxsize=1)
def loaded() -> ctypes.CDLL | None:
    """The library, its products known to XLA; None, with a warning that says why, where it cannot be had."""
    try:
        library = _open(_cache())
    except _CannotBuild as reason:
        warnings.warn(
            f"The CPU kernel for weights in few bits is not there: {reason}\nThey are computed by plain XLA instead: "
            f"the same numbers or better, several times slower. Install g++ or clang++; {VARIABLE}=off silences this.",
            stacklevel=2,
        )
        return None
    for name in TARGETS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return library


class _CannotBuild(Exception):
    """Why there is no library."""


def _cache() -> pathlib.Path:
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "phijax"


def _open(cache: pathlib.Path) -> ctypes.CDLL:
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise _CannotBuild(f"no compiler among {', '.join(COMPILERS)} in PATH.")
    folder = cache / _key(compiler)
    if not _is_whole(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder = _build(compiler, folder)
    try:
        return ctypes.CDLL(str(folder / LIBRARY_FILE))
    except OSError as error:
        raise _CannotBuild(f"{folder / LIBRARY_FILE} does not load: {error}") from error


def _key(compiler: str) -> str:
    """Of the source, the headers' release, the compiler and its flags: whatever changes the library."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    release = importlib.metadata.version("jaxlib").encode()
    parts = (*(file.read_bytes() for file in SOURCES), release, compiler.encode(), version, " ".join(FLAGS).encode())
    return "cpu_int4-" + hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]


def _is_whole(folder: pathlib.Path) -> bool:
    """A library cut short may load and crash later, so its bytes are compared with what was written."""
    try:
        digest = hashlib.sha256((folder / LIBRARY_FILE).read_bytes()).hexdigest()
        return (folder / DIGEST_FILE).read_text() == digest
    except (OSError, UnicodeDecodeError):
        return False


def _build(compiler: str, folder: pathlib.Path) -> pathlib.Path:
    """Builds aside, then renames: several processes may do so at once, and the first one's is taken."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        aside = pathlib.Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    except OSError:  # a home that cannot be written: for this process alone
        aside = pathlib.Path(tempfile.mkdtemp(prefix="phijax-"))
        folder = aside / folder.name
    library = aside / LIBRARY_FILE
    command = [compiler, *FLAGS, "-isystem", jax.ffi.include_dir(), str(SOURCES[0]), "-o", str(library)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        if done.returncode:
            raise _CannotBuild(f"{compiler} failed:\n" + "\n".join(done.stderr.splitlines()[:8]))
        (aside / DIGEST_FILE).write_text(hashlib.sha256(library.read_bytes()).hexdigest())
        if folder.parent == aside:
            return aside
        aside.rename(folder)
    except (OSError, subprocess.TimeoutExpired) as error:
        if not _is_whole(folder):  # else another process was first
            raise _CannotBuild(f"building it failed: {error}") from error
    finally:
        if folder.parent != aside:
            shutil.rmtree(aside, ignore_errors=True)
    return folder
