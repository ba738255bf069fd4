"""The methods of quantising a checkpoint: what each makes of its weights before they are rounded."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from phijax.checkpoint.folded_source import FoldedSource
from phijax.checkpoint.opened import Opened
from phijax.quantization import awq
from phijax.quantization.calibrate import Hessians
from phijax.quantization.gptq import Factor, Factors
from phijax.quantization.policy import Scheme


def prepare(
    opened: Opened,
    assigned: Mapping[str, Scheme],
    method: str,
    tokens: np.ndarray | None = None,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Opened, Factor]:
    """What `quantized_export.write` takes: the checkpoint with its weights scaled, and GPTQ's factors.

    Args:
      method: rtn, awq or gptq.
      tokens: calibration rows (B, T) int32, for all methods but rtn.
      on_layer: told how many layers AWQ has scaled, and of how many.
    """
    if method == "awq":
        folds = awq.choose_folds(opened.model, opened.weights.read, assigned, tokens, on_layer)
        opened = dataclasses.replace(opened, weights=FoldedSource(opened.weights, folds))
    if method == "gptq":
        return opened, Factors(Hessians(opened.model, opened.weights.read, tokens))
    return opened, lambda path, layer: None
