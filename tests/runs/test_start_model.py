"""Which start weights a config takes: what must be the checkpoint's, what may differ where it was set by hand."""

import dataclasses
import re

import pytest
from etils import epath

from phijax import config as configs
from phijax.config import Config
from phijax.errors import UserError
from phijax.interchange.opened import Opened
from phijax.model.config import LongRope, ModelSection, resolve_model
from phijax.model.presets import PRESETS
from phijax.run import start

TINY = PRESETS["tiny"]
LISTS = LongRope((1.0,) * 16, tuple(1.0 + i for i in range(16)), 512)


def opened(model, kind="phijax") -> Opened:
    return Opened(path=epath.Path("/start"), kind=kind, model=model, weights=None, tokenizer=lambda: None)


def check(model, section: ModelSection) -> list[str]:
    return start.check_model(opened(model), section, resolve_model(section, {**PRESETS, "checkpoint": model}))


def refusal(model, section: ModelSection, kind="phijax") -> str:
    with pytest.raises(UserError) as error:
        there = opened(model, kind)
        start.check_model(there, section, resolve_model(section, {**PRESETS, "checkpoint": model}))
    return str(error.value)


def pasted(line: str, section: ModelSection) -> ModelSection:
    """The section after the flags of a line of the message."""
    tree = configs.to_dict(dataclasses.replace(Config(), model=section))
    for key, text in re.findall(r"--config\.(\S+?)=(\S+)", line):
        configs._override(tree, key, text)
    return configs.from_dict(tree).model


def test_a_rotation_that_only_the_preset_says_is_refused():
    """Eight fields set to the checkpoint's, and base 10,000 of the preset: another model, of which one line spoke."""
    sizes = {name: getattr(TINY, name) for name in ("vocab_size", "model_dim", "num_layers", "num_heads", "head_dim")}
    section = ModelSection(preset="tiny", **sizes)
    model = dataclasses.replace(TINY, rope_theta=100_000.0, max_position=2048)
    said = refusal(model, section)
    assert "model.rope_theta is 100000.0 there, 10000.0 here" in said
    assert "model.max_position is 2048 there, 4096 here" in said


DIFFERENT = {
    "context": dict(rope_theta=1e6, max_position=1 << 16, sliding_window=77),
    "architecture and context": dict(num_layers=2, tied_head=True, norm_eps=1e-6, rope_theta=5e5),
    "a window less": dict(sliding_window=None),
    "architecture": dict(ffn_dim=640),
}


@pytest.mark.parametrize("changes", DIFFERENT.values(), ids=DIFFERENT)
def test_each_line_of_flags_mends_it(changes):
    preset = "phi3_mini" if changes == {"sliding_window": None} else "tiny"  # the published one has a window
    section = ModelSection(preset=preset, head_dim=PRESETS[preset].head_dim)
    model = dataclasses.replace(PRESETS[preset], **changes)
    context = set(changes) & set(start.CHANGED_BY_CONTEXT)
    lines = [line for line in refusal(model, section).splitlines() if "--config" in line]
    assert len(lines) == (3 if context else 2)
    for line, differ in zip(lines, (0, 0, len(context)), strict=False):
        assert len(check(model, pasted(line, section))) == differ, line


def test_what_was_set_by_hand_against_the_checkpoint_is_taken_back_by_the_flags():
    model = dataclasses.replace(TINY, ffn_dim=640)
    for section in (ModelSection(preset="checkpoint", ffn_dim=72), ModelSection(preset="tiny", ffn_dim=72)):
        said = refusal(model, section)
        assert "model.ffn_dim is 640 there, 72 here" in said
        for line in (line for line in said.splitlines() if "--config" in line):
            assert check(model, pasted(line, section)) == [], line


def test_longer_context_by_hand_is_taken_and_said():
    section = ModelSection(preset="tiny", max_position=1 << 17, rope_theta=1e6)
    lines = check(TINY, section)
    assert "init_from: model.max_position was 4096, goes on with 131072" in lines and len(lines) == 2
    section = ModelSection(preset="checkpoint", rope_theta=1e6)
    assert check(TINY, section) == ["init_from: model.rope_theta was 10000.0, goes on with 1000000.0"]
    assert check(TINY, ModelSection(preset="checkpoint")) == []


def test_learned_positions_are_rows_of_a_leaf_and_not_context():
    model = dataclasses.replace(TINY, positions="learned", partial_rotary_factor=1.0, max_position=64)
    for section in (
        ModelSection(preset="checkpoint", max_position=128),
        ModelSection(preset="tiny", positions="learned", max_position=128),
        ModelSection(preset="tiny", positions="learned"),
    ):
        said, ours = refusal(model, section), 128 if section.max_position == 128 else TINY.max_position
        assert f"model.max_position is 64 there, {ours} here" in said and "Another context" not in said
        width = TINY.model_dim
        assert f"position_embedding has shape (64, {width}) there, ({ours}, {width}) here" in said
        flags = [line for line in said.splitlines() if "--config" in line]
        assert flags
        for line in flags:
            assert check(model, pasted(line, section)) == [], line


def test_long_rope_is_by_hand_where_its_source_is_named():
    four_k, long = PRESETS["phi3_mini"], ModelSection(preset="phi3_mini_128k", sliding_window=None, max_position=131072)
    said = refusal(four_k, long)
    assert "model.long_rope is None there" in said and "--config.model.long_rope_from=phi3_mini_128k" in said
    by_hand = dataclasses.replace(long, long_rope_from="phi3_mini_128k")
    assert any("long_rope was None" in line for line in check(four_k, by_hand))
    # And back: no flag drops the lists, so the checkpoint's model is what is left.
    said = refusal(dataclasses.replace(TINY, long_rope=LISTS), ModelSection(preset="tiny"), "huggingface")
    assert "--config.model.preset=checkpoint" in said
    assert "--config.model.long_rope_from=/start/config.json" in said and "Another context" not in said


def test_where_the_lists_came_from_is_no_difference():
    """phi3_medium_128k takes its lists from a checkpoint, which says nothing of that."""
    published = dataclasses.replace(
        PRESETS["phi3_medium_128k"], long_rope=LongRope((1.0,) * 64, (2.0,) * 64, 4096), requires_long_rope=False
    )
    assert (
        start.check_model(opened(published), ModelSection(), dataclasses.replace(published, requires_long_rope=True))
        == []
    )


def test_the_preset_checkpoint_needs_one():
    config = dataclasses.replace(Config(), model=ModelSection(preset="checkpoint"))
    with pytest.raises(UserError, match=r"(?s)init_from names none.*--config\.init_from=CHECKPOINT"):
        start.resolve(config)
    with pytest.raises(UserError, match=r"No checkpoint at /nowhere"):
        start.resolve(dataclasses.replace(config, init_from="/nowhere"))
    with pytest.raises(UserError, match=r"Nearest: 'checkpoint'"):
        start.resolve(dataclasses.replace(config, model=ModelSection(preset="chekpoint")))


def test_the_experiment_of_a_longer_context_sets_it_by_hand():
    config = configs.load("experiments/mini_128k.py")
    mini = resolve_model(configs.load("experiments/mini.py").model, PRESETS)
    lines = start.check_model(opened(mini), config.model, start.resolve(config))
    assert {line.split()[1].split(".")[1] for line in lines} == {"max_position", "long_rope"}
