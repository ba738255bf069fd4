"""A workdir as a run leaves it, of start weights: for tests of what opens and exports one."""

import dataclasses
import pathlib

import jax
from quick_compilation import QUICK

from phijax.checkpoint.config import CheckpointConfig
from phijax.checkpoint.lock import WriterLock
from phijax.checkpoint.run_state import RunCheckpoints
from phijax.model import params
from phijax.model.config import ModelConfig
from phijax.text.tokenizer import TextTokenizer


def save_run(folder: pathlib.Path, model: ModelConfig, tokenizer: TextTokenizer, **data) -> pathlib.Path:
    """One step of `model`, and the tokenizer. `data`: more of the data's identity."""
    tokenizer.save(folder / "tokenizer")
    described = {"seed": 0, "tokenizer": tokenizer.fingerprint, "phases": [], **data}
    identity = {"model": dataclasses.asdict(model), "data": described}
    config = dataclasses.replace(CheckpointConfig(), asynchronous=False)
    with WriterLock(folder, break_lock=False, log=print) as lock:
        checkpoints = RunCheckpoints(folder / "checkpoints", config, identity=identity, version=1, lock=lock, log=print)
        weights = jax.jit(lambda: params.init(model, 3), compiler_options=QUICK)()
        checkpoints.save(9, {"params": weights})
        checkpoints.wait()
    return folder
