"""What every command does around its work: parse flags, turn a UserError into one message, choose the exit code."""

import contextlib
import errno
import functools
import logging
import os
import re
import select
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import flags

from phijax import distribution, errors
from phijax.parallel import hardware
from phijax.report import streams
from phijax.storage import signals
from phijax.storage.named import named

# Full, read-only and forbidden disks, and names that no disk takes, may show anywhere, and are no bugs of ours.
_OF_THE_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP)
_NO_TEMPORARY = "No usable temporary directory"  # tempfile's, with the number of a file that is missing
_EXIT_UNREAD = 141  # as a shell says of a command that SIGPIPE ended
_HELP = ("--help", "-help", "-h", "--helpfull", "--helpshort")


def define_path(name: str, help: str, flag_values: flags.FlagValues) -> None:
    """A flag that names a file or folder, None by default; `~` is the home folder in it."""
    flags.DEFINE(_Path(), name, None, help, flag_values)


class _Path(flags.ArgumentParser):
    def parse(self, argument: str) -> str:
        return named(argument)

    def flag_type(self) -> str:
        return "path"


def run(main: Callable[[list[str]], int | None], flag_values: flags.FlagValues = flags.FLAGS) -> NoReturn:
    """Parses `sys.argv`, calls `main` with what is not a flag, and ends the process.

    A command that defines its flags in a FlagValues of its own (`flags.DEFINE_string(..., flag_values=FLAGS)`) can be
    imported beside other commands with flags of the same name, and its --help shows nothing of the libraries.

    Args:
      main: takes the arguments that are not flags; returns an exit code, None for done.
      flag_values: where the flags of this command are defined.
    Exit codes: `phijax.errors.EXIT_*`; SIGTERM and Ctrl-C: 75, at once, unless the command handles them itself.
    """
    streams.mend()  # first: what is opened must not get the number of a closed stream
    with signals.at_once():
        _run(main, flag_values)


def _run(main: Callable[[list[str]], int | None], flag_values: flags.FlagValues) -> NoReturn:
    warnings.formatwarning = _our_warnings_alone(warnings.formatwarning)
    if stranger := distribution.foreign():
        print(f"warning: {stranger}", file=sys.stderr)
    code = _exit_code(main, flag_values)
    logging.shutdown()
    error = streams.flush()
    if error is not None and code == errors.EXIT_DONE:
        code = _EXIT_UNREAD if isinstance(error, BrokenPipeError) else errors.EXIT_USER_ERROR
        if code != _EXIT_UNREAD:
            _tell(f"error: what was printed could not be written: {error}")
    if code != errors.EXIT_DONE:
        # In a job of many processes the interpreter's own exit waits at a barrier for peers that may never come.
        os._exit(code)
    sys.exit(code)


def run_with_overrides(
    main: Callable[[list[str], list[tuple[str, str]]], int | None], flag_values: flags.FlagValues
) -> NoReturn:
    """`run` for a command of an experiment: `main` also takes the (KEY, VALUE) pairs of `--config.KEY=VALUE`."""
    streams.mend()
    with signals.at_once():
        _run_with_overrides(main, flag_values)


def _run_with_overrides(
    main: Callable[[list[str], list[tuple[str, str]]], int | None], flag_values: flags.FlagValues
) -> NoReturn:
    hardware.prepare_cpu()
    overrides: list[tuple[str, str]] = []

    @functools.wraps(main)  # --help is its module's
    def with_overrides(arguments: list[str]) -> int | None:
        return main(arguments, overrides)

    try:
        rest, overrides = split_overrides(sys.argv[1:])
    except errors.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(errors.EXIT_USER_ERROR)
    sys.argv = [sys.argv[0], *rest]
    _run(with_overrides, flag_values)


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Takes `--config.KEY=VALUE` out of a command line. -> (the rest, overrides).

    ml_collections' own flag answers a wrong key with an AttributeError inside absl, and cannot index lists.
    """
    rest, overrides = [], []
    for argument in arguments:
        match = re.match(r"--?config\.([^=]+)(?:=(.*))?$", argument, re.DOTALL)
        if match and match[2] is None:
            raise errors.UserError(f"{argument}: an override needs a value, {argument}=VALUE.")
        if match:
            overrides.append((match[1], match[2]))
        else:
            rest.append(argument)
    return rest, overrides


def _exit_code(main: Callable[[list[str]], int | None], flag_values: flags.FlagValues) -> int:
    try:
        return _help_or_main(main, flag_values)
    except errors.UserError as error:
        _tell(f"error: {error}")
        return errors.EXIT_USER_ERROR
    except flags.Error as error:
        _tell(f"error: {error}\nAll flags: --help")
        return errors.EXIT_USER_ERROR
    except KeyboardInterrupt:
        _tell("stopped from the keyboard; the same command can be started again")
        return errors.EXIT_RESTART
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else errors.EXIT_DONE if stop.code is None else errors.EXIT_CRASH
    except BaseException as error:
        if isinstance(error, OSError) and (error.errno in _OF_THE_MACHINE or _NO_TEMPORARY in str(error)):
            _tell(f"error: {error}. Start the same command again when that is mended.")
            return errors.EXIT_USER_ERROR
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return _EXIT_UNREAD
        _tell(traceback.format_exc().rstrip())
        return errors.EXIT_CRASH


def _tell(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads that either
        print(text, file=sys.stderr, flush=True)


def _our_warnings_alone(others: Callable[..., str]) -> Callable[..., str]:
    """Warnings of phijax's own as a line for people; those of libraries as Python writes them."""

    def written(message, category, filename, *rest) -> str:
        ours = category is UserWarning and f"{os.sep}phijax{os.sep}" in filename
        return f"warning: {message}\n" if ours else others(message, category, filename, *rest)

    return written


def _help_or_main(main: Callable[[list[str]], int | None], flag_values: flags.FlagValues) -> int:
    before_flags_end = sys.argv[: sys.argv.index("--")] if "--" in sys.argv else sys.argv
    if any(argument in _HELP for argument in before_flags_end[1:]):
        print(_help_text(main, flag_values))
        return errors.EXIT_DONE
    if "--version" in before_flags_end[1:]:
        print(f"phijax {distribution.version()}")
        return errors.EXIT_DONE
    _, *positional = flag_values(sys.argv)
    return main(positional) or errors.EXIT_DONE


def _nobody_reads() -> bool:
    """Whether the broken pipe is our output, as in `phijax show DIR | head`."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        poll.register(stream, select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _help_text(main: Callable[[list[str]], int | None], flag_values: flags.FlagValues) -> str:
    """The command's module docstring and its flags, without the flags that libraries define for themselves."""
    described = sys.modules[main.__module__].__doc__ or ""
    names = flag_values.flags_by_module_dict()
    # A command started with -m is known to absl by its file's name, one that was imported by its module's.
    ours = [flag for module, found in names.items() for flag in found if _is_of(module, main.__module__)]
    if flag_values is not flags.FLAGS:
        ours = [flag for module, found in names.items() if not module.startswith("absl.") for flag in found]
    lines = [_describe(flag) for flag in sorted(ours, key=lambda flag: flag.name)]
    return "\n".join([described.strip(), *(["", "Flags:", *lines] if lines else [])])


def _is_of(flag_module: str, main_module: str) -> bool:
    return flag_module == main_module or (main_module == "__main__" and flag_module == sys.argv[0])


def _describe(flag: flags.Flag) -> str:
    name = f"  --[no]{flag.name}" if flag.boolean else f"  --{flag.name}"
    shown = (
        "" if flag.default in (None, "", []) or (flag.boolean and not flag.default) else f" (default: {flag.default})"
    )
    text = flag.help.split(";\n    repeat this option")[0]  # absl's own remark
    return f"{name}: {text}{shown}"
