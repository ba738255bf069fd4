"""Settings of sampling: generation_config.json <-> a GGUF file's keys."""

import pytest
from gguf_case import PHI3, opened

from phijax.interchange.facts import Facts
from phijax.interchange.gguf.open import open_gguf
from phijax.interchange.gguf.sampling import keys_of, settings_of
from phijax.interchange.gguf.write import write_gguf

SETTINGS = {"do_sample": True, "temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.1}


def test_settings_go_through_a_file(tmp_path):
    """float32 of 0.7 comes back as 0.7; ids and what the format has no key for stay behind."""
    generation = SETTINGS | {"eos_token_id": [1, 2], "length_penalty": 2.0}
    file = write_gguf(opened(PHI3, facts=Facts(generation=generation)), tmp_path / "model.gguf", kind="F32")
    assert open_gguf(file).facts.generation == SETTINGS
    plain = write_gguf(opened(PHI3), tmp_path / "plain.gguf", kind="F32")
    assert open_gguf(plain).facts.generation is None


@pytest.mark.parametrize("generation", [{}, {"temperature": 0.7}, SETTINGS | {"do_sample": False}], ids=str)
def test_where_no_token_is_drawn_no_temperature_is_written(generation):
    assert keys_of(generation) == {}


@pytest.mark.parametrize("value", ["0.7", float("nan"), float("inf"), -1.0, True, [1], 10**400], ids=str)
def test_what_is_no_number_of_use_is_passed_over(value):
    assert settings_of({"general.sampling.temp": value}) == {}
    assert keys_of({"do_sample": True, "temperature": value}) == {}


def test_a_temperature_of_zero_takes_the_likeliest():
    assert settings_of({"general.sampling.temp": 0.0, "general.sampling.top_k": 3}) == {"do_sample": False, "top_k": 3}
