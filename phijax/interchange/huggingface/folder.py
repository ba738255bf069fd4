"""A Hugging Face folder, written tensor by tensor: what each format of one is, and the writer that all share."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from phijax.interchange import model_card, tokenizer_check, tokenizer_files
from phijax.interchange.huggingface import config as huggingface_config
from phijax.interchange.huggingface import safetensors as safetensors_files
from phijax.interchange.huggingface.families.family import Family
from phijax.interchange.huggingface.safetensors import Shape
from phijax.interchange.opened import Opened
from phijax.interchange.tensors import Part, Tensor
from phijax.interchange.weight_source import WeightSource, blocks, check_finite
from phijax.storage import atomic, staging


@dataclasses.dataclass(frozen=True)
class Folder:
    """What a checkpoint is to become, decided before anything is written.

    format: the command's name of it; says what the model card tells, and whose files they are.
    tensors: in their order, and `pieces` gives the values of one of them from its first row.
    dtype: what config.json says that the model computes in; `keys`: more of config.json.
    notes: what the folder does not hold as the checkpoint does, or its readers compute otherwise, in lines.
    """

    format: str
    family: Family
    tensors: Sequence[Shape]
    pieces: Callable[[Shape], Iterable[np.ndarray]]
    dtype: np.dtype
    keys: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: Sequence[str] = ()

    def files(self, max_shard_bytes: int) -> dict[str, list[Shape]]:
        """File -> its tensors."""
        return safetensors_files.plan_files(self.tensors, max_shard_bytes)


def write(
    opened: Opened,
    output: epath.Path,
    folder: Folder,
    *,
    max_shard_bytes: int = 5 * 10**9,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Weights, tokenizer, config.json, model card: all of it, or nothing. A piece of a tensor is in memory at a time.

    Raises: UserError for an output that is there, a full disk, a tokenizer's file that is damaged, weights that are NaN
      or do not fit into their dtype, and where transformers is installed and reads other ids out of the tokenizer.
    """
    files = folder.files(max_shard_bytes)
    tokenizer_files.check(opened)
    staging.check_output(output, sum(shape.nbytes for shape in folder.tensors))
    try:
        with staging.staged(output) as place:
            for name, shapes in files.items():
                say(f"{name}: {len(shapes)} tensors, {sum(shape.nbytes for shape in shapes):,} bytes")
                data = (piece for shape in shapes for piece in folder.pieces(shape))
                safetensors_files.write_file(place / name, shapes, data, "mlx" if folder.format == "mlx" else "pt")
            if len(files) > 1:
                safetensors_files.write_index(place / safetensors_files.INDEX_FILE, files)
            written = tokenizer_files.write_huggingface(opened, place, say)
            ids = written.ids.in_config()
            config = huggingface_config.render(opened.model, folder.family, dtype=folder.dtype.name, ids=ids)
            atomic.write_json(place / huggingface_config.CONFIG_FILE, config | dict(folder.keys))
            checked = tokenizer_check.compare(place, written.tokenizer, strict=written.ours, say=say)
            card = model_card.render(opened, folder.family.class_name, folder.format, tokenizer=checked)
            atomic.write_text(place / model_card.FILE, card)
    except OSError as error:
        raise staging.not_written(output, error) from error


def stored_dtype(source: WeightSource, tensor: Tensor) -> np.dtype:
    """float32 where parts of a tensor are stored in several."""
    found = {source.dtype(part.leaf) for part in tensor.parts}
    return found.pop() if len(found) == 1 else np.dtype(np.float32)


def dense_pieces(source: WeightSource, tensor: Tensor, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The tensor's values in the order of the file."""
    for values in _parts(source, tensor):
        cast = values.astype(dtype, copy=False)
        check_finite(cast, f"{tensor.name}, as {dtype.name},")
        yield cast


def _parts(source: WeightSource, tensor: Tensor) -> Iterator[np.ndarray]:
    if tensor.inputs_first and len(tensor.parts) > 1:  # side by side
        yield np.concatenate([_whole(source, tensor, part) for part in tensor.parts], axis=1)
        return
    for part in tensor.parts:
        if tensor.turned(part):
            yield _whole(source, tensor, part)
            continue
        layer, shape = _layer(source, part)
        for index in blocks(shape, source.dtype(part.leaf).itemsize):
            values = source.read(part.leaf, (*layer, *index))
            yield values.reshape(values.shape[len(layer) :])


def _whole(source: WeightSource, tensor: Tensor, part: Part) -> np.ndarray:
    layer, shape = _layer(source, part)
    values = source.read(part.leaf, (*layer, *(slice(0, size) for size in shape))).reshape(shape)
    return np.ascontiguousarray(values.T if tensor.turned(part) else values)


def _layer(source: WeightSource, part: Part) -> tuple[tuple[slice, ...], tuple[int, ...]]:
    """The index of a part's layer in its leaf, and the shape of what is there."""
    layer = () if part.layer is None else (slice(part.layer, part.layer + 1),)
    return layer, source.shapes()[part.leaf][len(layer) :]
