"""The compiled half of `cpu_int4.py`: built by this machine's compiler when it is first wanted, kept for the next time.

PHIJAX_CPU_KERNEL: "auto" (the best path that this CPU has), the name of a path, or "off" for plain XLA.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import shutil
import stat
import subprocess
import tempfile
import warnings

import jax

from phijax.errors import UserError, nearest_name
from phijax.storage import signals

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


def _cache() -> pathlib.Path | None:
    """None: no home is known."""
    try:
        return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "phijax"
    except RuntimeError:
        return None


def _open(cache: pathlib.Path | None) -> ctypes.CDLL:
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise _CannotBuild(f"no compiler among {', '.join(COMPILERS)} in PATH.")
    if cache is None or not _is_ours(cache):
        return _built(compiler, None)
    folder = cache / _key(compiler)
    reason = _why_not(folder)
    if reason is None:
        return _loaded_from(folder / LIBRARY_FILE)
    if os.path.lexists(folder):
        warnings.warn(f"The CPU kernel in {folder} is not loaded: {reason}. It is built anew.", stacklevel=2)
    return _built(compiler, folder)


def _key(compiler: str) -> str:
    """Of the source, the headers' release, the compiler and its flags: whatever changes the library."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    release = importlib.metadata.version("jaxlib").encode()
    parts = (*(file.read_bytes() for file in SOURCES), release, compiler.encode(), version, " ".join(FLAGS).encode())
    return "cpu_int4-" + hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]


def _is_ours(cache: pathlib.Path) -> bool:
    """Whether a library may lie there: whoever can write the folder decides what this process runs. Makes it."""
    try:
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        reason = _others_may_write(cache.stat())
    except OSError:  # nothing can be kept there
        return False
    if reason:
        warnings.warn(
            f"{cache} {reason}: the CPU kernel is not loaded from there, and built for this process alone, which takes "
            f"some seconds. Try chmod 700 {cache}, or set XDG_CACHE_HOME to a folder of yours.",
            stacklevel=2,
        )
    return reason is None


def _why_not(folder: pathlib.Path) -> str | None:
    """Why the library in `folder` is not to be loaded; None: it is what this user has built, whole.

    One cut short may load, and crash later. A link is not followed: what it leads to may be anybody's.
    """
    library, digest = folder / LIBRARY_FILE, folder / DIGEST_FILE
    try:
        for path, is_kind in ((folder, stat.S_ISDIR), (library, stat.S_ISREG), (digest, stat.S_ISREG)):
            found = path.lstat()
            if not is_kind(found.st_mode):
                return f"{path.name} is a link, or no {'folder' if path == folder else 'file'}"
            if reason := _others_may_write(found):
                return f"{path.name} {reason}"
        if digest.read_bytes() != hashlib.sha256(library.read_bytes()).hexdigest().encode():
            return "its bytes are not those that were built"
    except OSError as error:
        return str(error)
    return None


def _others_may_write(found: os.stat_result) -> str | None:
    if found.st_uid != os.geteuid():
        return f"belongs to user {found.st_uid}"
    if found.st_mode & 0o022:
        return f"may be written by others (mode {found.st_mode & 0o777:o})"
    return None


def _built(compiler: str, folder: pathlib.Path | None) -> ctypes.CDLL:
    """Builds aside, loads that, then renames it to `folder`: several processes may do so at once, one of them is kept.

    None, and a folder that cannot be written: nothing is kept.
    """
    aside = _new_folder(folder)
    library = aside / LIBRARY_FILE
    command = [compiler, *FLAGS, "-isystem", jax.ffi.include_dir(), str(SOURCES[0]), "-o", str(library)]
    try:
        with signals.tidied(lambda: shutil.rmtree(aside)):
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=SECONDS, check=False
            )
        if done.returncode:
            raise _CannotBuild(f"{compiler} failed:\n" + "\n".join(done.stderr.splitlines()[:8]))
        (aside / DIGEST_FILE).write_text(hashlib.sha256(library.read_bytes()).hexdigest())
        for path in (library, aside / DIGEST_FILE):
            path.chmod(0o600)  # a umask may let the group write
        loaded = _loaded_from(library)
        if folder is not None and aside.parent == folder.parent:
            _keep(aside, folder)
        return loaded
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _CannotBuild(f"building it failed: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)  # unless it was renamed; what is loaded stays in memory


def _new_folder(folder: pathlib.Path | None) -> pathlib.Path:
    """Beside `folder`, else among the temporary files; this user's alone."""
    if folder is not None:
        with contextlib.suppress(OSError):
            return pathlib.Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        return pathlib.Path(tempfile.mkdtemp(prefix="phijax-"))
    except OSError as error:
        raise _CannotBuild(f"there is no folder to build it in: {error}") from error


def _keep(aside: pathlib.Path, folder: pathlib.Path) -> None:
    """What cannot be kept is built again next time."""
    if os.path.lexists(folder) and _why_not(folder) is not None:
        with contextlib.suppress(OSError):
            folder.unlink() if folder.is_symlink() or not folder.is_dir() else shutil.rmtree(folder)
    with contextlib.suppress(OSError):  # there by now: another process was first
        aside.rename(folder)


def _loaded_from(library: pathlib.Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise _CannotBuild(f"{library} does not load: {error}") from error
