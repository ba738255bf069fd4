"""Upkeep of a checkpoint directory by the one run that writes it: start, room for a save, fallback, old steps.

All of it runs on process 0 and returns lines for the log; run_state.py tells the other processes.
"""

from etils import epath

from phijax.checkpoint import good, manifest, steps
from phijax.checkpoint.config import CheckpointConfig
from phijax.checkpoint.lock import WriterLock
from phijax.errors import UserError
from phijax.storage import durable

INTERRUPTED_FILE = "interrupted_saves.txt"  # runs in a row that died while saving


def tidy(directory: epath.Path) -> list[str]:
    """Probes a write, removes what dead saves left; returns lines for the log."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "probe.tmp").write_text("phijax can write here")
        (directory / "probe.tmp").unlink()
        durable.sync_directory(directory.parent)
        listing = steps.list_folders(directory)
        lines = _count_interrupted(directory, listing)
        for name in listing.leftovers:
            folder = directory / name
            size = durable.bytes_below(folder)
            steps.delete(folder)
            lines.append(f"removed {folder}, {size:,} bytes that an interrupted save or deletion had left")
    except OSError as error:
        raise UserError(f"Checkpoints cannot be written to {directory}: {error}. Choose another --workdir.") from error
    if not durable.is_local(directory):
        for name in steps.in_the_way(listing):  # now, not at the save: what is trained till then would be lost
            steps.move_aside(directory / name)
    lines += [f"WARNING: {directory / name} is not a checkpoint of ours; ignored" for name in listing.strays]
    lines += [f"{directory / name} was set aside as damaged; kept until its step is saved" for name in listing.damaged]
    lines += [f"{directory / name} was set aside: not good; kept until its step is saved" for name in listing.not_good]
    if listing.aside:
        names = ", ".join(listing.aside)
        lines.append(f"set aside in {directory} when the run went back, and kept until you remove them: {names}")
    return lines


def newest_whole(directory: epath.Path, total_steps: int | None = None) -> tuple[int | None, list[str]]:
    """The newest good step that verifies, and lines about later ones. Raises UserError if no step verifies.

    Args: total_steps: that step ends the run and is taken as it is. Where no step is good, the newest is taken.
    """
    listing = steps.list_folders(directory)
    damaged, not_good, found = [], [], None
    for step in reversed(listing.steps):
        if problems := manifest.verify(directory / str(step)):
            damaged.append((step, manifest.damage(directory / str(step), problems)))
        elif step == total_steps or good.is_good(directory / str(step)):
            found = step
            break
        else:
            not_good.append(step)
    if found is None and not_good:
        found = not_good[0]
        damaged = [(step, text) for step, text in damaged if step > found]
    if found is not None:
        # Only now: with no whole step to go back to, nothing may be moved, or the next start would begin anew.
        for bad, _ in damaged:
            steps.set_aside_damaged(directory / str(bad))
        lines = [f"WARNING: {text}\nUsing step {found} instead." for _, text in damaged]
        if not_good:
            lines.append(
                f"WARNING: saved steps {not_good[::-1]} are not good: the updates before them were not finite. "
                f"Using step {found}{', since no step is good' if found in not_good else ' instead'}."
            )
        return found, lines
    aside = [*listing.damaged, *listing.not_good, *listing.aside]
    if not damaged and not aside:
        return None, []
    texts = [text for _, text in damaged] or [f"{directory / name} was set aside." for name in aside]
    raise UserError(
        f"{directory} has steps, but none is whole:\n"
        + "\n".join(texts)
        + "\nBring a step back from a copy, or choose another --workdir to start from scratch."
    )


def make_room(directory: epath.Path, lock: WriterLock, step: int, overwrite: bool) -> list[str]:
    """Makes room for a save of `step`; returns lines for the log. Raises UserError if it may not be."""
    lock.confirm()
    listing, folder, lines = steps.list_folders(directory), directory / str(step), []
    if newer := [saved for saved in listing.steps if saved > step]:
        raise UserError(
            f"Step {step} cannot be saved to {directory}: newer steps are there ({newer}), which the next start would "
            "take instead. Move them away, or choose another --workdir."
        )
    if step in listing.steps and not overwrite:
        raise UserError(f"Step {step} is saved in {directory} already.")
    if folder.name in listing.strays:
        lines.append(f"WARNING: {folder} is not ours and in the way of a save; now {steps.move_aside(folder)}")
    elif folder.exists():
        lines.append(f"removing what is in {folder}: step {step} is saved again")
        steps.delete(folder)
    steps.begin(folder)
    return lines


def after_save(directory: epath.Path, config: CheckpointConfig) -> list[str]:
    """What follows a durable save: the count of interrupted ones ends, old steps go. A failure harms no saved step."""
    try:
        (directory / INTERRUPTED_FILE).unlink(missing_ok=True)
        return _delete_old(directory, config)
    except OSError as error:
        return [f"WARNING: old steps cannot be removed: {error}"]


def _count_interrupted(directory: epath.Path, listing: steps.Listing) -> list[str]:
    """A run whose lives are shorter than a save starts again for ever; only a count across lives shows it."""
    if not any(steps.was_saving(directory / name) for name in listing.leftovers):
        return []
    file = directory / INTERRUPTED_FILE
    before = file.read_text().strip() if file.exists() else ""
    count = (int(before) if before.isdecimal() else 0) + 1
    file.write_text(str(count))
    if count == 1:
        return []
    return [
        f"WARNING: {count} runs in a row died while saving, so none got further than the last saved step. "
        "Is the time between two stops shorter than a save? Lower checkpoint.every_steps, or use faster storage."
    ]


def _delete_old(directory: epath.Path, config: CheckpointConfig) -> list[str]:
    """Applies keep_last, keep_every and keep_best; the newest good step always stays.

    Of a training run that is the one before the step just saved: whether that is worth anything, only the next update
    will tell, since the one that led to it may have been finite and have ruined the weights.
    """
    saved = steps.list_folders(directory).steps
    kept, lines = set(saved[-config.keep_last :]), []
    known = saved[:-1] if good.is_of_training(directory / str(saved[-1])) else saved
    kept.add(next((step for step in reversed(known) if good.is_good(directory / str(step))), None))
    if config.keep_best is not None and (found := good.best(directory, saved, config.keep_best)):
        kept.add(found[0])
        if found[0] == saved[-1]:
            lines.append(f"step {found[0]} is the best so far by {config.keep_best}: {found[1]:.6g}")
    for step in saved:
        if step in kept or (config.keep_every is not None and step % config.keep_every == 0):
            continue
        steps.delete(directory / str(step))
        lines.append(f"removed old step {step}")
    return lines
