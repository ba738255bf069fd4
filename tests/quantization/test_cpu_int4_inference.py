"""Generation from quantised weights by the CPU kernel: near to float activations, the same bits in any batch."""

import dataclasses

import jax
import numpy as np
import pytest
from references.quantized import MODEL, one_device, quantized_params
from references.weights import random_params

from phijax.inference import placement, programs
from phijax.inference.generator import Generator
from phijax.inference.prefix_cache import PrefixCache
from phijax.inference.sampling import Sampling
from phijax.model import params
from phijax.model.backend import CHOICES
from phijax.model.kernels import cpu_int4_library
from phijax.model.kernels.cpu_int4 import Tiled
from phijax.model.quantized import Quantized
from phijax.quantization.policy import assign, parse
from phijax.quantization.report import log_softmax

PLAIN = dataclasses.replace(CHOICES["cpu"], int8_activations=False)
TIED = dataclasses.replace(MODEL, tied_head=True, sliding_window=24)
needs_compiler = pytest.mark.skipif(cpu_int4_library.loaded() is None, reason="no C++ compiler here")


def stored(c=MODEL, scheme: str = "int4_g32,o=int8"):
    return params.nested(quantized_params(params.flat(random_params(c)), assign(c, parse(scheme))))


def prompts(*lengths: int) -> list[list[int]]:
    return [np.random.default_rng(n).integers(0, MODEL.vocab_size, n).tolist() for n in lengths]


@needs_compiler
@pytest.mark.parametrize("c, scheme", [(MODEL, "int4_g32,o=int8"), (TIED, "int8"), (MODEL, "int4_g32_down8,o=int4")])
def test_close_to_float_activations_and_to_itself(c, scheme):
    weights = stored(c, scheme)
    kernel, plain = Generator(c, weights), Generator(c, weights, backend=PLAIN)
    assert all(isinstance(leaf, Tiled) for leaf in kernel._weights["blocks"][0]["mlp"].values())
    (prompt,) = prompts(90)
    ours, theirs = (log_softmax(g.logits(prompt)) for g in (kernel, plain))
    kl = (np.exp(theirs) * (theirs - ours)).sum(-1)
    assert 1e-7 < kl.mean() < 2e-3, kl.mean()  # a random model of 64 dimensions: groups of 32 are half a row
    # One token after another, through the kernel's own attention, as whole prompts through XLA's.
    tokens, steps = [], []
    for piece in kernel.stream([prompt], Sampling(temperature=0, max_tokens=12), with_logits=True):
        tokens.append(piece.token)
        steps.append(piece.logits)
    whole = kernel.logits([*prompt, *tokens])[len(prompt) - 1 : -1]
    np.testing.assert_allclose(np.stack(steps), whole, rtol=0, atol=0.05 * whole.std())
    assert np.mean(np.stack(steps).argmax(-1) == whole.argmax(-1)) > 0.9


@needs_compiler
def test_a_row_has_its_bits_in_any_batch():
    generator = Generator(MODEL, stored())
    batch = prompts(3, 40, 17, 90, 1)
    sampling = Sampling(temperature=0, max_tokens=6)
    together = generator.generate(batch, sampling)
    for prompt, expected in zip(batch, together, strict=True):
        assert generator.generate([prompt], sampling) == [expected]  # log-probabilities too, bit for bit


@needs_compiler
def test_over_a_cache_of_eight_bits():
    """Another cache, and hardly another model; in steps as in a prompt."""
    weights = stored(TIED)
    small, plain = Generator(TIED, weights, cache_dtype="int8"), Generator(TIED, weights)
    assert all(isinstance(leaf, Tiled) for leaf in small._weights["blocks"][0]["mlp"].values())
    (prompt,) = prompts(90)
    ours, theirs = (log_softmax(g.logits(prompt)) for g in (small, plain))
    kl = (np.exp(theirs) * (theirs - ours)).sum(-1)
    assert 1e-7 < kl.mean() < 1e-3, kl.mean()  # as much as the kernel's rounding of activations costs: 2e-4
    pieces = list(small.stream([prompt], Sampling(temperature=0, max_tokens=12), with_logits=True))
    steps = np.stack([piece.logits for piece in pieces])
    whole = small.logits([*prompt, *(piece.token for piece in pieces)])[len(prompt) - 1 : -1]
    # Not closer: roundings of activations and of the cache fall to either side.
    np.testing.assert_allclose(steps, whole, rtol=0, atol=0.05 * whole.std())


@needs_compiler
def test_a_row_has_its_bits_over_a_cache_of_eight_bits():
    generator = Generator(MODEL, stored(), cache_dtype="int8")
    batch, sampling = prompts(3, 40, 17, 90, 1), Sampling(temperature=0, max_tokens=6)
    for prompt, expected in zip(batch, generator.generate(batch, sampling), strict=True):
        assert generator.generate([prompt], sampling) == [expected]


@needs_compiler
def test_the_next_turn_of_a_conversation_has_its_bits():
    """Its first chunk is the last turn's."""
    generator, kept, sampling = Generator(MODEL, stored()), PrefixCache(), Sampling(temperature=0, max_tokens=6)
    (first,) = prompts(90)
    answer = generator.generate([first], sampling, kept=kept)[0].tokens
    (second,) = generator.generate([[*first, *answer, 5, 6, 7]], sampling, kept=kept)
    assert [second] == generator.generate([[*first, *answer, 5, 6, 7]], sampling)


@needs_compiler
def test_decoding_is_four_calls_a_layer():
    """Nothing of a layer is left to small programs, and no weight is widened."""
    generator = Generator(MODEL, stored())
    given = (np.zeros(2, np.int32), np.ones(2, np.int32), np.stack([generator._frequencies(2)] * 2), np.int32(1))
    cache = generator._empty_cache(1, 8)
    text = programs.step.lower(MODEL, generator._layout, 1.0, generator._weights, cache, *given).compile().as_text()
    for target, count in (("product", 2 * MODEL.num_layers + 1), ("gated", MODEL.num_layers), ("attend", 2)):
        assert text.count(f'custom_call_target="phijax_cpu_int4_{target}"') == count, target


def test_off_and_on_a_mesh_it_is_plain_xla(monkeypatch):
    monkeypatch.setenv(cpu_int4_library.VARIABLE, "off")
    generator = Generator(MODEL, stored())
    assert isinstance(generator._weights["blocks"][0]["mlp"]["gate"], Quantized)
    monkeypatch.delenv(cpu_int4_library.VARIABLE)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]).reshape(1, 1, 1, 2), ("data", "fsdp", "context", "tensor"))
    assert placement.matrix_format(CHOICES["cpu"], mesh) is None
    assert placement.matrix_format(CHOICES["tpu"], one_device()) is None
    assert placement.matrix_format(PLAIN, one_device()) is None
