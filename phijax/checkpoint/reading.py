"""Reading a checkpoint: for the run that resumes, and for commands that only look. Takes no lock, changes nothing."""

import json
import math
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from phijax.checkpoint import manifest, steps
from phijax.errors import UserError
from phijax.storage import durable


def restore_arrays(folder: epath.PathLike, like: Any, *, partial: bool = False) -> Any:
    """Arrays of a step's folder, in the structure and the shardings of `like`; for readers, needs no lock. Collective.

    Bytes are not verified here (manifest.verify). Raises UserError for another model, as `RunCheckpoints.restore`.
    Args:
      like: pytree of jax.ShapeDtypeStruct with shardings.
      partial: takes what `like` names and leaves the rest, as the weights without the optimizer's state.
    """
    folder = durable.absolute(folder)
    durable.check_name(folder, orbax=True)
    leaves = manifest.flatten(like)
    stored = read_manifest(folder)["leaves"]
    lines = manifest.differences(stored, manifest.describe_leaves(leaves), partial=partial)
    manifest.refuse_differences(folder, lines, len(stored))
    if missing := [path for path, leaf in leaves.items() if leaf.sharding is None]:
        raise ValueError(f"restore needs a sharding for every array; none for {missing[0]}")
    arguments = {
        path: ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)
        for path, leaf in leaves.items()
    }
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        arrays = checkpointer.restore(
            folder / manifest.STATE_FOLDER,
            args=ocp.args.PyTreeRestore(item=leaves, restore_args=arguments, partial_restore=partial),
        )
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[path] for path in leaves])


def read_manifest(folder: epath.Path) -> dict:
    """The manifest of a step's folder. Raises UserError if there is none or it is damaged."""
    try:
        return manifest.read(folder)
    except manifest.DamagedManifest as error:
        raise UserError(f"{folder} is no readable checkpoint: {error}") from error


def newest_identity(directory: epath.PathLike) -> dict | None:
    """What the newest step whose manifest can be read belongs to; None where there is no such step."""
    directory = epath.Path(directory)
    for step in reversed(steps.list_folders(directory).steps):
        try:
            return manifest.read(directory / str(step))["identity"]
        except manifest.DamagedManifest:
            continue
    return None


def describe(directory: epath.PathLike) -> str:
    """What a checkpoint directory, or one step's folder, holds, as text. Raises UserError if there is no step."""
    directory = epath.Path(directory)
    if (directory / manifest.MANIFEST_FILE).exists():
        return _describe_step(directory)
    listing = steps.list_folders(directory)
    if not listing.steps:
        raise UserError(f"{directory} holds no checkpoint: no folder in it has a {manifest.MANIFEST_FILE}.")
    parts = [_describe_step(directory / str(step)) for step in listing.steps]
    parts += [f"{directory / name}: damaged, set aside" for name in listing.damaged]
    parts += [f"{directory / name}: not good, set aside" for name in listing.not_good]
    parts += [f"{directory / name}: set aside when the run went back" for name in listing.aside]
    parts += [f"{directory / name}: unfinished" for name in listing.leftovers]
    parts += [f"{directory / name}: not a checkpoint of ours" for name in listing.strays]
    return "\n".join(parts)


def _describe_step(folder: epath.Path) -> str:
    """A few lines; digests are not checked."""
    try:
        content = manifest.read(folder)
    except manifest.DamagedManifest as error:
        return f"{folder}: damaged: {error}"
    size = sum(entry["bytes"] for entry in content["files"])
    count: dict[str, int] = {}
    for leaf in content["leaves"]:
        count[leaf["dtype"]] = count.get(leaf["dtype"], 0) + math.prod(leaf["shape"])
    numbers = ", ".join(f"{number:,} {dtype}" for dtype, number in sorted(count.items()))
    lines = [
        f"{folder}: step {content['step']}, written {content['written']}",
        f"  {len(content['leaves'])} arrays ({numbers}), {len(content['files'])} files of {size:,} bytes",
    ]
    for title in ("identity", "extra"):
        lines += [f"  {title}.{key}: {json.dumps(value)}" for key, value in content[title].items()]
    return "\n".join(lines)
