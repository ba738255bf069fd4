"""Small models for bits of rows: none of their sizes is a power of two or a multiple of a vector."""

import dataclasses
import functools

import numpy as np

from phijax.model import params as model_params
from phijax.model.config import ModelConfig

GROUPED = ModelConfig(
    vocab_size=1000,
    model_dim=72,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=20,
    ffn_dim=88,  # no power of two, nor a multiple of a vector, anywhere
    max_position=600,
)
ONE_HEAD = dataclasses.replace(
    GROUPED, model_dim=40, num_heads=3, num_kv_heads=1, head_dim=12, tied_head=True, sliding_window=9
)
GPT2 = dataclasses.replace(
    GROUPED,
    num_kv_heads=4,
    ffn_dim=136,
    tied_head=True,
    positions="learned",
    norm="layer",
    bias=True,
    activation="gelu_tanh",
    gated=False,
)


@functools.lru_cache(maxsize=4)
def weights(c: ModelConfig):
    rng = np.random.default_rng(0)
    flat = {}
    for path, shape in model_params.shapes(c).items():
        flat[path] = rng.standard_normal(shape, np.float32) * (0.2 if path.endswith("scale") else shape[-1] ** -0.5)
        flat[path] += path.endswith("scale")
    return model_params.nested(flat)
