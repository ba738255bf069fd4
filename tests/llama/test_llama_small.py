"""What llama.cpp makes of quantised weights of ours, and the K-quants that it makes for us. Run: `make test-llama`."""

import ctypes
import dataclasses
import functools
import os
import pathlib
import sys
from pydoc_data.topics import topics

import numpy as np
import pytest
from etils import epath
from llama_reader import load, theirs
from references import real_model

sys.path.append(str(pathlib.Path(__file__).parent.parent / "interchange"))
from gguf_case import Arrays, everything, logits, opened, random_arrays
from small_weights_case import CASES, FUSED, Small

import phijax
from phijax.errors import UserError
from phijax.interchange.gguf import k_quants
from phijax.interchange.gguf.open import open_gguf
from phijax.interchange.gguf.write import write_gguf
from phijax.interchange.native import quantize as native_quantize
from phijax.interchange.native import write as native_write
from phijax.interchange.open import open_checkpoint
from phijax.interchange.weight_source import model_shapes
from phijax.quantization import policy, report
from phijax.quantization.rounding import round_to_nearest

llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp is built from source, 10 to 25 minutes: make test-llama")
gguf = pytest.importorskip("gguf")

WIDE = dataclasses.replace(FUSED, model_dim=256, num_heads=4, num_kv_heads=2, ffn_dim=512)  # K-quants: blocks of 256


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return Small(tmp_path_factory.mktemp("small"))


def widened_by_llama(path, output):
    """Our file, dequantised by llama.cpp itself. Its products of narrow weights would round the activations too."""
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.allow_requantize, settings.nthread = llama_cpp.LLAMA_FTYPE_ALL_F32, True, 1
    assert llama_cpp.llama_model_quantize(os.fsencode(path), os.fsencode(output), ctypes.byref(settings)) == 0
    return output


@pytest.mark.parametrize("case", CASES)
def test_weights_and_logits_are_ours(case, small, tmp_path):
    opened = small(case)
    path = write_gguf(opened, tmp_path / "m.gguf", kind="F32")
    wide = widened_by_llama(path, tmp_path / "wide.gguf")
    arrays = {leaf: array.astype(np.float32) for leaf, array in everything(opened.weights).items()}
    for leaf, array in everything(open_gguf(wide).weights).items():
        np.testing.assert_array_equal(array, arrays[leaf], err_msg=leaf)
    tokens = np.random.default_rng(0).integers(0, 380, 48).tolist()
    ours = logits(opened.model, arrays, tokens, length=64)
    np.testing.assert_allclose(theirs(load(wide, 64), tokens), ours, atol=1e-4, rtol=0)  # of 4
    narrow = theirs(load(path, 64), tokens)
    assert np.sqrt(np.mean((narrow - ours) ** 2) / np.mean(ours**2)) < 0.1


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q6_K"])
def test_k_quants_are_read_by_us_and_near(kind, tmp_path):
    source, said = opened(WIDE, random_arrays(WIDE)), []
    path = k_quants.write_k_quants(source, tmp_path / "m.gguf", kind=kind, say=said.append)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.gguf"] and not said
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds == ({"F32", "Q4_K", "Q6_K"} if kind == "Q4_K_M" else {"F32", "Q6_K"})
    read = everything(open_gguf(path).weights)
    for leaf, array in everything(source.weights).items():
        error = np.linalg.norm(read[leaf] - array) / np.linalg.norm(array)
        assert error < (0.09 if kind == "Q4_K_M" else 0.025), leaf  # 0.071 and 0.018 of normal weights
    assert len(theirs(load(path, 64), [1, 2, 3])) == 3


def test_of_quantised_weights_it_says_that_it_rounds_again(small, tmp_path):
    said = []
    k_quants.write_k_quants(small("mixed"), tmp_path, kind="Q5_K_M", say=said.append)
    assert [entry.name for entry in tmp_path.iterdir()] == ["tiny-Q5_K_M.gguf"]
    assert len(said) == 1 and "is quantised already; Q5_K_M rounds a second time" in said[0]


def test_what_llama_refuses_is_one_message_and_leaves_nothing(tmp_path, monkeypatch):
    def garbage(opened, path, **settings):
        path.write_bytes(b"GGUF no model")

    monkeypatch.setattr(k_quants, "write_gguf", garbage)
    with pytest.raises(UserError, match=r"llama.cpp could not make Q4_K_M of it: .*\S"):
        k_quants.write_k_quants(opened(WIDE), tmp_path / "m.gguf", kind="Q4_K_M")
    assert not list(tmp_path.iterdir())


def test_weights_that_are_nan_leave_nothing(tmp_path):
    arrays = random_arrays(WIDE)
    arrays["blocks/mlp/up"][1, 2, 3] = np.nan
    with pytest.raises(UserError, match="holds NaN"):
        k_quants.write_k_quants(opened(WIDE, weights=Arrays(arrays)), tmp_path / "m.gguf", kind="Q4_K_M")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow  # a gigabyte
def test_a_real_model(tmp_path):
    """SmolLM2-135M in int4_g64, embedding in int8. Measured KL: 4e-11 by llama.cpp's own dequantised weights; 0.006 by
    its integer products, which round activations to eight bits (the next test)."""
    float_model = open_checkpoint(real_model.find_or_skip())
    assigned = policy.assign(float_model.model, policy.parse("int4_g64_head8"))
    native_quantize.write(float_model, epath.Path(tmp_path / "small"), assigned, round_to_nearest, method="rtn")
    opened = open_checkpoint(tmp_path / "small")
    path = write_gguf(opened, tmp_path / "m.gguf", kind="F32")
    native_write.write(opened, epath.Path(tmp_path / "wide"), dtype=np.dtype(np.float32))
    model = phijax.load(tmp_path / "wide", max_length=512)  # what the integers stand for
    tokens = opened.tokenizer().encode((pathlib.Path(__file__).parents[2] / "README.md").read_text())[:200]
    ours = np.asarray(model.logits(tokens))

    def kl(file):
        got = theirs(load(file, 512), tokens)
        return report.summarise([report.compare(ours, got, np.roll(tokens, -1))]).kl_mean

    assert kl(widened_by_llama(path, tmp_path / "wide.gguf")) < 1e-6
    assert kl(path) < 0.02


class Layers:
    """The first layers of a model."""

    def __init__(self, opened, count):
        model = dataclasses.replace(opened.model, num_layers=count)
        self.dtype, self.read = opened.weights.dtype, opened.weights.read
        self.shapes = functools.partial(model_shapes, model)
        self.opened = dataclasses.replace(opened, model=model, weights=self)


@pytest.mark.slow
@pytest.mark.parametrize("layers", [1, 30])
def test_its_integer_products_are_ours(layers, tmp_path):
    """Our kernel rounds activations where llama.cpp does, in groups of 32 as Q8_0, its scales in float32, not float16.

    A number that is 1e-7 off is rounded to another integer now and then, which the next rounding sees, and so on: after
    one layer the two are nearer to each other than to float activations, after all thirty they are as far apart as
    llama.cpp is from itself, the prompt at once from token by token. docs/quantization.md has the figures.
    """
    opened = Layers(open_checkpoint(real_model.find_or_skip()), layers).opened
    assigned = policy.assign(opened.model, policy.parse("int4_g32_head8"))
    native_quantize.write(opened, epath.Path(tmp_path / "small"), assigned, round_to_nearest, method="rtn")
    llama = load(write_gguf(open_checkpoint(tmp_path / "small"), tmp_path / "m.gguf", kind="F32"), 512)
    text = "\n\n".join(topics[chapter] for chapter in sorted(topics)[:5])
    tokens = opened.tokenizer().encode(text)[:512]
    at_once, one_by_one = theirs(llama, tokens), stepped(llama, tokens)
    ours, exact = (
        np.asarray(phijax.load(tmp_path / "small", max_length=1024, int8_activations=rounded).logits(tokens))
        for rounded in (True, False)
    )

    def kl(p, q):
        return report.summarise([report.compare(p, q, np.roll(tokens, -1))]).kl_mean

    assert kl(exact, ours) < 1.3 * kl(exact, at_once)
    if layers == 1:
        assert kl(ours, at_once) < 0.7 * kl(exact, at_once)  # 4.1e-4 of 9.7e-4
        assert kl(one_by_one, at_once) < 1e-4  # 1.2e-6
    else:
        assert kl(ours, at_once) < 1.6 * kl(one_by_one, at_once)  # 4.3e-3 and 3.5e-3


def stepped(model, tokens):
    """As `theirs`, each token through the cache."""
    model.reset()
    for token in tokens:
        model.eval([token])
    return np.array(model.scores[: len(tokens)])
