"""A checkpoint of any kind as a Hugging Face folder, its weights dense."""

import jax.numpy as jnp
import numpy as np

from phijax.errors import UserError
from phijax.interchange.huggingface import config as huggingface_config
from phijax.interchange.huggingface.folder import Folder, dense_pieces, stored_dtype
from phijax.interchange.huggingface.names import Layout, tensors
from phijax.interchange.huggingface.safetensors import Shape
from phijax.interchange.opened import Opened

DTYPES = {
    "bfloat16": np.dtype(jnp.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}


def choose_layout(opened: Opened, format: str) -> Layout:
    """The layout of --format=hf, llama or mistral.

    `hf` is the class that the checkpoint came from; for one of ours Phi3, where its heads fit, else Mistral or Llama.
    Raises: UserError with the reason, where the model cannot be expressed.
    """
    layout: Layout
    if format == "hf":
        layout = _natural(opened)
    else:
        layout = format
    if reason := huggingface_config.unwritable(opened.model, layout):
        raise UserError(f"{opened.path} cannot be written in the {layout} layout: {reason}.")
    return layout


def _natural(opened: Opened) -> Layout:
    named = huggingface_config.ARCHITECTURES.get(opened.facts.architecture or "")
    candidates = [named] if named else []
    for layout in (*candidates, "phi3", "llama", "mistral"):
        if huggingface_config.unwritable(opened.model, layout) is None:
            return layout
    return "phi3"


def folder(opened: Opened, layout: Layout, dtype: np.dtype | None) -> Folder:
    """Args: dtype: None: as stored, float32 where parts of a tensor are stored in several."""
    by_name = {tensor.name: tensor for tensor in tensors(opened.model, layout)}
    shapes = [Shape(t.name, t.shape, dtype or stored_dtype(opened.weights, t)) for t in by_name.values()]
    return Folder(
        "hf",
        layout,
        shapes,
        lambda shape: dense_pieces(opened.weights, by_name[shape.name], shape.dtype),
        dtype=max(shapes, key=lambda shape: shape.nbytes).dtype,
    )
