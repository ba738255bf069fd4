"""ONNX Runtime GenAI's builder takes our Hugging Face folders, unedited. Run by `make test-onnx`."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from etils import epath

sys.path.append(str(pathlib.Path(__file__).parent.parent / "interchange"))
from gguf_case import tokenizer
from small_weights_case import FUSED, SPLIT, STOPS, source

from phijax.interchange.huggingface import export as huggingface_export
from phijax.interchange.huggingface import folder as huggingface_folder
from phijax.interchange.huggingface.export import DTYPES
from phijax.interchange.huggingface.families import FAMILIES
from phijax.interchange.native import quantize as native_quantize
from phijax.interchange.open import open_checkpoint
from phijax.model.config import LongRope
from phijax.quantization import policy
from phijax.quantization.rounding import round_to_nearest

genai = pytest.importorskip("onnxruntime_genai", reason="ONNX Runtime GenAI is not installed: make test-onnx")
pytest.importorskip("onnxruntime_genai.models.builder", reason="its builder wants onnx and onnx-ir: make test-onnx")
torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")

L0 = 64
LONG = dataclasses.replace(
    FUSED,
    long_rope=LongRope(
        short_factor=tuple(1.0 + 0.05 * i for i in range(32)),
        long_factor=tuple(1.5 + 0.9 * i for i in range(32)),
        original_max_position=L0,
    ),
)


def built(opened, folder, layout, precision):
    """The folder of ONNX files that the builder makes of `opened`, in 16 bits."""
    plain, output = folder / "hf", folder / precision
    written = huggingface_export.folder(opened, FAMILIES[layout], DTYPES["bfloat16"])
    huggingface_folder.write(opened, epath.Path(plain), written)
    where = ["-m", "", "-i", plain, "-o", output, "-c", folder / "cache"]
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", *where, "-p", precision, "-e", "cpu"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return plain, output


def last_logits(folder, tokens):
    """(V,) behind all tokens, given at once."""
    model = genai.Model(str(folder))
    settings = genai.GeneratorParams(model)
    settings.set_search_options(max_length=len(tokens) + 1, do_sample=False)
    generator = genai.Generator(model, settings)
    generator.append_tokens(np.asarray([tokens], np.int32))
    return np.asarray(generator.get_logits()).reshape(-1)


@pytest.mark.parametrize("layout", ["phi3", "llama"])
def test_logits_are_those_of_the_folder(layout, tmp_path):
    """phi-3 with LongRoPE, on both sides of its switch; from quantised weights of ours, which it gets in 16 bits."""
    opened = source(LONG if layout == "phi3" else SPLIT)
    assigned = policy.assign(opened.model, policy.parse("int4_g32"))
    native_quantize.write(opened, epath.Path(tmp_path / "small"), assigned, round_to_nearest, method="rtn")
    plain, onnx = built(open_checkpoint(tmp_path / "small"), tmp_path, layout, "fp32")
    model = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    for length in (L0 // 2, L0 + 40):
        tokens = np.random.default_rng(0).integers(0, 380, length).tolist()
        with torch.no_grad():
            expected = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].numpy()
        np.testing.assert_allclose(last_logits(onnx, tokens), expected, atol=1e-4, rtol=0)  # of 3; measured 4e-6
        assert np.abs(expected).max() > 1


def test_in_four_bits_it_has_our_stops_and_tokenizer(tmp_path):
    _, onnx = built(source(FUSED), tmp_path, "phi3", "int4")
    config = json.loads((onnx / "genai_config.json").read_text())["model"]
    assert config["eos_token_id"] == [tokenizer().added_tokens[name] for name in STOPS]
    text = "def f(x): return x"
    assert genai.Tokenizer(genai.Model(str(onnx))).encode(text).tolist() == tokenizer().encode(text)
