"""Random weights for a model of any size."""

import jax
import numpy as np
from quick_compilation import QUICK

from phijax.model import params
from phijax.model.config import ModelConfig


def random_params(c: ModelConfig, seed: int = 0) -> params.Params:
    """As init, but norms' factors are not all one nor biases zero: one left out, or used twice, would not show."""
    rng = np.random.default_rng(seed)
    flat = params.flat(jax.jit(lambda: params.init(c, seed), compiler_options=QUICK)())
    for path, value in flat.items():
        if path.endswith(("scale", "bias")):
            flat[path] = value + 0.2 * rng.standard_normal(value.shape, np.float32)
    return params.nested(flat)
