"""A tiny model whose matrices groups of 32 divide, but for o, and its random weights."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import flagsaver

from phijax.checkpoint.config import CheckpointConfig
from phijax.checkpoint.lock import WriterLock
from phijax.checkpoint.run_state import RunCheckpoints
from phijax.model import params
from phijax.model.config import ModelConfig
from phijax.model.quantized import Quantized
from phijax.parallel.mesh import MeshConfig, make_mesh
from phijax.quantization import policy
from phijax.quantization.rounding import round_to_nearest
from phijax.text.train_tokenizer import train_tokenizer

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


def run(command, *arguments: str) -> int:
    """A command of phijax, in this process."""
    saved = flagsaver.save_flag_values(command.FLAGS)
    try:
        return command.main(command.FLAGS(["command", *arguments])[1:])
    finally:
        flagsaver.restore_flag_values(saved, command.FLAGS)


SCHEME = "int4_g32,o=int8"  # of MODEL's 48 inputs of o no group is a divisor


def save_run(folder: pathlib.Path, weights: params.Params, c: ModelConfig = MODEL) -> pathlib.Path:
    """A run's workdir with one step and a tokenizer."""
    text = (pathlib.Path(__file__).parents[2] / "README.md").read_text()
    train_tokenizer([text], c.vocab_size).save(folder / "tokenizer")
    with WriterLock(folder, break_lock=False, log=print) as lock:
        config = dataclasses.replace(CheckpointConfig(), asynchronous=False)
        identity = {"model": dataclasses.asdict(c)}
        checkpoints = RunCheckpoints(folder / "checkpoints", config, identity=identity, version=1, lock=lock, log=print)
        checkpoints.save(3, {"params": weights})
        checkpoints.wait()
    return folder


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def quantized_params(flat: dict, assigned: dict) -> dict:
    """Path -> Quantized or the array, matrix by matrix; what is to lie in a file."""
    out = dict(flat)
    for path, scheme in assigned.items():
        value = np.asarray(flat[path])
        stack = value if value.ndim == 3 else value[None]
        rounded = [round_to_nearest(matrix, scheme, policy.summed_axis(path)) for matrix in stack]
        values, scales = (np.stack([np.asarray(getattr(r, name)) for r in rounded]) for name in ("values", "scales"))
        if value.ndim == 2:
            values, scales = values[0], scales[0]
        kind = jnp.int4 if scheme.bits == 4 else jnp.int8
        out[path] = Quantized(jnp.asarray(values.astype(kind)), jnp.asarray(scales))
    return out
