"""Paths as people write them, on command lines, in configs and in scripts."""

import os

from phijax.errors import UserError

SCHEMES = ("gs", "s3", "az", "hf")  # of etils' paths; its answer to any other is a KeyError


def named(path: str | os.PathLike) -> str:
    """The path with `~` and `~user` at its start replaced: a shell does not see them in --workdir=~/run.

    Raises: UserError where no home is known, and for a URL of a kind that no path can be.
    """
    text = os.fspath(path)
    if text.startswith("~"):
        expanded = os.path.expanduser(text)
        if expanded.startswith("~"):
            raise UserError(
                f"{text}: no home folder of {text.split('/')[0]} is known. A name that begins so is ./{text}"
            )
        return expanded
    scheme, separator, rest = text.partition("://")
    if separator and scheme not in SCHEMES:
        hint = f" Give the path alone: {rest}" if scheme == "file" else ""
        raise UserError(f"{text}: paths are local or gs://, not {scheme}://.{hint}")
    return text
