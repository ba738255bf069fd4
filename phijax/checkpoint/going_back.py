"""Back to an older step: by `checkpoint.restore_step`, or past steps that turned out not to be good. Process 0.

Every step that is saved while restore_step=N is set carries N in its manifest. So a start with the same command, as
babysitters repeat it, goes back once: when the newest step carries N, the steps after N were made after going back.
Killed before the first save it finds N, and what is not yet set aside, and does the rest. Whether another command, with
restore_step=N again, wants to go back once more is not guessed: it is refused, with what to type for either.

By restore_step whole folders get another name (steps.set_aside_whole), newest first, so that at every instant the
steps that are left are those of one history. Steps that are not good stop being steps where they are, as damaged ones
do: the run makes the same number again soon, and a run that diverges again and again must not fill the disk.
"""

from collections.abc import Callable

from etils import epath

from phijax.checkpoint import good, manifest, steps
from phijax.errors import UserError
from phijax.storage import durable


def step_to_restore(directory: epath.Path, step: int, repeated: bool) -> tuple[int | None, list[str]]:
    """(`step`, lines for the log); None instead of the step when the run went back to it before. Moves nothing.

    Args: repeated: the config is that of the start before.
    Raises: UserError if there is no such step, if it is damaged, if later ones lie in a bucket, or if the run went
      back to it before and this is another config.
    """
    saved = steps.list_folders(directory).steps
    later = [number for number in saved if number > step]
    if later and good.restored_step(directory / str(_newest_readable(directory, later))) == step:
        before = f"checkpoint.restore_step={step}: this run went back to step {step} before, and made {later} since"
        if not repeated:
            moves = "\n".join(f"  mv {directory}/{n} {directory}/{n}.aside_again" for n in reversed(later))
            raise UserError(
                f"{before}. The config has changed, so which is meant is not clear.\nTo go on from {later[-1]}, leave "
                f"restore_step out. To go back to {step} once more, move the others away first:\n{moves}"
            )
        return None, [f"{before}; going on from the newest"]
    if step not in saved:
        raise UserError(
            f"checkpoint.restore_step={step}: {directory} holds no such step. It has: {_listed(directory)}.\n"
            "Take one of them. (A step that was set aside is one again when its folder, or the manifest in it, gets "
            "its name back.)"
        )
    if problems := manifest.verify(directory / str(step)):
        raise UserError(
            manifest.damage(directory / str(step), problems) + f"\nTake another step than {step}: {_listed(directory)}."
        )
    if later and not durable.is_local(directory):
        moves = "\n".join(f"  gcloud storage mv {directory}/{n} {directory}/{n}.aside1" for n in reversed(later))
        raise UserError(
            f"checkpoint.restore_step={step}: later steps are in the way, and a bucket cannot rename folders at one "
            f"instant. Move them away, then start the same command again:\n{moves}"
        )
    lines = [] if good.is_good(directory / str(step)) else [f"WARNING: step {step} is not called good"]
    return step, lines


def set_aside_later(directory: epath.Path, step: int, asked: bool, note: Callable[[dict], None]) -> list[str]:
    """Sets aside what was saved after `step`, from which the run goes on; returns lines for the log.

    Args:
      asked: by restore_step; else the later ones are not good.
      note: writes down that the run goes back, before anything is moved.
    """
    listing = steps.list_folders(directory)
    later = [number for number in listing.steps if number > step]
    if not later:
        return []
    if asked:  # what the history that is left had set aside by itself is no longer this one's to save again
        later += [int(name) for name in listing.not_good if int(name) > step]
    later.sort(reverse=True)
    note({"went_back_to": step, "set_aside": later[::-1], "asked": asked})
    lines = []
    for number in later:
        folder = directory / str(number)
        if asked and durable.is_local(directory):
            lines.append(f"going back to step {step}: {folder} is set aside as {steps.set_aside_whole(folder)}")
        elif not asked:
            steps.set_aside_not_good(folder)
            lines.append(f"{folder} is not good and set aside; kept until its step is saved again")
    return lines


def after_divergence(directory: epath.Path, last_good: int | None) -> tuple[int | None, bool, list[str]]:
    """The newest saved step from before the updates went bad, whether it is known to be, and lines for the log.

    The newest saved step may be where it began: the update that made it was finite, what it made of the weights was
    not to be seen before the next. If nothing good came of it, it is set aside; the only one is not, nor known.

    Args: last_good: the newest step whose update was good, in this start; None: none was.
    """
    listing = steps.list_folders(directory)
    known_good = [number for number in listing.steps if good.is_good(directory / str(number))]
    if not known_good:
        return None, False, []
    newest = known_good[-1]
    # A step after which another good one was saved, be that set aside by now, had a good update.
    proven = (last_good is not None and newest <= last_good) or any(int(name) > newest for name in listing.not_good)
    if proven:
        return newest, True, []
    if len(known_good) == 1:
        return newest, False, []
    folder = directory / str(newest)
    steps.set_aside_not_good(folder)
    return known_good[-2], True, [f"WARNING: no update was good after step {newest}: {folder} is set aside as not good"]


def _newest_readable(directory: epath.Path, later: list[int]) -> int:
    def readable(number: int) -> bool:
        try:
            manifest.read(directory / str(number))
        except (manifest.DamagedManifest, UserError):
            return False
        return True

    return next((number for number in reversed(later) if readable(number)), later[-1])


def _listed(directory: epath.Path) -> str:
    listing = steps.list_folders(directory)
    aside = [*listing.aside, *(f"{name} (not good)" for name in listing.not_good)]
    text = ", ".join(map(str, listing.steps)) or "none"
    return text + (f"; set aside: {', '.join(aside)}" if aside else "")
