"""Which saved steps are good: the update that led to them was finite. And which of them is the best.

A run writes so into the manifest's `extra`: "good", and "scores", held-out metrics of that very step by name.
"""

import math
from collections.abc import Iterable

import numpy as np
import tensorstore
from etils import epath

from phijax.checkpoint import manifest
from phijax.checkpoint.array_spec import array_spec
from phijax.errors import UserError

COUNT = "skipped_in_a_row"  # the leaf that tells it of steps saved before manifests did


def is_good(folder: epath.Path) -> bool:
    """Of a step's folder. False where it cannot be told; a state without a count of bad updates is good."""
    content = _manifest(folder)
    if content is None:
        return False
    said = manifest.called_good(content)
    if said is not None:
        return said
    if not any(leaf["path"] == COUNT for leaf in content["leaves"]):
        return True
    try:
        spec = array_spec(folder / manifest.STATE_FOLDER, COUNT)
        return int(np.asarray(tensorstore.open(spec, open=True, read=True).result().read().result())) == 0
    except ValueError:  # what TensorStore raises for files that are missing or cannot be decoded
        return False


def is_of_training(folder: epath.Path) -> bool:
    """Whether a step's manifest says what update led to it."""
    return manifest.called_good(_manifest(folder) or {}) is not None


def best(directory: epath.Path, saved: Iterable[int], metric: str) -> tuple[int, float] | None:
    """(step, score) of the good step with the lowest `metric`, of equal ones the newest; None: none has a score."""
    found = {}
    for step in saved:
        content = _manifest(directory / str(step))
        score = (content or {}).get("extra", {}).get("scores", {}).get(metric)
        if isinstance(score, int | float) and math.isfinite(score) and is_good(directory / str(step)):
            found[step] = float(score)
    if not found:
        return None
    step = min(found, key=lambda step: (found[step], -step))
    return step, found[step]


def restored_step(folder: epath.Path) -> int | None:
    """The `restore_step` of the start that saved this step."""
    return ((_manifest(folder) or {}).get("extra") or {}).get("restore_step")


def _manifest(folder: epath.Path) -> dict | None:
    try:
        content = manifest.read(folder)
    except (manifest.DamagedManifest, UserError):
        return None
    return content if isinstance(content.get("extra"), dict) else None
