"""A trained model out of a run's workdir, for what reads it and does not go on with it. Takes no lock."""

from typing import Any

from etils import epath
from jax.sharding import Mesh

from phijax.checkpoint.open import load_params, open_checkpoint
from phijax.model.config import ModelConfig


def open_trained(path: epath.PathLike, mesh: Mesh) -> tuple[ModelConfig, Any, Any]:
    """Model, parameters on `mesh`, and tokenizer of a checkpoint. Raises: UserError as `open_checkpoint`."""
    opened = open_checkpoint(path)
    return opened.model, load_params(opened, mesh), opened.tokenizer()
