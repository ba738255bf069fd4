"""Other weights in a model that answers already: nothing is compiled, nothing is shared, what does not fit is named."""

import dataclasses
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.append(str(pathlib.Path(__file__).parent.parent / "training"))
from compilation_count import compilations
from references.quantized import MODEL, quantized_params
from small_training import SMALL, compiled, host_batch, mesh_of, on_mesh, recipe

from phijax.errors import UserError
from phijax.inference.generator import Generator
from phijax.inference.prefix_cache import PrefixCache
from phijax.inference.sampling import Sampling
from phijax.model import params as model_params
from phijax.model.kernels import cpu_int4_library
from phijax.model.low_rank import LowRank
from phijax.quantization.policy import assign, parse
from phijax.training.program import initial_state

SAMPLINGS = [Sampling(max_tokens=5, temperature=0), Sampling(max_tokens=7, temperature=1.2, top_k=20, seed=3)]
PROMPTS = [[5, 9, 77, 200, 3], list(range(40, 70))]


def random_weights(seed: int, c=SMALL) -> dict:
    """As large as a model's, and every number another, in NumPy."""
    rng = np.random.default_rng(seed)
    shapes = model_params.shapes(c).items()
    return model_params.nested({path: rng.standard_normal(shape, np.float32) * 0.3 for path, shape in shapes})


@pytest.fixture(scope="module")
def first() -> Generator:
    """It has answered once, by every program that the tests ask for."""
    generator = Generator(SMALL, random_weights(0))
    generator.generate(PROMPTS, SAMPLINGS)
    return generator


def test_no_program_is_compiled_for_other_weights_or_other_settings(first):
    """On weights of NumPy's and of jax's; what each generator answers is what one that was made with them does."""
    other, again = random_weights(1), first.generate(PROMPTS, SAMPLINGS)
    on_device = jax.device_put(random_weights(2))
    settings = [Sampling(max_tokens=6, temperature=0.7, top_p=0.9, min_p=0.01, repetition_penalty=1.1, seed=8)]
    settings += [Sampling(max_tokens=3, temperature=0, stop_ids=(7, 8, 9))]
    with compilations() as seen:
        second = first.with_params(other)
        answers = second.generate(PROMPTS, SAMPLINGS)
        third = first.with_params(on_device)
        different = third.generate(PROMPTS, settings)
    assert seen == []
    assert answers == Generator(SMALL, other).generate(PROMPTS, SAMPLINGS) != again
    assert different == Generator(SMALL, on_device).generate(PROMPTS, settings)
    assert first.generate(PROMPTS, SAMPLINGS) == again


def test_a_step_that_its_parameters_are_donated_to_changes_nothing(first):
    mesh, shape = mesh_of(1, 1, 1, 1), (1, 8, 16)
    program, state = compiled(recipe(), mesh, shape), initial_state(recipe(), mesh)
    taken, made = first.with_params(state.params), Generator(SMALL, state.params)
    before, given = taken.generate(PROMPTS, SAMPLINGS), state.params
    state, _ = program(state, on_mesh(host_batch(shape), mesh))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
    assert taken.generate(PROMPTS, SAMPLINGS) == made.generate(PROMPTS, SAMPLINGS) == before
    assert first.with_params(state.params).generate(PROMPTS, SAMPLINGS) != before
    with pytest.raises(UserError, match="was donated: its array is deleted"):
        first.with_params(given)


@pytest.mark.slow
def test_parameters_that_lie_on_a_mesh(first):
    state = initial_state(recipe(), mesh_of(1, 2, 1, 1))
    expected = first.with_params(jax.device_get(state.params)).generate(PROMPTS, SAMPLINGS)
    assert first.with_params(state.params).generate(PROMPTS, SAMPLINGS) == expected


def test_a_kept_cache_is_of_one_models_weights(first):
    kept, prompt = PrefixCache(), PROMPTS[1]  # a chunk of it would be taken over
    second = first.with_params(random_weights(1))
    first.generate([prompt], SAMPLINGS[0], kept=kept)
    assert second.generate([prompt], SAMPLINGS[0], kept=kept) == second.generate([prompt], SAMPLINGS[0])


@pytest.mark.slow
@pytest.mark.skipif(cpu_int4_library.loaded() is None, reason="no C++ compiler here")
def test_floats_are_rounded_as_the_models_weights_are():
    """To the kernel's form, by matrices whose groups it has; o by channel in eight bits."""
    floats, assigned = model_params.flat(random_weights(1, MODEL)), assign(MODEL, parse("int4_g32,o=int8"))
    stored = [
        model_params.nested(quantized_params(flat, assigned))
        for flat in (model_params.flat(random_weights(0, MODEL)), floats)
    ]
    first, expected = (Generator(MODEL, weights) for weights in stored)
    again = first.generate(PROMPTS, SAMPLINGS)
    first.with_params(model_params.nested(floats))  # compiles the rounding
    with compilations() as seen:
        second = first.with_params(model_params.nested(floats))
        answers = second.generate(PROMPTS, SAMPLINGS)
    assert seen == []
    assert answers == expected.generate(PROMPTS, SAMPLINGS) == first.with_params(stored[1]).generate(PROMPTS, SAMPLINGS)
    assert first.generate(PROMPTS, SAMPLINGS) == again != answers


def changed(change) -> dict:
    flat = model_params.flat(random_weights(0))
    change(flat)
    return model_params.nested(flat)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: [1, 2], "nested dict of arrays, as training holds them, not list"),
        (lambda: changed(lambda f: f.pop("blocks/mlp/gate")), r"blocks/mlp/gate is missing .* shape \(2, 64, 32\)"),
        (lambda: changed(lambda f: f.update(heed=f["head"])), "heed is no leaf of this model. Nearest: head"),
        (
            lambda: changed(lambda f: f.update({"blocks/mlp/up": f["blocks/mlp/up"][:, :60]})),
            r"blocks/mlp/up has shape \(2, 60, 32\) in the new parameters; the model's has \(2, 64, 32\)",
        ),
        (lambda: changed(lambda f: f.update(head=f["head"].astype(np.int32))), "head has dtype int32"),
        (lambda: random_weights(0, dataclasses.replace(SMALL, num_layers=3)), r"shape \(3, .* the model's has \(2, "),
        (
            lambda: model_params.nested(
                quantized_params(model_params.flat(random_weights(0)), {"head": parse("int8")["head"]})
            ),
            "head is quantised by .* it is not quantised",
        ),
    ],
)
def test_what_does_not_fit_is_named(first, wrong, message):
    with pytest.raises(UserError, match=message):
        first.with_params(wrong())


@pytest.mark.slow
def test_a_change_of_low_rank_is_merged(first):
    flat, rng = model_params.flat(random_weights(1)), np.random.default_rng(0)
    (layers, rows, columns), path = flat["blocks/mlp/up"].shape, "blocks/mlp/up"
    a, b = rng.standard_normal((layers, 3, columns), np.float32), rng.standard_normal((layers, rows, 3), np.float32)
    changed = first.with_params(model_params.nested(flat | {path: LowRank(flat[path], a, b, 0.5)}))
    expected = first.with_params(model_params.nested(flat | {path: flat[path] + 0.5 * b @ a}))
    for ours, theirs in zip(*(g.generate(PROMPTS, SAMPLINGS[0]) for g in (changed, expected)), strict=True):
        assert ours.tokens == theirs.tokens
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, rtol=0, atol=1e-4)  # sums in another order


@pytest.mark.slow
def test_narrow_floats_are_widened(first):
    narrow = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), random_weights(1))
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), narrow)
    assert first.with_params(narrow).generate(PROMPTS, SAMPLINGS) == first.with_params(wide).generate(
        PROMPTS, SAMPLINGS
    )
