"""A GGUF file's keys <-> ModelConfig. A key that changes the mathematics and that we do not follow is refused by name.

What an architecture has of its own is in `families/`.
"""

import numpy as np

from phijax.errors import UserError, nearest_name
from phijax.interchange.gguf.families import FAMILIES
from phijax.interchange.gguf.families.family import Family
from phijax.interchange.gguf.file import GgufFile
from phijax.interchange.gguf.keys import Keys
from phijax.model.config import ModelConfig


def family_of(file: GgufFile) -> Family:
    """Raises: UserError for an architecture that is not ours."""
    # First of all: only the first part of several has the other keys.
    parts, number = (file.metadata.get(f"split.{name}", 0) for name in ("count", "no"))
    if parts not in (0, 1):
        part = f"part {number + 1} of {parts}" if type(number) is int else f"one of {parts} parts"
        raise UserError(
            f"{file.path} is {part}. Join all parts into one file first: llama-gguf-split --merge FIRST_PART OUTPUT."
        )
    architecture = file.metadata.get("general.architecture")
    if architecture is None:
        raise UserError(f"{file.path} is no model: it has no general.architecture.")
    if file.metadata.get("general.type", "model") != "model":
        raise UserError(f"{file.path} holds a {file.metadata['general.type']!r}, not a model.")
    if architecture not in FAMILIES:
        raise UserError(
            f"{file.path} is a model of architecture {architecture!r}; read are {', '.join(map(repr, FAMILIES))}."
        )
    return FAMILIES[architecture]


def model_of(file: GgufFile, family: Family) -> ModelConfig:
    """Raises: UserError, as `Family.read`, and for a key that is not followed."""
    keys = Keys(file, family.architecture)
    for key, value in keys.values.items():
        plain = not isinstance(value, np.ndarray | list)
        if key in family.followed or (plain and value in family.neutral.get(key, ())):
            continue
        near = nearest_name(key, family.followed)
        raise UserError(
            f"{keys.said(key, value)} is not followed here, so the outputs would differ."
            + (f" Near to it: {family.architecture}.{near}." if near and key not in family.neutral else "")
        )
    try:
        return family.read(keys)
    except UserError as error:  # of ModelConfig.check, which knows no file
        raise error if str(file.path) in str(error) else UserError(f"{file.path}: {error}") from error


def keys_of(c: ModelConfig, family: Family) -> dict[str, int | float]:
    """The header's keys, under the architecture's name. Raises: UserError with the reason where it has none for it."""
    if reason := family.unwritable(c):
        other = next((name for name, each in FAMILIES.items() if each.unwritable(c) is None), None)
        advice = f" Write it as {other!r}." if other else ""
        raise UserError(
            f"A GGUF file of architecture {family.architecture!r} cannot hold this model: {reason}.{advice}"
        )
    return {f"{family.architecture}.{key}": value for key, value in family.write(c).items()}
