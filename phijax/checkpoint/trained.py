"""A trained model out of a run's workdir, for what reads it and does not go on with it. Takes no lock."""

from typing import Any

from etils import epath
from jax.sharding import Mesh

from phijax.checkpoint import manifest, reading, steps, upkeep
from phijax.checkpoint.agreement import from_process_zero
from phijax.errors import UserError
from phijax.model import params
from phijax.model.config import ModelConfig, model_from_dict
from phijax.text.tokenizer import Tokenizer

TOKENIZER_FOLDER = "tokenizer"
CHECKPOINTS_FOLDER = "checkpoints"


def open_trained(workdir: epath.PathLike, mesh: Mesh) -> tuple[ModelConfig, Any, Tokenizer]:
    """Model, parameters on `mesh`, and tokenizer of a run's newest step whose every byte is as it was written.

    Raises: UserError where there is none.
    """
    folder = epath.Path(workdir) / CHECKPOINTS_FOLDER
    saved = steps.list_folders(folder).steps if folder.exists() else []
    whole = next((step for step in reversed(saved) if not manifest.verify(folder / str(step))), None)
    if whole is None:
        raise UserError(f"{workdir} holds no whole checkpoint" + (f" (damaged: {saved})." if saved else "."))
    described = reading.read_manifest(folder / str(whole))
    model = model_from_dict(described["identity"]["model"])
    weights = load_params(folder / str(whole), model, mesh)
    return model, weights, Tokenizer.open(epath.Path(workdir) / TOKENIZER_FOLDER)


def load_params(folder: epath.PathLike, model: ModelConfig, mesh: Mesh) -> Any:
    """The parameters alone of one saved step, on `mesh`, bit for bit.

    Raises: UserError for a damaged step (file named), another model, or a parameter that the step lacks.
    """
    if problems := from_process_zero(lambda: manifest.verify(epath.Path(folder), by_step=False)):
        raise UserError(upkeep.damage(epath.Path(folder), problems))
    like = {"params": params.abstract(model, mesh)}
    return reading.restore_arrays(folder, like, partial=True)["params"]
