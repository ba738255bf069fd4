"""A folder, or a large file, that appears whole or not at all: written under another name, made durable, renamed."""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator

from etils import epath

from phijax.errors import UserError
from phijax.storage import atomic, durable, signals

UNFINISHED = ".unfinished"


def check_output(output: epath.Path, nbytes: int) -> None:
    """Raises: UserError if something is there already, or the disk has no room for `nbytes`."""
    if not durable.is_local(output):
        raise UserError(f"--output={output}: exports are written to a local disk; copy the folder from there.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output={output} is there already. Nothing is overwritten: give a new name, or remove it.")
    if os.path.islink(output) and not output.exists():  # nothing could be renamed to it at the end
        raise UserError(f"--output={output} is a link that leads nowhere. Remove it, or give another name.")
    check_room(output, nbytes)


def check_room(output: epath.Path, nbytes: int) -> None:
    """Raises: UserError if the disk that `output` is to lie on has no room for `nbytes`."""
    parent = output
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(os.fspath(parent)).free
    if nbytes > free:
        raise UserError(f"--output={output} needs {in_words(nbytes)}; {parent} has {in_words(free)} free.")


def in_words(nbytes: int) -> str:
    """In the largest unit that leaves a digit before the point: 12.3 MB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes} bytes"


def unfinished(output: epath.Path) -> epath.Path:
    """Where `output` is written until it is whole."""
    return output.parent / f"{output.name}{UNFINISHED}"


@contextlib.contextmanager
def staged(output: epath.Path, *, resumable: bool = False) -> Iterator[epath.Path]:
    """Gives a folder to write to, OUTPUT.unfinished, which becomes `output` at the end, after all of it is durable.

    After an exception nothing is left, nor after Ctrl-C and SIGTERM; after a kill the unfinished folder is, and the
    next export removes it.
    Args: resumable: what a killed process left is given as it is, and Ctrl-C and SIGTERM leave it too.
    """
    output = durable.absolute(output)
    folder = unfinished(output)
    if folder.exists() and not resumable:
        folder.rmtree()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with signals.tidied(lambda: None if resumable else shutil.rmtree(folder)):
            yield folder
            for file in durable.files_below(folder):
                descriptor = os.open(os.fspath(file), os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
            durable.sync_tree(folder)
        if output.exists():
            os.rmdir(os.fspath(output))  # empty: check_output
        folder.rename(output)
        durable.sync_directory(output.parent)
    except BaseException as error:
        if folder.exists() and not (resumable and isinstance(error, KeyboardInterrupt)):
            folder.rmtree()
        raise


@contextlib.contextmanager
def staged_file(path: epath.Path) -> Iterator[epath.Path]:
    """Gives a temporary name beside `path`; what lies there at the end is made durable and becomes `path`.

    After an exception, Ctrl-C and SIGTERM nothing is left, nor a folder that was made for it; what a killed process has
    left, the next one removes. Raises: UserError for a disk that is full or fails.
    """
    path = durable.absolute(path)
    made = [folder for folder in path.parents if not folder.exists()]  # the deepest first

    def remove_folders() -> None:
        for folder in made:
            with contextlib.suppress(OSError):  # others have put something into it
                os.rmdir(os.fspath(folder))

    def tidy(temporary: epath.Path) -> None:
        temporary.unlink(missing_ok=True)
        remove_folders()

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        with atomic.replaced(path) as temporary, signals.tidied(lambda: tidy(temporary)):
            yield temporary
    except BaseException as error:
        remove_folders()
        if isinstance(error, OSError):
            raise not_written(path, error) from error
        raise


def not_written(output: epath.Path, error: OSError) -> UserError:
    """What to say of an error while `output` was made: it may be of a file that was read for it."""
    said, file = error.strerror or error, error.filename
    if not isinstance(file, str | os.PathLike) or _is_of(durable.absolute(file), durable.absolute(output)):
        return UserError(f"{output} could not be written: {said}. Nothing is left of it.")
    return UserError(f"{epath.Path(file)}: {said}. Nothing is left of {output}.")


def _is_of(file: epath.Path, output: epath.Path) -> bool:
    """Whether a file is `output`, a folder that holds it, or written for it, within or under a name made of its."""
    if file == output or file in output.parents:
        return True
    beside = file.parts[len(output.parent.parts) :] if output.parent in file.parents else ()
    return bool(beside) and beside[0].lstrip(".").startswith(output.name.lstrip("."))


def _sweep(path: epath.Path) -> None:
    """Removes temporary files that processes, dead by now, have left beside `path`."""
    left = re.compile(rf"\.+{re.escape(path.name)}\.(?:exact-)?([0-9]+)\.(?:tmp|gguf)(?:\.[0-9]+\.tmp)?")
    for file in path.parent.iterdir():
        if (match := left.fullmatch(file.name)) and not _lives(int(match[1])):
            file.unlink(missing_ok=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
