"""What mlx-lm makes of our MLX folders: the same weights bit for bit, the same logits. Run by `make test-mlx`."""

import pathlib
import sys

import numpy as np
import pytest
from absl.testing import flagsaver
from etils import epath
from references import real_model

sys.path.append(str(pathlib.Path(__file__).parent.parent / "interchange"))
from gguf_case import logits, tokenizer
from small_weights_case import CASES, LEARNED_CASES, STOPS, Small, expected, family_of

import phijax
from phijax import export
from phijax.interchange.huggingface import folder as huggingface_folder
from phijax.interchange.huggingface import mlx as mlx_export
from phijax.interchange.huggingface.export import DTYPES
from phijax.interchange.native import quantize as native_quantize
from phijax.interchange.native import write as native_write
from phijax.interchange.open import open_checkpoint
from phijax.quantization import policy, report
from phijax.quantization.rounding import round_to_nearest

mx = pytest.importorskip("mlx.core", reason="MLX is 355 MB of wheels: make test-mlx")
mlx_utils = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed: make test-mlx")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return Small(tmp_path_factory.mktemp("small"))


def write(opened, output, dtype=None):
    folder = mlx_export.folder(opened, family_of(opened), dtype and DTYPES[dtype])
    huggingface_folder.write(opened, epath.Path(output), folder)
    return output


def theirs(folder, tokens):
    """(T, V) float32. In float32, whatever the folder is in: what remains is the weights."""
    model, _ = mlx_utils.load_model(pathlib.Path(folder), strict=True)
    model.set_dtype(mx.float32)
    return np.array(model(mx.array(tokens)[None])[0])


@pytest.mark.parametrize("case", [*CASES, *LEARNED_CASES])
def test_dequantised_by_mlx_the_weights_are_ours(case, small, tmp_path):
    """In float32, which holds every product; in float16 mx.dequantize itself rounds them."""
    opened = small(case)
    model, config = mlx_utils.load_model(write(opened, tmp_path / "out"), strict=True)
    modules = dict(model.named_modules())
    for name, wide in expected(opened, family_of(opened).mlx_rows or family_of(opened).rows).items():
        module, _, kind = name.rpartition(".")
        module = modules[module]
        if kind == "bias":
            np.testing.assert_array_equal(np.array(module.bias), wide.astype(np.float16), err_msg=name)
            continue
        got, wanted = module.weight, wide.astype(np.float16)  # what is dense is float16 there
        if hasattr(module, "scales"):
            scales, biases = (getattr(module, part).astype(mx.float32) for part in ("scales", "biases"))
            got = mx.dequantize(got, scales, biases, module.group_size, module.bits)
            wanted = wide
        np.testing.assert_array_equal(np.array(got), wanted, err_msg=name)
    assert config["eos_token_id"] == [tokenizer().added_tokens[stop] for stop in STOPS]


@pytest.mark.parametrize("case", [*CASES, *LEARNED_CASES])
def test_logits_are_ours(case, small, tmp_path):
    opened = small(case)
    tokens = np.random.default_rng(0).integers(0, 380, 40).tolist()
    shapes = opened.weights.shapes()
    arrays = {path: opened.weights.read(path, tuple(slice(0, n) for n in shape)) for path, shape in shapes.items()}
    ours = logits(opened.model, {path: array.astype(np.float32) for path, array in arrays.items()}, tokens)
    got = theirs(write(opened, tmp_path / "out"), tokens)
    np.testing.assert_allclose(got, ours, atol=1e-4, rtol=0)  # of 4; float32 on both sides, sums in another order
    assert np.abs(ours).max() > 1


def test_their_tokenizer_stops_where_ours_does(small, tmp_path):
    _, theirs = mlx_utils.load(str(write(small("groups of 32"), tmp_path / "out")))
    assert theirs.eos_token_ids == {tokenizer().added_tokens[stop] for stop in STOPS}
    text = "def f(x):\n    return x"
    assert theirs.encode(text, add_special_tokens=False) == tokenizer().encode(text)
    assert theirs.chat_template is not None


@pytest.mark.slow
def test_a_real_model(tmp_path):
    """SmolLM2-135M in int4_g64, embedding in int8, as the commands make it. Measured: KL 5e-11."""
    opened = open_checkpoint(real_model.find_or_skip())
    assigned = policy.assign(opened.model, policy.parse("int4_g64_head8"))
    native_quantize.write(opened, epath.Path(tmp_path / "small"), assigned, round_to_nearest, method="rtn")
    saved = flagsaver.save_flag_values(export.FLAGS)
    try:
        arguments = [f"--checkpoint={tmp_path / 'small'}", "--format=mlx", f"--output={tmp_path / 'mlx'}"]
        assert export.main(export.FLAGS(["export", *arguments])[1:]) == 0
    finally:
        flagsaver.restore_flag_values(saved, export.FLAGS)
    small = open_checkpoint(tmp_path / "small")
    native_write.write(small, epath.Path(tmp_path / "wide"), dtype=np.dtype(np.float32))
    model = phijax.load(tmp_path / "wide", max_length=128)  # what the integers stand for
    tokens = small.tokenizer().encode((pathlib.Path(__file__).parents[2] / "README.md").read_text())[:96]
    ours, got = np.asarray(model.logits(tokens)), theirs(tmp_path / "mlx", tokens)
    assert report.summarise([report.compare(ours, got, np.roll(tokens, -1))]).kl_mean < 1e-6
