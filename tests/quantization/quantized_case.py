"""A tiny model whose matrices groups of 32 divide, but for o, and its random weights."""

import jax
import numpy as np
from quick_compilation import QUICK

from phijax.model import params
from phijax.model.config import ModelConfig

MODEL = ModelConfig(
    vocab_size=700,  # padded to 1024
    model_dim=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=12,
    ffn_dim=96,
    max_position=256,
)


def random_params(c: ModelConfig, seed: int = 0) -> params.Params:
    """As init, but the norms' factors are not all one."""
    rng = np.random.default_rng(seed)
    flat = params.flat(jax.jit(lambda: params.init(c, seed), compiler_options=QUICK)())
    for path, value in flat.items():
        if path.endswith("scale"):
            flat[path] = value + 0.2 * rng.standard_normal(value.shape, np.float32)
    return params.nested(flat)
