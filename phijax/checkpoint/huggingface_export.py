"""Writes a checkpoint of any kind as a Hugging Face folder, tensor by tensor: never more than one in memory."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from phijax.checkpoint import durable, huggingface_config, model_card, safetensors_files, staging, tokenizer_files
from phijax.checkpoint.names import Layout, Part, Tensor, tensors
from phijax.checkpoint.opened import Opened
from phijax.checkpoint.safetensors_files import Shape
from phijax.checkpoint.weight_source import WeightSource, blocks, check_finite
from phijax.errors import UserError

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
    named = huggingface_config.ARCHITECTURES.get(opened.extra.get("architecture", ""))
    candidates = [named] if named else []
    for layout in (*candidates, "phi3", "llama", "mistral"):
        if huggingface_config.unwritable(opened.model, layout) is None:
            return layout
    return "phi3"


def plan(opened: Opened, layout: Layout, dtype: np.dtype | None, max_shard_bytes: int) -> dict[str, list[Shape]]:
    """File -> tensors. `dtype` None: as stored, float32 where parts of a tensor are stored in several."""
    shapes = [Shape(t.name, t.shape, dtype or stored_dtype(opened.weights, t)) for t in tensors(opened.model, layout)]
    return safetensors_files.plan_files(shapes, max_shard_bytes)


def write(
    opened: Opened,
    output: epath.Path,
    *,
    layout: Layout,
    dtype: np.dtype | None,
    max_shard_bytes: int,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """The whole folder, or nothing.

    Raises: UserError for an output that is there, a full disk, weights that are NaN or do not fit into `dtype`.
    """
    files = plan(opened, layout, dtype, max_shard_bytes)
    by_name = {tensor.name: tensor for tensor in tensors(opened.model, layout)}
    most = max((s for shapes in files.values() for s in shapes), key=lambda s: s.nbytes).dtype
    write_folder(
        opened,
        output,
        files,
        lambda shape: dense_pieces(opened.weights, by_name[shape.name], shape.dtype),
        layout=layout,
        dtype=most,
        say=say,
    )


def notes(opened: Opened, dtype: np.dtype | None) -> list[str]:
    """What the folder does not hold as the checkpoint does, in lines."""
    return []


def write_folder(
    opened: Opened,
    output: epath.Path,
    files: Mapping[str, Sequence[Shape]],
    pieces: Callable[[Shape], Iterable[np.ndarray]],
    *,
    layout: Layout,
    dtype: np.dtype,
    format: str = "hf",
    keys: Mapping[str, Any] = MappingProxyType({}),
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Weights, tokenizer, config.json, model card: the whole folder, or nothing.

    Args:
      files: file -> its tensors, and `pieces` gives the values of one of them.
      dtype: what config.json says that the model computes in.
      format: the command's name of it; decides the model card and whose files they are.
      keys: more of config.json.
    """
    staging.check_output(output, sum(shape.nbytes for shapes in files.values() for shape in shapes))
    try:
        with staging.staged(output) as folder:
            for name, shapes in files.items():
                say(f"{name}: {len(shapes)} tensors, {sum(shape.nbytes for shape in shapes):,} bytes")
                data = (piece for shape in shapes for piece in pieces(shape))
                safetensors_files.write_file(folder / name, shapes, data, "mlx" if format == "mlx" else "pt")
            if len(files) > 1:
                safetensors_files.write_index(folder / safetensors_files.INDEX_FILE, files)
            ids = tokenizer_files.write_huggingface(opened, folder, say).in_config()
            config = huggingface_config.render(opened.model, layout, dtype=dtype.name, ids=ids) | dict(keys)
            durable.write_json(folder / huggingface_config.CONFIG_FILE, config)
            durable.write_text(folder / model_card.FILE, model_card.render(opened, layout, format))
    except OSError as error:
        raise UserError(f"{output} could not be written: {error.strerror or error}. Nothing is left of it.") from error


def stored_dtype(source: WeightSource, tensor: Tensor) -> np.dtype:
    """float32 where parts of a tensor are stored in several."""
    found = {source.dtype(part.leaf) for part in tensor.parts}
    return found.pop() if len(found) == 1 else np.dtype(np.float32)


def dense_pieces(source: WeightSource, tensor: Tensor, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The tensor's values in the order of the file."""
    for part in tensor.parts:
        for values in _part(source, part):
            cast = values.astype(dtype, copy=False)
            check_finite(cast, f"{tensor.name}, as {dtype.name},")
            yield cast


def _part(source: WeightSource, part: Part) -> Iterator[np.ndarray]:
    shape = source.shapes()[part.leaf]
    layer = () if part.layer is None else (slice(part.layer, part.layer + 1),)
    shape = shape[len(layer) :]
    if part.transposed:
        whole = source.read(part.leaf, (*layer, *(slice(0, size) for size in shape)))
        yield np.ascontiguousarray(whole.reshape(shape).T)
        return
    for index in blocks(shape, source.dtype(part.leaf).itemsize):
        values = source.read(part.leaf, (*layer, *index))
        yield values.reshape(values.shape[len(layer) :])
