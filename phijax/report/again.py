"""The command that this process was started by, to be typed again with a key changed."""

import os
import re
import shlex
import sys
from collections.abc import Sequence


def same_command(key: str, value: object, typed: Sequence[str] = ()) -> str:
    """The command line as a shell takes it, with --config.KEY=VALUE at its end instead of any it had for that key.

    Args: typed: the interpreter's whole command line; this process's own if empty.
    """
    arguments = [*(typed or sys.orig_argv)]
    if len(arguments) > 1 and os.path.basename(arguments[1]) == "phijax":  # a script: the shell finds its interpreter
        arguments = arguments[1:]
    of_key = re.compile(rf"--?config\.{re.escape(key)}=.*", re.DOTALL)
    kept = [argument for argument in arguments if not of_key.fullmatch(argument)]
    return shlex.join([*kept, f"--config.{key}={value}"])
