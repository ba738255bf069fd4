"""A workdir as a run leaves it, of start weights, and what is asked of it: for tests of what opens and exports one."""

import dataclasses
import pathlib

import jax
from absl.testing import flagsaver
from quick_compilation import QUICK

from phijax import export
from phijax.checkpoint.config import CheckpointConfig
from phijax.checkpoint.lock import WriterLock
from phijax.checkpoint.run_state import RunCheckpoints
from phijax.inference.sampling import Sampling
from phijax.model import params
from phijax.model.config import ModelConfig
from phijax.text.tokenizer import TextTokenizer

TEXT = "The file object has a method that reads a line. "
MODEL = ModelConfig(
    vocab_size=320, model_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=48, max_position=256
)
PROMPTS = ["The file", " object", "", "a method that"]
CHAT = [{"role": "user", "content": "The file?"}, {"role": "assistant", "content": "a line"}]
CHAT += [{"role": "user", "content": "A method"}]
GREEDY = Sampling(max_tokens=8, temperature=0)


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


def exported(source: pathlib.Path, output: pathlib.Path, *arguments: str) -> pathlib.Path:
    """`phijax export`, in this process."""
    saved = flagsaver.save_flag_values(export.FLAGS)
    try:
        flags = ["export", f"--checkpoint={source}", f"--output={output}", *arguments]
        assert export.main(export.FLAGS(flags)[1:]) == 0
    finally:
        flagsaver.restore_flag_values(saved, export.FLAGS)
    return output
