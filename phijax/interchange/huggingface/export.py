"""A checkpoint of any kind as a Hugging Face folder, its weights dense."""

import jax.numpy as jnp
import numpy as np

from phijax.errors import UserError
from phijax.interchange.huggingface.families import FAMILIES
from phijax.interchange.huggingface.families.family import Family
from phijax.interchange.huggingface.folder import Folder, dense_pieces, stored_dtype
from phijax.interchange.huggingface.safetensors import Shape
from phijax.interchange.opened import Opened
from phijax.interchange.tensors import tensors

DTYPES = {
    "bfloat16": np.dtype(jnp.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}


def choose_family(opened: Opened, format: str) -> Family:
    """The class of --format=hf, or of the format that is called as one.

    `hf` is the class that the checkpoint came from, where it can hold the model; else the first that can.
    Raises: UserError with the reason, where the model cannot be expressed.
    """
    if format != "hf":
        family = FAMILIES[format]
        if reason := family.unwritable(opened.model):
            raise UserError(f"{opened.path} cannot be written in the {format} layout: {reason}.")
        return family
    candidates = sorted(FAMILIES.values(), key=lambda family: family.class_name != opened.facts.architecture)
    reasons = []
    for family in candidates:
        if (reason := family.unwritable(opened.model)) is None:
            return family
        reasons.append(reason)
    raise UserError(f"{opened.path} cannot be written as any class of transformers:\n  " + "\n  ".join(reasons))


def folder(opened: Opened, family: Family, dtype: np.dtype | None) -> Folder:
    """Args: dtype: None: as stored, float32 where parts of a tensor are stored in several."""
    by_name = {tensor.name: tensor for tensor in tensors(opened.model, family.rows)}
    shapes = [Shape(t.name, t.shape, dtype or stored_dtype(opened.weights, t)) for t in by_name.values()]
    return Folder(
        "hf",
        family,
        shapes,
        lambda shape: dense_pieces(opened.weights, by_name[shape.name], shape.dtype),
        dtype=max(shapes, key=lambda shape: shape.nbytes).dtype,
    )
