"""Writes a checkpoint of any kind as one of ours with weights alone: --config.init_from and every command read it."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorstore
from etils import epath

from phijax.checkpoint import manifest
from phijax.checkpoint.array_spec import array_spec
from phijax.interchange import model_card, tokenizer_files
from phijax.interchange.native.source import PARAMS, PLOT_FILE, QUALITY_FILE, QUANTIZATION, TOKENIZER_FOLDER, described
from phijax.interchange.opened import Opened
from phijax.interchange.weight_source import Index, blocks, check_finite
from phijax.model import params
from phijax.model.config import fields_version, model_to_dict
from phijax.storage import staging

LARGEST_CHUNK = 64 << 20  # bytes: what a reader decodes at least


class Array(NamedTuple):
    """One array of the folder, and where its values come from."""

    path: str  # below params/
    shape: tuple[int, ...]  # the vocabulary padded
    dtype: np.dtype
    held: tuple[int, ...]  # what the source has of it; the rest is zeros
    read: Callable[[Index], np.ndarray]

    def entry(self) -> dict:
        """Of the manifest."""
        return {"path": PARAMS + self.path, "shape": list(self.shape), "dtype": self.dtype.name}


def arrays(opened: Opened, dtype: np.dtype | None) -> list[Array]:
    """Everything that `write` writes. Integers and scales of small weights are arrays of their own."""
    source, kept, found = opened.weights, opened.weights.schemes if dtype is None else {}, []
    for path, shape in params.shapes(opened.model).items():
        if path in kept:
            for leaf in described(path, shape, kept[path]):
                name, whole = leaf["path"].removeprefix(PARAMS), tuple(leaf["shape"])
                found.append(_array(name, whole, np.dtype(leaf["dtype"]), whole, source.read_stored))
        else:
            found.append(_array(path, shape, dtype or source.dtype(path), source.shapes()[path], source.read))
    return found


def nbytes(opened: Opened, dtype: np.dtype | None) -> int:
    """Bytes of the weights before compression, the vocabulary padded."""
    return sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays(opened, dtype))


def write(
    opened: Opened, output: epath.Path, *, dtype: np.dtype | None, say: Callable[[str], None] = lambda line: None
) -> None:
    """The whole folder, or nothing: arrays as Orbax writes them, a manifest with digests, tokenizer/ inside.

    A block of one leaf is in memory at a time.
    Args: dtype: None: as stored, small weights in their integers and scales; else these are what they stand for.
    Raises: UserError for an output that is there, a full disk, weights that are NaN or do not fit into `dtype`.
    """
    tokenizer_files.check(opened)
    staging.check_output(output, nbytes(opened, dtype))
    with staging.staged(output) as folder:
        fingerprint = tokenizer_files.write_native(opened, folder / TOKENIZER_FOLDER, say)
        leaves = []
        for array in arrays(opened, dtype):
            say(f"{array.path}: {array.dtype.name} {array.shape}")
            _write_array(folder, array)
            leaves.append(array.entry())
        extra = _quantization(opened, folder) if dtype is None else {}
        write_manifest(folder, opened, leaves, fingerprint, extra)


def write_manifest(
    folder: epath.Path, opened: Opened, leaves: list[dict], fingerprint: str | None, extra: dict
) -> None:
    """What the folder is, with what `opened` says of itself.

    Args: fingerprint: of the tokenizer in the folder, if one is known. extra: more of the manifest's.
    """
    facts = model_card.kept(opened)
    step, before, model = facts.pop("step", 0), facts.pop("identity", {}), model_to_dict(opened.model)
    if fingerprint is not None:  # the manifest's digests are of the weights alone
        facts[TOKENIZER_FOLDER] = fingerprint
    manifest.write(
        folder,
        step=step,
        leaves=leaves,
        identity={**before, "model": model},
        version=fields_version(model),
        extra={"weights_only": facts, **extra},
    )


def _array(path, shape, dtype, held, read) -> Array:
    return Array(path, shape, dtype, held, lambda index: read(path, index))


def _quantization(opened: Opened, folder: epath.Path) -> dict:
    """What a quantised checkpoint's manifest says of it; what lies beside its weights is copied."""
    if opened.facts.quantization is None:
        return {}
    for name in (QUALITY_FILE, PLOT_FILE):
        if (opened.path / name).exists():
            (folder / name).write_bytes((opened.path / name).read_bytes())
    return {QUANTIZATION: opened.facts.quantization}


def _write_array(folder: epath.Path, array: Array) -> None:
    shape, dtype = array.shape, array.dtype
    rows = min(shape[-2], max(1, LARGEST_CHUNK // (shape[-1] * dtype.itemsize))) if len(shape) > 1 else 1
    spec = array_spec(folder / manifest.STATE_FOLDER, PARAMS + array.path)
    spec["metadata"] = {
        "shape": shape,
        "chunks": {1: shape, 2: (rows, shape[-1]), 3: (1, rows, shape[-1])}.get(len(shape), shape),
        "dtype": "bfloat16" if dtype.name == "bfloat16" else dtype.str,
        "compressor": {"id": "zstd", "level": 1},
        "dimension_separator": ".",
        "fill_value": 0,  # of the rows that pad the vocabulary
    }
    # No cache: what is written is not read again.
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 0}})
    stored = tensorstore.open(spec, context=context, create=True, delete_existing=True).result()
    for index in blocks(array.held, dtype.itemsize, LARGEST_CHUNK):
        values = array.read(index).astype(dtype, copy=False)
        if dtype.kind not in "iu":
            check_finite(values, f"{array.path}, as {dtype.name},")
        stored[index].write(values).result()
