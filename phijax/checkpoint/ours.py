"""Opens a checkpoint of ours, a run's or an exported one, to read its weights alone. Takes no lock, changes nothing."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import tensorstore
from etils import epath

from phijax.checkpoint import durable, manifest, reading, steps, upkeep
from phijax.checkpoint.agreement import from_process_zero
from phijax.checkpoint.opened import Opened
from phijax.checkpoint.weight_source import Index, model_shapes
from phijax.errors import UserError
from phijax.model import params
from phijax.model.config import ModelConfig, model_from_dict
from phijax.text.open import open_tokenizer
from phijax.text.tokenizer import TextTokenizer

TOKENIZER_FOLDER = "tokenizer"
CHECKPOINTS_FOLDER = "checkpoints"
PARAMS = "params/"

# A chunk that several reads share is decoded once while it lies here. Chunks of one layer fit; those of checkpoints
# written before the chunk size was bounded (run_state.CHUNK_BYTES) may not, and are then decoded for each layer.
CACHE_BYTES = 256 << 20


class OursSource:
    """Leaves of params/ in one step's folder, read through TensorStore without Orbax: slices, not whole arrays."""

    def __init__(self, folder: epath.Path, model: ModelConfig, leaves: list[dict]):
        """Args: leaves: those of the manifest. Raises: UserError where they are not this model's."""
        self._folder = durable.absolute(folder)
        self._shapes = model_shapes(model)
        stored = {leaf["path"]: leaf for leaf in leaves}
        padded = params.shapes(model)
        wanted = [
            {"path": PARAMS + path, "shape": list(shape), "dtype": stored.get(PARAMS + path, {}).get("dtype")}
            for path, shape in padded.items()
        ]
        lines = manifest.differences(leaves, wanted, partial=True)
        extra = [path for path in stored if path.startswith(PARAMS) and path[len(PARAMS) :] not in padded]
        manifest.refuse_differences(folder, lines + [f"{path}: only in the checkpoint" for path in extra], len(stored))
        self._dtypes = {path: jnp.dtype(stored[PARAMS + path]["dtype"]) for path in padded}
        self._context = tensorstore.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})
        self._arrays: dict[str, tensorstore.TensorStore] = {}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    def dtype(self, path: str) -> np.dtype:
        return self._dtypes[path]

    def read(self, path: str, index: Index) -> np.ndarray:
        bounded = tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, self._shapes[path], strict=True))
        try:
            return np.asarray(self._array(path)[bounded].read().result())
        except ValueError as error:  # what TensorStore raises for files that are missing or cannot be decoded
            raise UserError(f"{self._folder}: {path} cannot be read: {error}") from error

    def _array(self, path: str) -> tensorstore.TensorStore:
        if path not in self._arrays:
            spec = array_spec(self._folder / manifest.STATE_FOLDER, PARAMS + path)
            self._arrays[path] = tensorstore.open(spec, context=self._context, open=True, read=True).result()
        return self._arrays[path]


def array_spec(state: epath.Path, path: str) -> dict[str, Any]:
    """How TensorStore finds one array of what Orbax writes: zarr inside an OCDBT database."""
    base = f"file://{state}/" if durable.is_local(state) else f"{state}/"
    return {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{path}/"}}


def is_ours(path: epath.Path) -> bool:
    """Whether a folder is a step of ours, or the workdir of a run with steps."""
    # Token shards have a manifest too.
    step = (path / manifest.MANIFEST_FILE).exists() and (path / manifest.STATE_FOLDER).exists()
    return step or (path / CHECKPOINTS_FOLDER).exists()


def is_step_of_run(folder: epath.Path) -> bool:
    """Whether a step's folder lies in a workdir, whose tokenizer and metrics are then its own."""
    return folder.parent.name == CHECKPOINTS_FOLDER


def open_ours(path: epath.Path) -> Opened:
    """A run's workdir (its newest step whose every byte is as it was written), or one step's folder. Collective.

    Raises: UserError for a damaged step (file named), or where there is none.
    """
    folder = epath.Path(from_process_zero(lambda: str(_whole_step(path))))
    described = reading.read_manifest(folder)
    model = _model_of(folder, described)
    extra = dict(described["extra"])
    carried = extra.get("weights_only") or {}  # what an export of another kind of checkpoint wrote down
    tokenizer = _tokenizer_folder(folder)
    facts = {key: value for key, value in carried.items() if key not in ("chat_template", "stop_ids")}
    facts |= {"step": described["step"], "identity": described["identity"]}
    if tokenizer is not None:
        facts["tokenizer_folder"] = tokenizer
    return Opened(
        path=folder,
        kind="phijax",
        model=model,
        weights=OursSource(folder, model, described["leaves"]),
        tokenizer=functools.partial(_open_tokenizer, folder, tokenizer),
        chat_template=carried.get("chat_template"),
        stop_ids=tuple(carried.get("stop_ids", ())),
        extra=facts,
    )


def _whole_step(path: epath.Path) -> epath.Path:
    if (path / manifest.MANIFEST_FILE).exists():
        if problems := manifest.verify(path, by_step=False):
            raise UserError(upkeep.damage(path, problems))
        return path
    folder = path / CHECKPOINTS_FOLDER
    saved = steps.list_folders(folder).steps
    whole = next((step for step in reversed(saved) if not manifest.verify(folder / str(step))), None)
    if whole is None:
        raise UserError(f"{path} holds no whole checkpoint" + (f" (damaged: {saved})." if saved else "."))
    return folder / str(whole)


def _model_of(folder: epath.Path, described: dict) -> ModelConfig:
    try:
        return model_from_dict(described["identity"]["model"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder}: {manifest.MANIFEST_FILE} does not say which model it is of ({error!r}).") from error


def _tokenizer_folder(folder: epath.Path) -> epath.Path | None:
    """Inside of an exported checkpoint; beside the checkpoints of a run."""
    candidates = [folder / TOKENIZER_FOLDER]
    if is_step_of_run(folder):
        candidates.append(folder.parent.parent / TOKENIZER_FOLDER)
    return next((candidate for candidate in candidates if candidate.is_dir()), None)


def _open_tokenizer(folder: epath.Path, tokenizer: epath.Path | None) -> TextTokenizer:
    if tokenizer is None:
        raise UserError(f"{folder} has no tokenizer: neither in it nor in its run's workdir is a {TOKENIZER_FOLDER}/.")
    return open_tokenizer(tokenizer)
