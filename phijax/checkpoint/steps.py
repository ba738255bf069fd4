"""The folders of a checkpoint directory: which are steps, which are remains, how one is given up.

directory/<step>/manifest.json    present: this is a saved step
directory/<step>/state/           what Orbax wrote
directory/<step>/unfinished.json  being saved or deleted: ours to remove
directory/<step>/damaged.json     its manifest, set aside because the files no longer match it
directory/<step>/not_good.json    its manifest, set aside because training diverged from that state
directory/<step>.aside<n>/        a whole step, set aside by a run that went back to an earlier one; nothing removes it
Anything else is not ours: named in the log and left alone.
"""

import dataclasses
import json
import os
import re
import socket

from etils import epath

from phijax.checkpoint.manifest import MANIFEST_FILE
from phijax.errors import UserError
from phijax.storage import durable

CHECKPOINTS_FOLDER = "checkpoints"  # in a workdir: what holds the steps
UNFINISHED_FILE = "unfinished.json"
DAMAGED_FILE = "damaged.json"
NOT_GOOD_FILE = "not_good.json"
ORBAX_TEMPORARY = ".orbax-checkpoint-tmp"
_ASIDE = re.compile(r"[0-9]+\.aside[0-9]+")


@dataclasses.dataclass
class Listing:
    """Folders of a checkpoint directory by what they are; all names but `steps`."""

    steps: list[int] = dataclasses.field(default_factory=list)
    leftovers: list[str] = dataclasses.field(default_factory=list)
    damaged: list[str] = dataclasses.field(default_factory=list)
    not_good: list[str] = dataclasses.field(default_factory=list)
    aside: list[str] = dataclasses.field(default_factory=list)
    strays: list[str] = dataclasses.field(default_factory=list)


def list_folders(directory: epath.Path) -> Listing:
    """Looks at every folder of `directory`; empty if there is none."""
    listing = Listing()
    if not directory.exists():
        return listing
    for folder in sorted(directory.iterdir(), key=str):
        if not folder.is_dir():
            continue
        if ORBAX_TEMPORARY in folder.name:
            listing.leftovers.append(folder.name)
        elif _ASIDE.fullmatch(folder.name):
            listing.aside.append(folder.name)
        elif not _is_step_name(folder.name):
            listing.strays.append(folder.name)
        elif (folder / MANIFEST_FILE).exists():
            listing.steps.append(int(folder.name))
        elif (folder / DAMAGED_FILE).exists():
            listing.damaged.append(folder.name)
        elif (folder / NOT_GOOD_FILE).exists():
            listing.not_good.append(folder.name)
        elif (folder / UNFINISHED_FILE).exists() or not any(folder.iterdir()):
            listing.leftovers.append(folder.name)
        else:
            listing.strays.append(folder.name)
    listing.steps.sort()
    return listing


def begin(folder: epath.Path) -> None:
    """Creates a step's folder with the mark that what is in it may be removed."""
    folder.mkdir(parents=True, exist_ok=True)
    _mark_unfinished(folder, "saving")


def finish(folder: epath.Path) -> None:
    """Takes the mark away, after the manifest is written."""
    (folder / UNFINISHED_FILE).unlink(missing_ok=True)


def delete(folder: epath.Path) -> None:
    """Removes a step or its remains. Killed at any instant, what is left is no step and is known as ours."""
    _mark_unfinished(folder, "deleting")
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    durable.sync_directory(folder)
    for child in folder.iterdir():
        if child.is_dir():
            child.rmtree()
        elif child.name != UNFINISHED_FILE:
            child.unlink()
    (folder / UNFINISHED_FILE).unlink()
    if folder.exists():  # object stores have no empty folders
        folder.rmtree()


def set_aside_damaged(folder: epath.Path) -> None:
    """A damaged step stops being one, so that the run can save that step again; its data stay to be looked at."""
    _rename_manifest(folder, DAMAGED_FILE)


def set_aside_not_good(folder: epath.Path) -> None:
    """The same of a step that nothing good came of. Its manifest's old name makes it a step again."""
    _rename_manifest(folder, NOT_GOOD_FILE)


def _rename_manifest(folder: epath.Path, name: str) -> None:
    if durable.is_local(folder):
        (folder / MANIFEST_FILE).replace(folder / name)
        durable.sync_directory(folder)
        return
    # Objects cannot be renamed: a copy, then the end of the old one. Killed in between, it is found as it was.
    (folder / name).write_bytes((folder / MANIFEST_FILE).read_bytes())
    (folder / MANIFEST_FILE).unlink()


def in_the_way(listing: Listing) -> list[str]:
    """Folders that are not ours under the name of a step which is still to come."""
    newest = max(listing.steps, default=-1)
    return [name for name in listing.strays if _is_step_name(name) and int(name) > newest]


def later_without_manifest(listing: Listing) -> dict[str, str]:
    """Folder with the number of a later step than the newest that is one -> why it is none."""
    kinds = {
        "is being saved, or its save was cut off": listing.leftovers,
        "was set aside, damaged": listing.damaged,
        "was set aside, not good": listing.not_good,
        f"has no {MANIFEST_FILE}, as an interrupted copy leaves it": listing.strays,
    }
    newest = max(listing.steps, default=-1)
    found = {name: why for why, names in kinds.items() for name in names if _is_step_name(name) and int(name) > newest}
    return dict(sorted(found.items(), key=lambda item: int(item[0])))


def move_aside(folder: epath.Path) -> epath.Path:
    """Renames a folder that is not ours out of the way of a save; returns its new path.

    Raises: UserError on an object store, which would copy all that is in it.
    """
    if not durable.is_local(folder):
        raise UserError(
            f"{folder} is in the way of a save: it has the name of a step and is not ours. A bucket cannot rename it, "
            f"so it is left as it is.  Move it away (gcloud storage mv {folder} {folder}.stray), or choose another "
            "--workdir"
        )
    return _rename(folder, "stray")


def set_aside_whole(folder: epath.Path) -> epath.Path:
    """Renames a whole step that a run has gone back from, on a local disk; returns its new path."""
    target = _rename(folder, "aside")
    durable.sync_directory(folder.parent)
    return target


def _rename(folder: epath.Path, why: str) -> epath.Path:
    number = 1
    while (target := folder.parent / f"{folder.name}.{why}{number}").exists():
        number += 1
    folder.rename(target)
    return target


def was_saving(folder: epath.Path) -> bool:
    """Whether a leftover is of a save that was cut off, not of a deletion."""
    mark = folder / UNFINISHED_FILE
    return mark.exists() and '"saving"' in mark.read_text()


def _mark_unfinished(folder: epath.Path, doing: str) -> None:
    who = {"doing": doing, "host": socket.gethostname(), "pid": os.getpid()}
    (folder / UNFINISHED_FILE).write_text(json.dumps(who))


def _is_step_name(name: str) -> bool:
    return name.isascii() and name.isdecimal() and str(int(name)) == name
