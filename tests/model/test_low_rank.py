"""A change of low rank beside its base: the two verbs, its leaves, and what does not fit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from quick_compilation import QUICK
from small_models import SMALL

from phijax.errors import UserError
from phijax.model import adapters, int8_products, params
from phijax.model.low_rank import LowRank
from phijax.model.quantized import Quantized
from phijax.model.weights import WeightFormat, lookup, project, project_back, whole
from phijax.quantization.policy import Scheme
from phijax.quantization.rounding import round_to_nearest

ROWS, COLUMNS, RANK, SCALE = 96, 64, 3, 0.75
RNG = np.random.default_rng(0)
# float32 sums of at most 96 terms of about 1, in another order: 96 * 2^-24 = 6e-6 of the largest.
CLOSE = dict(rtol=0, atol=1e-4)


quickly = functools.partial(jax.jit, compiler_options=QUICK)


def random(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape, np.float32)


def low_rank(base, *stacked: int) -> LowRank:
    return LowRank(base, jnp.asarray(random(*stacked, RANK, COLUMNS)), jnp.asarray(random(*stacked, ROWS, RANK)), SCALE)


def integers(axis: int) -> Quantized:
    rounded = round_to_nearest(random(ROWS, COLUMNS), Scheme(4, 32), axis)
    return Quantized(jnp.asarray(rounded.values).astype(jnp.int4), jnp.asarray(rounded.scales))


def leaf(value, summed: str = "d") -> nnx.Param:
    return nnx.Param(value, axes=("ffn", "embed"), summed=summed)


BASES = {
    "array": lambda axis: jnp.asarray(random(ROWS, COLUMNS)),
    "quantized": integers,
    "low rank": lambda axis: low_rank(integers(axis)),  # a change of a change: several over one base
}


@pytest.mark.parametrize("heads", [None, 8])
@pytest.mark.parametrize("base", BASES)
def test_the_verbs_are_those_of_the_merged_weight(base, heads):
    into, back = low_rank(BASES[base](-1)), low_rank(BASES[base](-2))
    assert isinstance(into, WeightFormat) and into.shape == (ROWS, COLUMNS)
    x, h = random(2, 5, COLUMNS), random(2, 5, ROWS)
    if heads:
        h = h.reshape(2, 5, heads, -1).swapaxes(1, 2)
    for verb, value, given in ((project, into, x), (project_back, back, h)):

        @quickly
        def all_three(value, given, verb=verb):
            return [verb(given, leaf(w), heads=heads) for w in (value, value.merged(), value.base)]

        got, expected, without = all_three(value, given)
        np.testing.assert_allclose(got, expected, **CLOSE)
        assert np.abs(without - expected).max() > 1  # the change is no small one


def test_the_format_by_itself_is_the_merged_weight_too():
    """What has no leaf around it: logits of inference ask the format, a lookup its rows."""
    tokens = jnp.array([[3, 0], [95, 3]])

    @quickly
    def methods(w, x, h):
        rows = lookup(leaf(w), tokens, jnp.float32)
        return w.project(x, jnp.float32), w.project_back(h), rows, w.merged(), whole(leaf(w))

    for value in (low_rank(integers(-1)), low_rank(jnp.asarray(random(ROWS, COLUMNS)))):
        x, h = random(4, COLUMNS), random(4, ROWS)
        *got, merged, as_array = methods(value, x, h)
        matrix = np.asarray(merged, np.float64)
        for found, expected in zip(got, (x @ matrix.T, h @ matrix, matrix[tokens]), strict=True):
            np.testing.assert_allclose(found, expected, **CLOSE)
        np.testing.assert_array_equal(as_array, merged)
        narrow = jax.eval_shape(methods, value, *(a.astype(jnp.bfloat16) for a in (x, h)))
        assert [out.dtype for out in narrow[:2]] == [jnp.float32, jnp.bfloat16]


def test_merged_is_base_and_scaled_product_of_each_layer():
    stack = low_rank(jnp.asarray(random(2, ROWS, COLUMNS), jnp.bfloat16), 2)
    base, a, b = (np.asarray(part, np.float64) for part in (stack.base, stack.a, stack.b))
    merged = stack.merged()
    assert merged.dtype == jnp.float32
    np.testing.assert_allclose(merged, base + SCALE * np.einsum("lor,lri->loi", b, a), rtol=0, atol=5e-6)


@pytest.mark.parametrize("heads", [None, 8])
def test_the_change_is_never_made(heads):
    """No product of a program, forward or backward, has the shape of the weight but the gradient of the base."""

    def verbs(x, h, factors):
        base = jnp.zeros((ROWS, COLUMNS))
        out = project(x, leaf(LowRank(base, *factors, SCALE)), heads=heads)
        return out.sum() + project_back(h, leaf(LowRank(base, *factors, SCALE)), heads=heads).sum()

    factors = jnp.zeros((RANK, COLUMNS)), jnp.zeros((ROWS, RANK))
    h = jnp.zeros((1, 8, 7, ROWS // 8) if heads else (1, 7, ROWS))
    lowered = jax.jit(jax.grad(verbs, argnums=(0, 1, 2))).lower(jnp.zeros((1, 7, COLUMNS)), h, factors)
    made = [line for line in lowered.compile().as_text().splitlines() if " dot(" in line]
    assert made and not [line for line in made if f"f32[{ROWS},{COLUMNS}]" in line.split(" dot(")[0]]


@pytest.mark.parametrize("base", BASES)
def test_int8_products_round_the_base_alone(base):
    """What is in few bits already is contracted as ever."""
    for summed, axis, width in (("d", -1, COLUMNS), ("rows", -2, ROWS)):
        value, x = low_rank(BASES[base](axis)), random(5, width)
        got, base_alone = (
            quickly(lambda x, w, summed=summed: int8_products.contract(x, leaf(w, summed)))(x, w)
            for w in (value, value.base)
        )
        if base == "quantized":
            matrix = np.asarray(value.base.dequantize())
            np.testing.assert_allclose(base_alone, x @ (matrix if summed == "rows" else matrix.T), **CLOSE)
        change = SCALE * np.asarray(value.b) @ np.asarray(value.a)
        expected = base_alone + x @ (change if summed == "rows" else change.T)
        np.testing.assert_allclose(got, expected, **CLOSE)


def test_leaves_stand_beside_those_they_change():
    leaves = adapters.leaves(SMALL, {"qkv", "down"}, 4)
    base = params.leaves(SMALL)
    assert {path.rpartition("/")[0] for path in leaves} == {p for p, s in base.items() if s.kind in ("qkv", "down")}
    k, down = base["blocks/attention/k"], base["blocks/mlp/down"]
    for path, found, shape, axes in (
        ("blocks/attention/k/a", k, (2, 4, 64), ("layers", "rank", "embed")),
        ("blocks/attention/k/b", k, (2, 24, 4), ("layers", "kv_heads", "rank")),
        ("blocks/mlp/down/a", down, (2, 4, 64), ("layers", "rank", "embed")),
        ("blocks/mlp/down/b", down, (2, 96, 4), ("layers", "ffn", "rank")),
    ):
        got = leaves[path]
        assert (got.shape, got.axes) == (shape, axes)
        assert (got.kind, got.summed, got.decayed) == (found.kind, found.summed, found.decayed)
    few = {path: leaf for path, leaf in leaves.items() if path.split("/")[2] in ("k", "down")}
    start = params.flat(quickly(lambda: params.started(SMALL, few, 0))())
    for first, second, inputs in (("attention/k/a", "attention/k/b", 64), ("mlp/down/b", "mlp/down/a", 96)):
        assert not np.any(start[f"blocks/{second}"])
        # 512 or more numbers: their deviation is within 3 / sqrt(2 * 512) = 10 % of the declared one.
        assert np.std(start[f"blocks/{first}"]) == pytest.approx((3 * inputs) ** -0.5, rel=0.1)


@pytest.mark.parametrize(
    ("kinds", "rank", "said"),
    [
        ({"head"}, 4, "'head' is no kind of matrix that a change of low rank can be added to: down, gate_up, o, qkv."),
        ({"gate-up"}, 4, "Nearest: 'gate_up'"),
        ({"o"}, 0, "a rank of 1 or more, not 0"),
        ((), 4, "needs kinds of matrices that it is added to: down, gate_up, o, qkv"),
    ],
)
def test_what_cannot_be_declared_is_refused(kinds, rank, said):
    with pytest.raises(UserError, match=said):
        adapters.leaves(SMALL, kinds, rank)


def test_factors_that_do_not_fit_are_refused():
    base, path = params.abstract(SMALL), "blocks/attention/o"
    fits = {f"{path}/a": np.zeros((2, 4, 64)), f"{path}/b": np.zeros((2, 48, 4))}
    attached = params.flat(adapters.attached(base, params.nested(fits), 2.0))
    assert isinstance(attached.pop(path), LowRank) and attached.items() <= params.flat(base).items()
    for change, said in (
        ({f"{path}/a": np.zeros((2, 4, 48))}, r"with rank 4 they would be \(2, 4, 64\) and \(2, 48, 4\)"),
        ({f"{path}/b": np.zeros((2, 48, 3))}, "no change of low rank of a matrix"),
        ({"blocks/attention/x/a": fits[f"{path}/a"]}, "blocks/attention/x: a change of low rank needs"),
        ({f"{path}/c": fits[f"{path}/a"]}, f"{path}/c: a change of low rank has an a and a b"),
    ):
        with pytest.raises(UserError, match=said):
            adapters.attached(base, params.nested(fits | change), 2.0)
    with pytest.raises(UserError, match="needs its a, its b"):
        adapters.attached(base, params.nested({f"{path}/a": fits[f"{path}/a"]}), 2.0)


@pytest.mark.parametrize(
    ("path", "a", "b"),
    [
        ("blocks/attention_norm/scale", (4, 64), (2, 4)),  # two dimensions, layers and width
        ("final_norm/scale", (4, 64), (64, 4)),
        ("blocks/attention/o", (64,), (48,)),
    ],
)
def test_a_change_of_what_is_no_matrix_is_refused(path, a, b):
    factors = params.nested({f"{path}/a": np.zeros(a), f"{path}/b": np.zeros(b)})
    with pytest.raises(UserError, match=f"{path}: a change of low rank is one of a matrix"):
        adapters.attached(params.abstract(SMALL), factors, 1.0)
