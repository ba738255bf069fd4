"""A quantised checkpoint of ours as compressed-tensors' `pack-quantized` folder, for transformers and vLLM.

compressed-tensors 0.20: compressors/pack_quantized/, quantization/quant_config.py. A linear layer X of [O, I] in b bits
is X.weight_packed int32 [O, I b / 32] (integer + 2^(b-1), lowest bits first), X.weight_scale [O, groups] and
X.weight_shape int64 [2]; w = integer * scale. Embedding and head are dense: the format's readers quantise linear layers
alone, and vLLM none of these two.
"""

import re
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from phijax.errors import UserError
from phijax.interchange import small_matrices
from phijax.interchange.huggingface.families.family import Family
from phijax.interchange.huggingface.folder import Folder, dense_pieces, stored_dtype
from phijax.interchange.huggingface.safetensors import Shape
from phijax.interchange.opened import Opened
from phijax.interchange.tensors import Tensor, tensors
from phijax.quantization import packing
from phijax.quantization.policy import Scheme

FORMAT = "compressed_tensors"
DENSE = ("embedding", "head")
PACKED, SCALE, SHAPE = "weight_packed", "weight_scale", "weight_shape"


def folder(opened: Opened, family: Family, dtype: np.dtype | None) -> Folder:
    """Integers and scales are those of the checkpoint, bit for bit.

    Args: dtype: of what is dense. None: of embedding and head `compute_dtype`, of the others as stored.
    Raises: UserError for a checkpoint that is not quantised, and for what the format cannot hold.
    """
    planned, compute = _planned(opened, family), compute_dtype(opened, dtype)
    of_shape = {s: (tensor, scheme) for tensor, scheme in planned for s in _shapes(opened, tensor, scheme, dtype)}

    def pieces(shape: Shape) -> Iterator[np.ndarray]:
        tensor, scheme = of_shape[shape]
        kind = shape.name.rpartition(".")[2]
        if scheme is None:
            yield from dense_pieces(opened.weights, tensor, shape.dtype)
        elif kind == SHAPE:
            yield np.asarray(tensor.shape, np.int64)
        elif kind == SCALE:
            yield from (small_matrices.scales(opened.weights, part) for part in tensor.parts)
        else:
            for part in tensor.parts:
                yield from (
                    packing.packed(values, scheme.bits) for values in small_matrices.integers(opened.weights, part)
                )

    keys = {"quantization_config": quantization_config(planned)}
    return Folder(FORMAT, family, list(of_shape), pieces, compute, keys, _notes(opened, compute))


def _shapes(opened: Opened, tensor: Tensor, scheme: Scheme | None, dtype: np.dtype | None) -> list[Shape]:
    if scheme is None:
        quantised_elsewhere = any(part.leaf in opened.weights.schemes for part in tensor.parts)
        as_stored = compute_dtype(opened, None) if quantised_elsewhere else stored_dtype(opened.weights, tensor)
        return [Shape(tensor.name, tensor.shape, dtype or as_stored)]
    rows, inputs = tensor.shape
    module, groups = _module(tensor), inputs // scheme.group if scheme.group else 1
    return [
        Shape(f"{module}.{PACKED}", (rows, inputs * scheme.bits // 32), np.dtype(np.int32)),
        Shape(f"{module}.{SCALE}", (rows, groups), np.dtype(np.float16)),
        Shape(f"{module}.{SHAPE}", (2,), np.dtype(np.int64)),
    ]


def _notes(opened: Opened, compute: np.dtype) -> list[str]:
    lines = []
    if rounded := [leaf for leaf in DENSE if leaf in opened.weights.schemes]:
        lines.append(f"{' and '.join(rounded)}: dense in {compute.name}, since readers quantise linear layers alone")
    if compute == jnp.bfloat16:
        lines.append("readers who compute in bfloat16, as config.json says, round the scales by 1 part in 512 at most")
    return lines


def compute_dtype(opened: Opened, dtype: np.dtype | None) -> np.dtype:
    """What config.json says that the model computes in: `dtype`, else that of the norms where it has 16 bits."""
    stored = opened.weights.dtype("final_norm/scale")
    return dtype or (stored if stored.itemsize == 2 else np.dtype(jnp.bfloat16))


def quantization_config(planned: list[tuple[Tensor, Scheme | None]]) -> dict[str, Any]:
    """config.json's key: a group for each scheme, its targets the names of linear layers, without numbers."""
    names: dict[Scheme | None, list[str]] = {}
    for tensor, scheme in planned:
        if tensor.matrix and tensor.parts[0].leaf != "embedding":
            name = _module(tensor).rpartition(".")[2]
            names.setdefault(scheme, [])
            names[scheme] += [name] * (name not in names[scheme])
    dense = names.pop(None, []) + ["lm_head"]  # of a tied head the module is there, without a tensor
    groups = {
        f"group_{number}": {
            "targets": ["Linear"] if len(names) == 1 else [_matching(name) for name in found],
            "weights": _weights(scheme),
            "input_activations": None,
            "output_activations": None,
        }
        for number, (scheme, found) in enumerate(names.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [name if name == "lm_head" else _matching(name) for name in dict.fromkeys(dense)],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _weights(scheme: Scheme) -> dict[str, Any]:
    how = {"strategy": "group", "group_size": scheme.group} if scheme.group else {"strategy": "channel"}
    return {"num_bits": scheme.bits, "type": "int", "symmetric": True, "dynamic": False, **how}


def _matching(name: str) -> str:
    return rf"re:.*\.{re.escape(name)}$"


def _planned(opened: Opened, family: Family) -> list[tuple[Tensor, Scheme | None]]:
    """Each tensor and its scheme; None: dense. Raises: UserError."""
    schemes = small_matrices.require_quantized(opened, FORMAT)
    found = []
    for tensor in tensors(opened.model, family.rows):
        scheme = None
        if tensor.parts[0].leaf not in DENSE:
            scheme = small_matrices.scheme_of(schemes, tensor)
        if scheme and tensor.inputs_first:
            raise UserError(
                f"{opened.path}: {family.class_name} has no linear layer for {tensor.name}, and this format's readers "
                "quantise linear layers alone. Take --format=gguf, or hf."
            )
        if scheme and tensor.shape[1] * scheme.bits % 32:
            raise UserError(
                f"{tensor.name} has {tensor.shape[1]} inputs of {scheme.bits} bits, which do not fill words of 32 bits."
            )
        found.append((tensor, scheme))
    if all(scheme is None for _, scheme in found):
        raise UserError(
            f"{opened.path}: only embedding and head are quantised, which stay dense in this format. Take --format=hf."
        )
    return found


def _module(tensor: Tensor) -> str:
    return tensor.name.removesuffix(".weight")
