"""A quantised checkpoint of ours as a folder for MLX (mlx-lm, mlx-swift): Macs, iPhones and iPads.

mlx-lm 0.32: utils.load_model; mlx 0.32: affine quantisation. A matrix X of [O, I] in b bits is X.weight uint32
[O, I b / 32] (n, lowest bits first), X.scales and X.biases [O, I / G] with G 32, 64 or 128; w = n * scale + bias. Ours
are symmetric, so with n = integer + 2^(b-1) and bias = -2^(b-1) * scale they are the same numbers, and in float16 no
scale or bias is rounded.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from phijax.errors import UserError
from phijax.interchange import small_matrices
from phijax.interchange.huggingface.families.family import Family
from phijax.interchange.huggingface.folder import Folder, dense_pieces
from phijax.interchange.huggingface.safetensors import Shape
from phijax.interchange.opened import Opened
from phijax.interchange.tensors import Tensor, tensors
from phijax.interchange.weight_source import check_finite
from phijax.quantization import packing
from phijax.quantization.policy import Scheme

FORMAT = "mlx"
GROUPS = (128, 64, 32)  # the format's


def folder(opened: Opened, family: Family, dtype: np.dtype | None) -> Folder:
    """Integers are those of the checkpoint; its scales too, in float16 and float32.

    Args: dtype: of scales, biases and what is dense: MLX computes in the widest that it meets. None: float16.
    Raises: UserError for a checkpoint that is not quantised, and for what the format cannot hold.
    """
    dtype, planned = dtype or np.dtype(np.float16), _planned(opened, family)
    of_shape = {shape: (tensor, scheme) for tensor, scheme in planned for shape in _shapes(tensor, scheme, dtype)}

    def pieces(shape: Shape) -> Iterator[np.ndarray]:
        tensor, scheme = of_shape[shape]
        if scheme is None:
            return dense_pieces(opened.weights, tensor, shape.dtype)
        if shape.name.endswith(".weight"):
            return _words(opened, tensor, scheme)
        return _of_groups(opened, tensor, scheme, shape)

    # The second key is for the hub.
    keys = dict.fromkeys(("quantization", "quantization_config"), quantization_of(planned))
    return Folder(FORMAT, family, list(of_shape), pieces, dtype, keys, _notes(opened, dtype))


def _shapes(tensor: Tensor, scheme: Scheme | None, dtype: np.dtype) -> list[Shape]:
    if scheme is None:
        return [Shape(tensor.name, tensor.shape, dtype)]
    rows, inputs = tensor.shape
    module, groups = _module(tensor), (rows, inputs // scheme.group)
    return [
        Shape(f"{module}.weight", (rows, inputs * scheme.bits // 32), np.dtype(np.uint32)),
        Shape(f"{module}.scales", groups, dtype),
        Shape(f"{module}.biases", groups, dtype),
    ]


def _words(opened: Opened, tensor: Tensor, scheme: Scheme) -> Iterator[np.ndarray]:
    for part in tensor.parts:
        for values in small_matrices.integers(opened.weights, part):
            yield packing.packed(values, scheme.bits).view("<u4")


def _of_groups(opened: Opened, tensor: Tensor, scheme: Scheme, shape: Shape) -> Iterator[np.ndarray]:
    """Scales or biases."""
    # -2^(b-1) times a float16 is a float16 again, but where it is too large for one.
    factor = 1 if shape.name.endswith(".scales") else -(1 << (scheme.bits - 1))
    for part in tensor.parts:
        scales = small_matrices.scales(opened.weights, part).astype(np.float32) * factor
        with np.errstate(over="ignore"):
            values = small_matrices.spread(scales, tensor.shape[1], scheme.group).astype(shape.dtype)
        check_finite(values, f"{shape.name}, as {shape.dtype.name},")
        yield values


def _notes(opened: Opened, dtype: np.dtype) -> list[str]:
    rope, window = opened.model.long_rope, opened.model.sliding_window
    lines = [f"scales and what is dense: {dtype.name}, in which MLX computes"]
    if dtype == jnp.bfloat16:
        lines.append("warning: bfloat16 rounds the scales, by 1 part in 512 at most")
    if rope is not None:
        lines.append(
            f"warning: mlx-lm rotates by LongRoPE's long list always, also texts of up to {rope.original_max_position} "
            "tokens, for which the model has a short one: it gives other outputs there"
        )
    if window is not None and window < opened.model.max_position:
        lines.append(
            f"warning: mlx-lm has no sliding window: texts longer than {window} tokens give other outputs there"
        )
    return lines


def quantization_of(planned: list[tuple[Tensor, Scheme | None]]) -> dict[str, Any]:
    """config.json's key: the commonest group and bits, then each module that differs; false: dense."""
    matrices = [(_module(tensor), scheme) for tensor, scheme in planned if len(tensor.shape) == 2]
    ((most, _),) = Counter(scheme for _, scheme in matrices if scheme).most_common(1)
    other = {name: _entry(scheme) if scheme else False for name, scheme in matrices if scheme != most}
    return _entry(most) | other


def _entry(scheme: Scheme) -> dict[str, Any]:
    return {"group_size": scheme.group, "bits": scheme.bits}


def _planned(opened: Opened, family: Family) -> list[tuple[Tensor, Scheme | None]]:
    """Each tensor and its scheme, in groups that MLX has; None: dense. Raises: UserError."""
    schemes = small_matrices.require_quantized(opened, FORMAT)
    if reason := family.mlx_lacks(opened.model):
        raise UserError(f"{opened.path} cannot be written for MLX: {reason}. Take --format=gguf, or hf.")
    found = []
    for tensor in tensors(opened.model, family.mlx_rows or family.rows):
        scheme = small_matrices.scheme_of(schemes, tensor)
        found.append((tensor, _regrouped(scheme, tensor) if scheme else None))
    return found


def _regrouped(scheme: Scheme, tensor: Tensor) -> Scheme:
    """The same with a group of MLX: the largest that divides; a channel's scale is repeated."""
    inputs = tensor.shape[1]
    if group := next((g for g in GROUPS if (scheme.group or inputs) % g == 0), None):
        return Scheme(scheme.bits, group)
    raise UserError(f"{tensor.name} has {inputs} inputs: MLX has groups of 32, 64 and 128, and none divides them.")


def _module(tensor: Tensor) -> str:
    return tensor.name.removesuffix(".weight")
