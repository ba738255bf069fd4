"""experiments/mini_128k.py on a tiny model: from weights of a short context through its phases of growing length."""

import json

import numpy as np
import pytest
from run_case import ROOT, learned, metrics

SHRUNK = """
import pathlib
import runpy

LENGTHS = {32_768: 128, 131_072: 256}
SIZES = dict(vocab_size=300, num_layers=2, model_dim=32, num_heads=2, num_kv_heads=2, head_dim=16, ffn_dim=64)


def get_config():
    c = runpy.run_path("EXPERIMENTS/mini_128k.py")["get_config"]()
    for name, value in SIZES.items():
        c.model[name] = value
    c.model.max_position, c.model.long_rope_from = 1024, "ROPE"
    c.compiler.profile = "none"  # the real one's is for TPUs
    c.mesh = dict(fsdp=2, context=4)  # 8 devices; the sequence is cut, as there
    phases = c.data.phases
    for phase in phases:
        phase["steps"], phase["sequence_length"] = 4, LENGTHS[phase["sequence_length"]]
        phase["global_batch_size"] //= 8
        phase["mixture"] = [dict(path="SHARDS/a", weight=1)]
    c.optimizer.learning_rate, c.optimizer.warmup_steps = 1e-2, 1
    c.checkpoint.every_steps = c.evaluation.every_steps = 4
    c.evaluation.sets, c.evaluation.max_rows = [dict(name="b", path="SHARDS/b")], 8
    c.logging.every_steps, c.logging.tensorboard, c.logging.plot = 1, False, False
    return c
"""

SHORT = [f"--config.model.{name}={value}" for name, value in dict(
    num_layers=2, model_dim=32, num_heads=2, num_kv_heads=2, head_dim=16, ffn_dim=64, max_position=32
).items()]  # fmt: skip


@pytest.fixture
def experiment(runs, tmp_path):
    """A config file whose phases are those of the real one, and long factors that a row of 33 tokens needs."""
    rope = dict(type="longrope", short_factor=[1.0] * 8, long_factor=list(np.linspace(1, 8, 8)))
    numbers = dict(original_max_position_embeddings=32, max_position_embeddings=1024, rope_scaling=rope)
    (tmp_path / "rope.json").write_text(json.dumps(numbers))
    text = SHRUNK.replace("EXPERIMENTS", str(ROOT / "experiments")).replace("SHARDS", str(runs.shards))
    (tmp_path / "long.py").write_text(text.replace("ROPE", str(tmp_path / "rope.json")))
    return tmp_path / "long.py"


@pytest.mark.slow
def test_longer_context_goes_on_from_weights_of_a_shorter_one(runs, experiment, tmp_path):
    first = ["--config.data.phases[0].sequence_length=32", "--config.data.phases[0].steps=20",
             "--config.data.phases[1].steps=1", "--config.data.phases[1].sequence_length=32"]  # fmt: skip
    ended = runs.run(tmp_path / "short", *SHORT, *first)
    assert ended.code == 0, ended.output
    start = f"--config.init_from={tmp_path}/short/checkpoints/21"
    ended = runs.run(tmp_path / "long", start, devices=8, config=experiment)
    assert ended.code == 0, ended.output
    assert "init_from: model.long_rope was None" in ended.output and "model.max_position was 32" in ended.output
    lines = metrics(tmp_path / "long")
    assert len(lines) == 8
    # Phases: 8 rows of 128 tokens, then 2 of 256, as the real one's 64 of 32768 and 16 of 131072.
    assert [lines[step]["tokens"] for step in (3, 7)] == [4 * 8 * 128, 4 * 8 * 128 + 4 * 2 * 256]
    # It goes on, and does not begin anew.
    assert lines[0]["loss"] < metrics(tmp_path / "short")[0]["loss"] - 0.2
    # The mesh of one device has the same numbers.
    alone = ["--config.mesh.fsdp=1", "--config.mesh.context=1"]
    ended = runs.run(tmp_path / "alone", start, *alone, config=experiment)
    assert ended.code == 0, ended.output
    for ours, theirs in zip(learned(tmp_path / "long").values(), learned(tmp_path / "alone").values(), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
