"""Writes a checkpoint of any kind as one of ours with weights alone: --config.init_from and every command read it."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import tensorstore
from etils import epath

from phijax.checkpoint import manifest, model_card, staging, tokenizer_files
from phijax.checkpoint.opened import Opened
from phijax.checkpoint.ours import PARAMS, TOKENIZER_FOLDER, array_spec
from phijax.checkpoint.weight_source import blocks, check_finite
from phijax.model import params

LARGEST_CHUNK = 64 << 20  # bytes: what a reader decodes at least


def nbytes(opened: Opened, dtype: np.dtype | None) -> int:
    """Bytes of the weights before compression, the vocabulary padded."""
    return sum(
        math.prod(shape) * (dtype or opened.weights.dtype(path)).itemsize
        for path, shape in params.shapes(opened.model).items()
    )


def write(
    opened: Opened, output: epath.Path, *, dtype: np.dtype | None, say: Callable[[str], None] = lambda line: None
) -> None:
    """The whole folder, or nothing: arrays as Orbax writes them, a manifest with digests, tokenizer/ inside.

    A block of one leaf is in memory at a time.
    Args: dtype: None: as stored.
    Raises: UserError for an output that is there, a full disk, weights that are NaN or do not fit into `dtype`.
    """
    staging.check_output(output, nbytes(opened, dtype))
    with staging.staged(output) as folder:
        leaves = []
        for path, shape in params.shapes(opened.model).items():
            kind = dtype or opened.weights.dtype(path)
            say(f"{path}: {kind.name} {shape}")
            _write_leaf(opened, folder, path, shape, kind)
            leaves.append({"path": PARAMS + path, "shape": list(shape), "dtype": kind.name})
        tokenizer_files.write_ours(opened, folder / TOKENIZER_FOLDER, say)
        facts = model_card.facts(opened)
        step, before = facts.pop("step", 0), facts.pop("identity", {})
        manifest.write(
            folder,
            step=step,
            leaves=leaves,
            identity={**before, "model": dataclasses.asdict(opened.model)},
            extra={"weights_only": facts},
        )


def _write_leaf(opened: Opened, folder: epath.Path, path: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    source, stored = opened.weights, opened.weights.shapes()[path]
    row = math.prod(shape[-1:]) * dtype.itemsize
    rows = min(shape[-2], max(1, LARGEST_CHUNK // row)) if len(shape) > 1 else 1
    chunk = {1: shape, 2: (rows, shape[-1]), 3: (1, rows, shape[-1])}[len(shape)] if len(shape) < 4 else shape
    spec = array_spec(folder / manifest.STATE_FOLDER, PARAMS + path)
    spec["metadata"] = {
        "shape": shape,
        "chunks": chunk,
        "dtype": "bfloat16" if dtype.name == "bfloat16" else dtype.str,
        "compressor": {"id": "zstd", "level": 1},
        "dimension_separator": ".",
        "fill_value": 0,  # of the rows that pad the vocabulary
    }
    # No cache: what is written is not read again.
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 0}})
    array = tensorstore.open(spec, context=context, create=True, delete_existing=True).result()
    for index in blocks(stored, dtype.itemsize, LARGEST_CHUNK):
        values = source.read(path, index).astype(dtype, copy=False)
        check_finite(values, f"{path}, as {dtype.name},")
        array[index].write(values).result()
