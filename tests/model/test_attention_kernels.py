"""Every attention path, values and gradients, against a float64 NumPy reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick_compilation import QUICK
from references.attention import attention_reference, visible_keys

from phijax.errors import UserError
from phijax.model.backend import ATTENTION, choose_backend
from phijax.model.config import ModelSection
from phijax.model.kernels import splash
from phijax.model.kernels.cudnn import cudnn_attention
from phijax.model.mask import Mask
from phijax.parallel import dealing, sharding
from phijax.parallel.mesh import MeshConfig, make_mesh

# float32 sums of at most 256 products of normal numbers: 1e-6 to 4e-6 of noise. One key too many in a window, or a
# group of heads off by one, moves the output by 1e-2 or more.
CLOSE = {"rtol": 0, "atol": 2e-5}

PATHS = {
    "dense": ATTENTION["dense"],
    "blocked": ATTENTION["blocked"],
    "cudnn": functools.partial(cudnn_attention, implementation="xla"),
    "splash": functools.partial(splash.splash_attention, interpret=True),
}


def documents(length: int, *sizes: int) -> np.ndarray:
    """Segment ids of a packed row: documents of these sizes, then padding (0)."""
    row = np.repeat(np.arange(1, len(sizes) + 1), sizes)
    assert len(row) <= length
    return np.pad(row, (0, length - len(row))).astype(np.int32)


def inputs(length: int, heads: int, kv_heads: int, head_dim: int, batch: int = 3):
    """q, k, v, segment ids, d_out. Rows: four documents and padding, one whole document, one of padding alone."""
    rng = np.random.default_rng(0)
    q, d_out = (rng.standard_normal((batch, heads, length, head_dim), np.float32) for _ in range(2))
    k, v = (rng.standard_normal((batch, kv_heads, length, head_dim), np.float32) for _ in range(2))
    packed = documents(length, 1, length // 4, length // 3, length // 5)
    rows = [packed, documents(length, length), np.zeros(length, np.int32), documents(length, length // 2)]
    return q, k, v, np.stack([rows[b % 4] for b in range(batch)]), d_out


def value_and_gradients(path, q, k, v, segments, d_out, window):
    def run(q, k, v, segments, d_out):
        layout = ("act_batch", "act_heads", "act_time", None)
        q, k, v, d_out = (sharding.constrain(a, layout) for a in (q, k, v, d_out))
        segments = sharding.constrain(segments, ("act_batch", "act_time"))
        # The kernels leave the factor 1/sqrt(H) to their caller, the reference has it.
        out, pull = jax.vjp(
            lambda q, k, v: path(q * q.shape[-1] ** -0.5, k, v, segments, mask=Mask(window=window)), q, k, v
        )
        return out, *pull(d_out)

    return jax.jit(run, compiler_options=QUICK)(q, k, v, segments, d_out)


def dealt(path, q, k, v, segments, *, mask):
    """A path that takes dealt rows, for rows in order."""
    out = path(*(dealing.deal(a, 2) for a in (q, k, v)), dealing.deal(segments, 1), mask=mask)
    return dealing.undeal(out, 2)


def compare(path, arguments, window):
    got = value_and_gradients(path, *arguments, window)
    expected = attention_reference(*arguments, window=window)
    for name, ours, reference in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
        np.testing.assert_allclose(ours, reference, **CLOSE, err_msg=name)


def test_reference_window_counts_the_query_itself():
    assert visible_keys(np.ones(6, np.int32), 3).sum(axis=1).tolist() == [1, 2, 3, 3, 3, 3]
    assert visible_keys(np.array([1, 1, 2, 2, 0, 0]), None).sum(axis=1).tolist() == [1, 2, 1, 2, 1, 2]


# Shorter than the row by one, equal to it, longer by one.
@pytest.mark.parametrize("name", ["dense", "cudnn"])
@pytest.mark.parametrize("window", [None, 1, 7, 39, 40, 41])
def test_windows(name, window):
    compare(PATHS[name], inputs(40, heads=4, kv_heads=2, head_dim=24), window)


# 150 tokens: three blocks of rows, the last one partial; 65: a block's first key is one before the block of 64.
@pytest.mark.parametrize("window", [None, 1, 65, 149, 150])
def test_blocked_windows(window):
    compare(PATHS["blocked"], inputs(150, heads=4, kv_heads=2, head_dim=24), window)


@pytest.mark.parametrize("name", ["dense", "blocked", "cudnn"])
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(2, 2, 96), (6, 1, 48), (10, 5, 20)])
def test_heads(name, heads, kv_heads, head_dim):
    compare(PATHS[name], inputs(70, heads, kv_heads, head_dim), 9)


@pytest.mark.parametrize("length", [1, 63, 64, 65])
def test_blocked_lengths(length):
    """Whole blocks, one token fewer, one more."""
    q, k, v, segments, d_out = inputs(130, heads=2, kv_heads=1, head_dim=16)
    cut = (*(a[:, :, :length] for a in (q, k, v)), segments[:, :length], d_out[:, :, :length])
    compare(PATHS["blocked"], cut, 5)


@pytest.fixture
def small_blocks(monkeypatch):
    """Splash in blocks of 128, so that 256 tokens cross block borders."""
    monkeypatch.setattr(splash, "BLOCK", 128)
    monkeypatch.setattr(splash, "BLOCK_COMPUTE", 128)


@pytest.mark.parametrize("window", [1, 129, 255, 256])
def test_splash_windows(small_blocks, window):
    compare(PATHS["splash"], inputs(256, heads=4, kv_heads=2, head_dim=96, batch=1), window)


def test_splash_backward_in_longer_blocks(small_blocks, monkeypatch):
    """Of many keys the backward kernel takes more at once, as many as lie together."""
    assert splash.backward_block(4096, 4096) == 128 and splash.backward_block(8192, 1024) == 256
    assert splash.backward_block(131072, 384) == 128  # 384 is no multiple of 256
    monkeypatch.setattr(splash, "MOST_BLOCKS_OF_KEYS", 2)
    assert splash.backward_block(512, 512) == 256
    compare(PATHS["splash"], inputs(512, heads=2, kv_heads=1, head_dim=24, batch=1), 300)
    with jax.set_mesh(make_mesh(MeshConfig(1, 1, 2, 1), jax.devices()[:2])):
        compare(functools.partial(dealt, PATHS["splash"]), inputs(1024, 2, 1, 24, batch=1), None)


def test_splash_heads():
    compare(PATHS["splash"], inputs(128, heads=3, kv_heads=1, head_dim=48), None)


@pytest.mark.parametrize(
    "name, shape, window",
    [
        ("dense", (1, 2, 2, 2), 30),
        ("dense", (1, 1, 2, 4), None),
        ("blocked", (2, 2, 1, 2), 30),
        ("blocked", (1, 1, 2, 4), None),  # not chosen under `context`, but right when asked for
        ("cudnn", (1, 2, 2, 2), 30),
        ("splash", (2, 2, 1, 2), None),
        ("splash", (1, 2, 2, 2), 200),
        ("splash", (2, 1, 2, 2), 512),
        ("splash", (1, 1, 4, 2), None),
    ],
    ids=str,
)
def test_on_meshes(small_blocks, name, shape, window):
    # Splash: what lies together of a row, two parts on a chip, is whole blocks.
    length = (128 if shape[2] == 1 else 256 * shape[2]) if name == "splash" else 72
    path = functools.partial(dealt, PATHS[name]) if name == "splash" else PATHS[name]
    with jax.set_mesh(make_mesh(MeshConfig(*shape), jax.devices())):
        compare(path, inputs(length, heads=8, kv_heads=4, head_dim=12, batch=4), window)


def test_bfloat16_keeps_float32_scores():
    """bfloat16 inputs and outputs, scores and softmax in float32: the error is that of rounding in and out."""
    q, k, v, segments, _ = inputs(150, 4, 2, 24)
    factor = q.shape[-1] ** -0.5
    q, k, v = (jnp.asarray(a, jnp.bfloat16) for a in (q * factor, k, v))
    wide = (np.asarray(a, np.float64) for a in (q, k, v))
    reference = attention_reference(next(wide) / factor, *wide, segments, np.zeros(q.shape), window=40)[0]
    for name in ("dense", "blocked", "cudnn"):
        out = jax.jit(functools.partial(PATHS[name], mask=Mask(window=40)))(q, k, v, segments)
        assert out.dtype == jnp.bfloat16
        # 8 bits of mantissa: probabilities and the output each rounded by at most 2**-9 of numbers below 4.
        np.testing.assert_allclose(np.asarray(out, np.float64), reference, rtol=0, atol=2e-2, err_msg=name)


@pytest.mark.parametrize(
    "length, context, fits",
    [
        (128, 1, True),
        (2048, 1, True),
        (131072, 8, True),
        (32768, 8, True),
        (512, 2, True),
        (100, 1, False),
        (1536, 1, False),
        (256, 2, False),
        (512, 4, False),
        (6144, 2, False),
        (1030, 4, False),
        (4, 8, False),
    ],
)
def test_splash_lengths(length, context, fits):
    assert (splash.check_splash(length, context) is None) == fits


def test_backend_choices():
    section = ModelSection()
    assert choose_backend(section, "cpu").attention == "blocked"
    assert choose_backend(section, "tpu").attention == "splash"
    for platform in ("gpu", "cuda", "rocm"):
        assert choose_backend(section, platform).attention == "cudnn"
    for platform in ("cpu", "gpu"):  # their blocks of rows would cross chips
        assert choose_backend(section, platform, context=2).attention == "dense"
    assert choose_backend(section, "tpu", context=2).attention == "splash"
    assert choose_backend(ModelSection(attention="dense", layers="unroll", remat="full"), "tpu").attention == "dense"


def test_a_kernel_of_other_devices_is_refused():
    for name, platform in (("splash", "cpu"), ("splash", "cuda"), ("cudnn", "cpu"), ("cudnn", "tpu")):
        with pytest.raises(UserError, match=rf"model\.attention={name} is a kernel of .*model\.attention=auto"):
            choose_backend(ModelSection(attention=name, compute_dtype="bfloat16"), platform)


def test_cudnn_refuses_float32():
    with pytest.raises(UserError, match=r"bfloat16 only.*model\.attention=dense"):
        choose_backend(ModelSection(compute_dtype="float32"), "gpu")
    assert choose_backend(ModelSection(compute_dtype="float32", attention="dense"), "gpu").dtype == jnp.float32
