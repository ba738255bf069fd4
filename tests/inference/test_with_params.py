"""Other weights in a model that answers already: nothing is compiled, nothing is shared, what does not fit is named."""

import dataclasses
import gc
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.append(str(pathlib.Path(__file__).parent.parent / "training"))
from compilation_count import compilations
from references.quantized import MODEL, one_device, quantized_params
from small_training import SMALL, compiled, host_batch, mesh_of, on_mesh, recipe

from phijax.errors import UserError
from phijax.inference import placement
from phijax.inference.generator import Generator
from phijax.inference.prefix_cache import PrefixCache
from phijax.inference.sampling import Sampling
from phijax.model import params as model_params
from phijax.model.backend import CHOICES
from phijax.model.kernels import cpu_int4_library
from phijax.model.kernels.cpu_int4 import Tiled
from phijax.model.low_rank import LowRank, factor_shapes
from phijax.model.quantized import Quantized
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


@pytest.mark.slow
@pytest.mark.skipif(cpu_int4_library.loaded() is None, reason="no C++ compiler here")
def test_what_is_in_the_kernels_form_is_copied_too():
    floats, assigned = model_params.flat(random_weights(1, MODEL)), assign(MODEL, parse("int4_g32,o=int8"))
    stored = model_params.nested(quantized_params(floats, assigned))
    first, form = Generator(MODEL, stored), placement.matrix_format(CHOICES["cpu"], one_device())
    assert form is not None
    tiled = model_params.flat(stored)
    head = form(tiled["head"])
    assert isinstance(head, Tiled)
    params = model_params.nested(tiled | {"head": head})
    second, third = first.with_params(params), Generator(MODEL, params)
    expected = first.generate(PROMPTS, SAMPLINGS)
    head.data.delete()  # as a step does that it is donated to
    assert second.generate(PROMPTS, SAMPLINGS) == third.generate(PROMPTS, SAMPLINGS) == expected
    owned = form(tiled["head"])
    fourth = Generator(MODEL, model_params.nested(tiled | {"head": owned}), owned=True)
    assert fourth._weights["head"] is owned


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


UP = "blocks/mlp/up"


def low_rank(flat: dict, path: str, **parts) -> LowRank:
    """A change of this leaf, some of its parts others."""
    rng, shapes = np.random.default_rng(0), factor_shapes(flat[path].shape, 3)
    factors = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    return LowRank(**{"base": flat[path], **factors, "scale": 0.5} | parts)


def test_a_change_of_low_rank_is_merged(first):
    """At construction as later; what becomes of its parts changes nothing."""
    flat = model_params.flat(random_weights(1))
    changes = {path: low_rank(flat, path) for path in (UP, "head")}
    merged = flat | {path: change.base + 0.5 * change.b @ change.a for path, change in changes.items()}
    expected = first.with_params(model_params.nested(merged)).generate(PROMPTS, SAMPLINGS[0])
    params = jax.device_put(model_params.nested(flat | changes))
    generators = first.with_params(params), Generator(SMALL, params)
    for leaf in jax.tree.leaves(params):
        leaf.delete()
    for generator in generators:
        for ours, theirs in zip(generator.generate(PROMPTS, SAMPLINGS[0]), expected, strict=True):
            assert ours.tokens == theirs.tokens
            np.testing.assert_allclose(ours.logprobs, theirs.logprobs, rtol=0, atol=1e-4)  # sums in another order


def deleted(array: np.ndarray) -> jax.Array:
    array = jnp.asarray(array)
    array.delete()
    return array


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (lambda f: low_rank(f, UP, a=deleted(np.zeros((2, 3, 32)))), f"{UP} was donated"),
        (lambda f: low_rank(f, UP, a=np.zeros((2, 3, 31), np.float32)), rf"{UP}/a has shape \(2, 3, 31\)"),
        (lambda f: low_rank(f, UP, b=np.zeros((2, 64, 4), np.float32)), rf"{UP}/b has shape .* \(2, 64, 3\)"),
        (lambda f: low_rank(f, UP, a=np.zeros(32, np.float32), b=np.zeros(64, np.float32)), rf"{UP}/a has shape"),
        (lambda f: low_rank(f, UP, a=np.zeros((2, 3, 32), np.int32)), f"{UP}/a has dtype int32"),
        (lambda f: low_rank(f, UP, base=f[UP][:, :60]), rf"{UP} has shape \(2, 60, 32\)"),
        (lambda f: low_rank(f, UP, base=tuple(f[UP])), f"{UP} is no array in the new parameters, but tuple"),
        (lambda f: tuple(f[UP]), f"{UP} has ndarray as layer 0 of a tuple"),
        (lambda f: (), f"{UP} is a tuple of 0"),
        (lambda f: (stored(f[UP][0]),) * 2, f"{UP} of layer 0 is quantised by .* it is not quantised"),
        (lambda f: jax.ShapeDtypeStruct(f[UP].shape, np.float32), f"{UP} is no array .* but ShapeDtypeStruct"),
        (lambda f: None, f"{UP} is no array .* but NoneType"),
    ],
)
def test_what_cannot_be_placed_is_named(first, leaf, message):
    flat = model_params.flat(random_weights(1))
    with pytest.raises(UserError, match=message):
        first.with_params(model_params.nested(flat | {UP: leaf(flat)}))


def stored(matrix: np.ndarray) -> Quantized:
    """In eight bits by channel."""
    return quantized_params({UP: matrix}, {UP: parse("int8")["gate_up"]})[UP]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (lambda up: up, f"{UP} has ndarray as layer 1 of a tuple"),
        (lambda up: stored(up[:60]), rf"{UP} of layer 1 has shape \(60, 32\)"),
        (lambda up: jax.tree.map(deleted, stored(up)), f"{UP} was donated"),
        (lambda up: stored(up).values, f"{UP} has ArrayImpl as layer 1 of a tuple"),
        (
            lambda up: Quantized(stored(up).values.astype(jnp.int4), stored(up).scales),
            f"{UP} of layer 1 is quantised by",
        ),
    ],
)
def test_each_layer_of_a_tuple_is_looked_at(second, message):
    flat = model_params.flat(random_weights(1))
    up, make = flat[UP], lambda leaf: model_params.nested(flat | {UP: leaf})
    eight_bits = Generator(SMALL, make(stored(up)))
    eight_bits.with_params(make((stored(up[0]), stored(up[1]))))
    with pytest.raises(UserError, match=message):
        eight_bits.with_params(make((stored(up[0]), second(up[1]))))


def test_no_more_than_a_leaf_is_held_while_weights_are_laid_out(first, monkeypatch):
    """Of parameters in which every matrix has a change."""
    flat, laid_out, held = model_params.flat(random_weights(1)), placement._laid_out, []
    for path, leaf in model_params.leaves(SMALL).items():
        if leaf.kind is not None:
            factors = {name: np.ones(shape, np.float32) for name, shape in factor_shapes(leaf.shape, 2).items()}
            flat[path] = LowRank(flat[path], **factors, scale=0.1)
    params = model_params.nested(flat)

    def bytes_alive() -> int:
        return sum(array.nbytes for array in jax.live_arrays())

    def counted(*arguments):
        held.append(bytes_alive())
        return laid_out(*arguments)

    monkeypatch.setattr(placement, "_laid_out", counted)
    gc.collect()
    before = bytes_alive()
    other = first.with_params(params)
    gc.collect()
    result = bytes_alive() - before
    largest = max(4 * math.prod(shape) for shape in model_params.shapes(SMALL).values())
    assert max(held) - before <= result + largest, other
    assert result > 2.5 * largest  # all of them would be too many


@pytest.mark.slow
def test_narrow_floats_are_widened(first):
    narrow = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), random_weights(1))
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), narrow)
    assert first.with_params(narrow).generate(PROMPTS, SAMPLINGS) == first.with_params(wide).generate(
        PROMPTS, SAMPLINGS
    )
