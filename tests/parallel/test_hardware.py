"""Compiler profiles: which devices have which, and what is refused."""

import pytest

from phijax.errors import UserError
from phijax.parallel.hardware import (
    COMPILER_PROFILES,
    CompilerConfig,
    a_chip_with,
    compiler_options,
    fills_memory,
    generation,
)


@pytest.mark.parametrize(
    ("device_kind", "chip"),
    [
        ("TPU v5 lite", "v5e"),  # what v5e calls itself
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA H100 80GB HBM3", "gpu"),
        ("cpu", None),
        ("TPU v4", None),
    ],
)
def test_device_kinds_belong_to_generations(device_kind, chip):
    assert generation(device_kind) == chip
    assert chip is None or chip in COMPILER_PROFILES


def test_no_profile_is_no_options_anywhere():
    assert all(compiler_options(CompilerConfig(), chip) == () for chip in [*COMPILER_PROFILES, None, "v4"])


@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
def test_moments_on_the_host_let_tpus_fill_their_memory(chip):
    filled = dict(compiler_options(CompilerConfig(), chip, moments_on_host=True))
    assert set(filled.values()) == {"200"} and fills_memory(filled)
    assert dict(compiler_options(CompilerConfig("fill_memory"), chip)).items() >= filled.items()
    for profile in COMPILER_PROFILES[chip]:
        both = dict(compiler_options(CompilerConfig(profile), chip, moments_on_host=True))
        assert both == {**COMPILER_PROFILES[chip][profile], **filled}
        assert fills_memory(COMPILER_PROFILES[chip][profile]) == (profile == "fill_memory")
    assert compiler_options(CompilerConfig(), "gpu", moments_on_host=True) == ()
    assert compiler_options(CompilerConfig(), None, moments_on_host=True) == ()


def test_a_profile_gives_its_options():
    options = dict(compiler_options(CompilerConfig("sparse_core"), "v5p"))
    assert options == COMPILER_PROFILES["v5p"]["sparse_core"]
    assert options["xla_tpu_use_tc_device_shape_on_sc"] == "true"


@pytest.mark.parametrize("chip", ["v5e", "gpu", None])
def test_a_profile_of_another_chip_is_refused(chip):
    with pytest.raises(UserError, match=r"compiler\.profile='sparse_core' is not one of .*It is for v5p, v6e"):
        compiler_options(CompilerConfig("sparse_core"), chip)


def test_a_slip_is_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"Nearest: 'sparse_core'.*--config\.compiler\.profile=sparse_core"):
        compiler_options(CompilerConfig("sparsecore"), "v5p")


def test_a_description_away_from_the_chips_takes_a_chip_that_has_the_profile():
    assert a_chip_with(CompilerConfig("sparse_core")) == "v5p"
    assert a_chip_with(CompilerConfig()) is None and a_chip_with(CompilerConfig("nothing")) is None
