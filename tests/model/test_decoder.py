"""One function however it is computed: scanned or not, rematerialised or not, on one device or eight."""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick_compilation import QUICK
from references.weights import random_params
from small_models import SMALL, Rows, assert_leaves_close, nll_sum, pack, random_documents, run

from phijax.errors import UserError
from phijax.model import params as parameters
from phijax.model.backend import ATTENTION, CHOICES, Backend
from phijax.model.decoder import REMAT_POLICIES
from phijax.model.kernels.splash import splash_attention
from phijax.model.rope import apply_rope, inverse_frequencies, rope_table
from phijax.parallel.mesh import MeshConfig, make_mesh

LENGTH = 32
BATCH = 8

# Cut evenly by every mesh below: 8 heads and kv heads for tensor=8.
WIDE = dataclasses.replace(
    SMALL, num_heads=16, num_kv_heads=8, head_dim=6, partial_rotary_factor=0.67, sliding_window=9
)
MESHES = [(8, 1, 1, 1), (1, 8, 1, 1), (1, 2, 2, 2), (1, 1, 1, 8)]


def packed_rows(batch: int = BATCH, length: int = LENGTH):
    documents = [random_documents(SMALL, length // 2, length // 4, length // 8, seed=b) for b in range(batch)]
    return pack(documents, length)


@pytest.fixture(scope="module")
def params():
    return random_params(SMALL)


@pytest.fixture(scope="module")
def plain(params):
    """Scanned, dense, nothing recomputed."""
    return run(SMALL, Backend(), params, packed_rows())


# --- one device -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [Backend(scan_layers=False), CHOICES["cpu"]], ids=["dense", "cpu"])
def test_unrolled_equals_scanned(params, plain, backend):
    (loss, logits), gradients = run(SMALL, backend, params, packed_rows())
    (expected, expected_logits), expected_gradients = plain
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(logits, expected_logits, rtol=0, atol=2e-5)  # float32, sums in another order
    assert_leaves_close(gradients, expected_gradients, relative=1e-5)


@pytest.mark.parametrize(
    "remat, scan_layers",
    [(name, True) for name in REMAT_POLICIES if name != "none"] + [("mid+gate", True), ("full", False)],
)
def test_remat_changes_no_gradient(params, plain, remat, scan_layers):
    (loss, _), gradients = run(SMALL, Backend(remat=remat, scan_layers=scan_layers), params, packed_rows())
    np.testing.assert_allclose(loss, plain[0][0], rtol=1e-6)
    # What is computed again may be fused differently, no more.
    assert_leaves_close(gradients, plain[1], relative=1e-5)


def residual_bytes(backend: Backend, rows: Rows) -> int:
    """Bytes of what the backward pass keeps from the forward pass (weights and inputs included, for all alike)."""
    loss = nll_sum(SMALL, backend, rows.tokens.shape[1])

    def backward(params):
        return jax.vjp(lambda params: loss(params, *rows.arrays())[0], params)[1]

    kept = jax.tree.leaves(jax.eval_shape(backward, parameters.abstract(SMALL)))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in kept)


def test_remat_policies_keep_what_they_say():
    """Counted from the residuals themselves: a name that no layer gives would leave two policies equal."""
    c = SMALL
    places = 4 * c.num_layers * BATCH * LENGTH  # bytes of one float32 a token and layer
    rows = packed_rows()
    kept = {name: residual_bytes(Backend(remat=name), rows) for name in REMAT_POLICIES}
    attention = places * c.num_heads * c.head_dim
    mid, gate, up, activation = (places * n for n in (c.model_dim, c.ffn_dim, c.ffn_dim, c.ffn_dim))
    projections = places * (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    assert kept["save_attention"] - kept["full"] == attention
    assert kept["save_mid_gate_up"] - kept["save_attention"] == mid + gate + up
    assert kept["save_all_but_activation"] - kept["save_mid_gate_up"] == projections
    assert kept["save_all"] - kept["save_all_but_activation"] == activation
    assert kept["none"] > kept["save_all"]
    assert residual_bytes(Backend(remat="mid+gate"), rows) - kept["full"] == mid + gate
    unrolled = {name: residual_bytes(Backend(remat=name, scan_layers=False), rows) for name in ("none", "full")}
    assert unrolled["full"] < unrolled["none"]


def test_splash_keeps_its_output_once(monkeypatch):
    """It is named twice, as attention and among the kernel's residuals; with it goes one number a head, log-sum-exp."""
    monkeypatch.setitem(ATTENTION, "splash", functools.partial(splash_attention, interpret=True))
    rows = packed_rows(1, 128)
    kept = {name: residual_bytes(Backend("splash", remat=name), rows) for name in ("save_attention", "full")}
    places = 4 * SMALL.num_layers * 128  # bytes of one float32 a token and layer
    once = places * SMALL.num_heads * (SMALL.head_dim + 1)
    # The mask's own table, a byte a block and layer, is counted among either's arrays.
    assert abs(kept["save_attention"] - kept["full"] - once) < 16


def kernel_calls(jaxpr) -> int:
    """Kernels in a program. An equation without results is dead: the compiler drops it."""
    calls = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            calls += 1
        elif equation.outvars:
            inner = (getattr(value, "jaxpr", value) for value in equation.params.values())
            calls += sum(kernel_calls(each) for each in inner if hasattr(each, "eqns"))
    return calls


@pytest.mark.parametrize(
    "remat, kernels", [("none", 2), ("save_attention", 2), ("save_all", 2), ("full", 3), ("mid+attention", 3)]
)
def test_saved_residuals_spare_the_kernel_a_second_run(monkeypatch, remat, kernels):
    """The splash kernel under remat: forward and backward, and its forward again only where nothing of it is kept."""
    monkeypatch.setitem(ATTENTION, "splash", functools.partial(splash_attention, interpret=True))
    rows = packed_rows(1, 128)
    loss = nll_sum(SMALL, Backend("splash", remat=remat), 128)
    program = jax.make_jaxpr(jax.grad(loss, has_aux=True))(parameters.abstract(SMALL), *rows.arrays())
    assert kernel_calls(program.jaxpr) == kernels


def test_unknown_remat_policy_is_refused(params):
    with pytest.raises(UserError, match=r"model\.remat='save_nothing' is not known.*save_attention.*gate") as error:
        run(SMALL, Backend(remat="save_nothing"), params, packed_rows())
    assert "activation" in str(error.value)
    with pytest.raises(UserError, match="gat"):
        run(SMALL, Backend(remat="mid+gat"), params, packed_rows())


@pytest.mark.parametrize("factor", [1.0, 0.75, 0.5])
def test_rope_by_matmul_equals_slicing(factor):
    c = dataclasses.replace(SMALL, head_dim=24, partial_rotary_factor=factor)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 4, LENGTH, 24), np.float32)
    positions = rng.integers(0, 4096, (2, LENGTH), dtype=np.int32)
    frequencies = inverse_frequencies(c, 4096)
    tables = (rope_table(c, positions, *frequencies, jnp.float32, by_matmul=m) for m in (False, True))
    one, other = (apply_rope(x, table, c, by_matmul=m) for table, m in zip(tables, (False, True), strict=True))
    # One product and one sum each; a multiply-add may round once less.
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)
    if factor < 1:
        np.testing.assert_array_equal(one[..., c.rotary_dim :], x[..., c.rotary_dim :])
    assert np.abs(one - x).max() > 0.1


def test_rope_by_matmul_in_the_decoder(params, plain):
    (loss, _), gradients = run(SMALL, Backend(rope_by_matmul=True), params, packed_rows())
    np.testing.assert_allclose(loss, plain[0][0], rtol=1e-6)
    assert_leaves_close(gradients, plain[1], relative=1e-5)


def test_rope_angles_are_float32_in_bfloat16():
    """Positions 256 and 257 are one number in bfloat16; their rotations are not."""
    positions = np.array([[256, 257]], np.int32)
    for by_matmul in (False, True):
        cos, sin = rope_table(SMALL, positions, *inverse_frequencies(SMALL, 4096), jnp.bfloat16, by_matmul=by_matmul)
        assert cos.dtype == sin.dtype == jnp.bfloat16
        np.testing.assert_allclose(cos[0, 0, :, 0].astype(float), np.cos([256.0, 257.0]), rtol=0, atol=2**-8)


@pytest.mark.parametrize("attention", ["dense", "blocked"])
def test_bfloat16(params, plain, attention):
    """Compute in bfloat16: hidden is, logits and gradients of float32 weights are float32, near the float32 ones."""
    backend = Backend(attention, compute_dtype="bfloat16", remat="save_all")
    rows = packed_rows()
    model = parameters.module(SMALL, params)
    inputs = rows.tokens, rows.positions, rows.segment_ids
    assert jax.eval_shape(lambda: model.hidden(*inputs, backend, length=LENGTH)).dtype == jnp.bfloat16
    (loss, logits), gradients = run(SMALL, backend, params, rows)
    assert logits.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in gradients.values())
    np.testing.assert_allclose(loss, plain[0][0], rtol=1e-2)
    # 8 bits of mantissa, a dozen roundings on the way: measured 1 to 2 %.
    assert_leaves_close(gradients, plain[1], relative=8e-2)


# --- parameters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_padded_vocabulary_never_reaches_logits(tied):
    c = dataclasses.replace(SMALL, tied_head=tied)
    params = random_params(c)
    rows = packed_rows()
    (loss, logits), gradients = run(c, Backend(), params, rows)
    assert logits.shape == (BATCH, LENGTH, c.vocab_size)
    for name in ("embedding",) if tied else ("embedding", "head"):
        assert params[name].shape == (c.padded_vocab_size, c.model_dim)
        assert not np.any(params[name][c.vocab_size :])  # they start at zero
        assert not np.any(gradients[name][c.vocab_size :])  # and nothing moves them
        params[name] = params[name].at[c.vocab_size :].set(jnp.nan)
    (loss_2, logits_2), _ = run(c, Backend(), params, rows)
    np.testing.assert_array_equal(logits, logits_2)
    assert loss == loss_2


def test_every_leaf_has_an_axis_a_dimension():
    for c in (SMALL, WIDE, dataclasses.replace(SMALL, tied_head=True)):
        shapes, axes = parameters.shapes(c), parameters.axes(c)
        assert shapes.keys() == axes.keys()
        for path, shape in shapes.items():
            assert len(axes[path]) == len(shape), path
            assert (axes[path][0] == "layers") == path.startswith("blocks/"), path
            assert axes[path][-1] == "embed" and shape[-1] == c.model_dim, path  # D last, whole on every chip


def test_nested_and_flat_are_inverse():
    flat = {"a/b/c": 1, "a/d": 2, "e": 3}
    assert parameters.nested(flat) == {"a": {"b": {"c": 1}, "d": 2}, "e": 3}
    assert parameters.flat(parameters.nested(flat)) == flat
    assert set(parameters.flat(parameters.abstract(SMALL))) == set(parameters.shapes(SMALL))


def initial(c, seed):
    return parameters.flat(jax.jit(functools.partial(parameters.init, c, seed), compiler_options=QUICK)())


def test_a_leaf_starts_from_its_path_alone():
    """The key is fold_in(seed, crc32(path)): no count or order of leaves in it, so adding one moves no other."""
    start = initial(SMALL, 5)
    for path, value in start.items():
        if path.endswith("scale"):
            continue
        key = jax.random.fold_in(jax.random.key(5), zlib.crc32(path.encode()))
        expected = jax.random.normal(key, value.shape)
        if "blocks" not in path:  # rows beyond the vocabulary start at zero
            expected = expected.at[SMALL.vocab_size :].set(0.0)
        # Up to the leaf's deviation; float32.
        np.testing.assert_allclose(value / np.std(value), expected / np.std(expected), rtol=0, atol=1e-5, err_msg=path)
    tied = initial(dataclasses.replace(SMALL, tied_head=True), 5)
    assert set(start) - set(tied) == {"head"}
    for path, value in tied.items():
        np.testing.assert_array_equal(value, start[path], err_msg=path)


def test_deviation_of_the_start():
    """Unit inputs give unit outputs; what writes into the residual stream is smaller by sqrt(2 L)."""
    c = dataclasses.replace(SMALL, num_layers=3)
    flat = initial(c, 0)
    expected = {
        "attention/q": 64**-0.5,
        "mlp/up": 64**-0.5,
        "attention/o": 48**-0.5 / 6**0.5,
        "mlp/down": 96**-0.5 / 6**0.5,
    }
    for name, std in expected.items():
        # 9,000 or more samples: the deviation is known to 1 %.
        np.testing.assert_allclose(np.std(flat[f"blocks/{name}"]), std, rtol=0.05, err_msg=name)
    assert all((value == 1).all() for path, value in flat.items() if path.endswith("scale"))


# --- eight devices --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide():
    params = random_params(WIDE)
    return params, run(WIDE, Backend(), params, packed_rows())


@pytest.mark.parametrize(
    "shape, backend",
    [
        ((8, 1, 1, 1), Backend(remat="save_all")),
        ((1, 8, 1, 1), Backend(remat="save_all", rope_by_matmul=True)),
        ((1, 2, 2, 2), Backend(remat="save_attention")),
        ((1, 1, 1, 8), CHOICES["cpu"]),
    ],
    ids=str,
)
def test_meshes_equal_one_device(wide, shape, backend):
    params, ((loss, logits), gradients) = wide
    mesh = make_mesh(MeshConfig(*shape), jax.devices())
    placed = jax.device_put(params, parameters.shardings(WIDE, mesh))
    with jax.set_mesh(mesh):
        (loss_2, logits_2), gradients_2 = run(WIDE, backend, placed, packed_rows())
    np.testing.assert_allclose(loss_2, loss, rtol=1e-5)
    np.testing.assert_allclose(logits_2, logits, rtol=0, atol=2e-5)  # float32, sums in another order
    assert_leaves_close(gradients_2, gradients, relative=1e-5)


def test_init_is_bit_equal_on_every_mesh():
    """Two leaves, to save compilation, but compiled as in a run: fusion could round differently."""
    paths = ("embedding", "blocks/attention/k")

    def make(mesh=None):
        placed = parameters.flat(parameters.shardings(WIDE, mesh)) if mesh else {}
        some = lambda: {path: parameters.flat(parameters.init(WIDE, 3))[path] for path in paths}  # noqa: E731
        return jax.jit(some, out_shardings={path: placed[path] for path in paths} if mesh else None)()

    expected = make()
    for shape in MESHES:
        made = make(make_mesh(MeshConfig(*shape), jax.devices()))
        for path, value in expected.items():
            assert len(made[path].sharding.device_set) == 8
            np.testing.assert_array_equal(made[path], value, err_msg=f"{path} on {shape}")
