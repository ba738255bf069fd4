"""The methods of quantising a checkpoint: what each makes of its weights before they are rounded, and how it rounds."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from phijax.interchange.native.folded import FoldedSource
from phijax.interchange.opened import Opened
from phijax.quantization import awq, gptq
from phijax.quantization.calibrate import Hessians
from phijax.quantization.policy import Scheme
from phijax.quantization.rounding import Quantize


def prepare(
    opened: Opened,
    assigned: Mapping[str, Scheme],
    method: str,
    tokens: np.ndarray | None = None,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Opened, Callable[[str, int], Quantize | None]]:
    """What `quantized_export.write` takes: the checkpoint, by AWQ with its weights scaled, and `rounding`.

    Args:
      method: rtn, awq or gptq.
      tokens: calibration rows (B, T) int32, for all methods but rtn.
      on_layer: told how many layers AWQ has scaled, and of how many.
    """
    if method == "awq":
        choice = awq.choose(opened.model, opened.weights.read, assigned, tokens, on_layer)
        folded = FoldedSource(opened.weights, opened.model, choice.folds)
        return dataclasses.replace(opened, weights=folded), choice.rounding
    if method == "gptq":
        return opened, gptq.Roundings(Hessians(opened.model, opened.weights.read, tokens))
    return opened, lambda path, layer: None
