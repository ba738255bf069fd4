"""Plans that no shards can come of: why, and what to ask for instead; nothing of them is left in the way of another."""

import pathlib
import shutil
from collections.abc import Iterable

from phijax.errors import UserError


class Fruitless(UserError):
    """Of all text nothing can be trained on by this plan."""


def no_record(split: str, tokens: int, shards: int, block: int, documents: int) -> Fruitless:
    """Args: documents: of all splits."""
    cure = "Give more text, a smaller --block, or fewer --num_shards."
    if split == "validation":
        wanted = min(0.5, 2 / documents)
        cure = (
            f"Give a larger --validation_fraction ({wanted:.2g} is about two documents of {documents}), or leave it "
            "out; or more text, or a smaller --block."
        )
    return Fruitless(
        f"The text for {'training' if split == 'all' else split} has {tokens} tokens in {shards} shards, "
        f"which fill no record of {block + 1}. {cure}\nNothing was kept: --output can be given again."
    )


def discard(folders: Iterable[pathlib.Path], work: pathlib.Path) -> None:
    """Removes what was made for such a plan, so that the next one is not taken for a change of it."""
    for folder in folders:
        for path in folder.glob("shard-*.arrayrecord"):
            path.unlink()
        if folder != work.parent and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    shutil.rmtree(work)
