"""phijax export of what phijax quantize wrote: what it says and refuses; the real model through transformers."""

import json
import pathlib
import sys

import numpy as np
import pytest
from absl.testing import flagsaver
from etils import epath
from references import real_model

sys.path.append(str(pathlib.Path(__file__).parent / "interchange"))
from small_weights_case import CASES, Small, source

import phijax
from phijax import export
from phijax.errors import UserError
from phijax.interchange.gguf import k_quants
from phijax.interchange.gguf import write as gguf_write
from phijax.interchange.native import quantize as native_quantize
from phijax.interchange.native import write as native_write
from phijax.interchange.open import open_checkpoint
from phijax.quantization import policy, report
from phijax.quantization.rounding import round_to_nearest


def run(*arguments: str) -> int:
    """The command, in this process."""
    saved = flagsaver.save_flag_values(export.FLAGS)
    try:
        return export.main(export.FLAGS(["export", *arguments])[1:])
    finally:
        flagsaver.restore_flag_values(saved, export.FLAGS)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> str:
    return str(Small(tmp_path_factory.mktemp("small"))("mixed").path)


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("dense") / "ours"
    native_write.write(source(CASES["mixed"][0]), epath.Path(folder), dtype=None)
    return str(folder)


SAID = {
    "compressed_tensors": ["embedding: dense in bfloat16", "round the scales by 1 part in 512", "phi3 layout", "int32"],
    "mlx": ["scales and what is dense: float16", "phi3 layout", "uint32"],
    "gguf": ["7 tensors Q4_0", "2 tensors Q8_0", "1 tensors BF16", "tiny-Q4_0.gguf", "the tokenizer's among them"],
}


@pytest.mark.parametrize("format", SAID)
def test_what_is_written_is_said_with_its_size(format, small, tmp_path, capsys):
    output = tmp_path / "out"
    assert run(f"--checkpoint={small}", f"--format={format}", f"--output={output}") == 0
    printed = capsys.readouterr().out
    assert " weights, bfloat16, int4, int4_g64, int8\n" in printed
    for words in SAID[format]:
        assert words in printed, printed
    (file,) = [*output.glob("*.safetensors"), *output.glob("*.gguf")]
    nbytes = next(int(word.replace(",", "")) for word in printed.split("\n")[-2].split() if word[0].isdigit())
    header = 0 if format == "gguf" else 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert nbytes == file.stat().st_size - header
    weights = sum(np.prod(shape) for shape in open_checkpoint(small).weights.shapes().values())
    assert f"{8 * nbytes / weights:.3f} bits a weight" in printed
    assert "## Small weights" in (output / "README.md").read_text()


@pytest.mark.parametrize("format", SAID)
def test_dry_run_writes_nothing(format, small, tmp_path, capsys):
    assert run(f"--checkpoint={small}", f"--format={format}", f"--output={tmp_path / 'out'}", "--dry_run") == 0
    printed = capsys.readouterr().out
    assert "would write" in printed and not list(tmp_path.iterdir())
    assert ("Q4_0 and Q8_0, others as BF16" in printed) == (format == "gguf")


@pytest.mark.parametrize(
    "more", [[f"--format={name}"] for name in (*SAID, "hf", "phijax")] + [["--format=gguf", "--kind=Q4_K_M"]]
)
def test_a_dry_run_is_refused_where_the_real_one_would_be(more, small, tmp_path):
    arguments = [f"--checkpoint={small}", *more, f"--output={tmp_path / 'out'}"]
    if "--kind=Q4_K_M" in more:  # as if llama.cpp had made it
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "tiny-Q4_K_M.gguf").write_text("there")
    else:
        assert run(*arguments) == 0
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="is there already"):
        run(*arguments, "--dry_run")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("arguments", [["phijax"], ["phijax", "--dtype=bfloat16"], ["hf"], ["hf", "--dtype=float16"]])
def test_what_loses_its_few_bits_is_said(arguments, small, tmp_path, capsys):
    """Only ours, without --dtype, keeps the integers."""
    format, *more = arguments
    assert run(f"--checkpoint={small}", f"--format={format}", f"--output={tmp_path / 'out'}", *more) == 0
    printed, dtype = capsys.readouterr().out, more[0].removeprefix("--dtype=") if more else "float32"
    if arguments == ["phijax"]:
        assert "few bits" not in printed
        assert open_checkpoint(tmp_path / "out").weights.schemes == open_checkpoint(small).weights.schemes
    else:
        assert f"what is stored in few bits is written as the {dtype} that it stands for" in printed


@pytest.mark.parametrize("format", ["compressed_tensors", "mlx"])
def test_a_checkpoint_that_is_not_quantised_is_refused(format, dense, tmp_path):
    with pytest.raises(UserError, match=rf"--format={format} is for small weights; .*\n  phijax quantize"):
        run(f"--checkpoint={dense}", f"--format={format}", f"--output={tmp_path / 'out'}")
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_there_is_refused(small, tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        run(f"--checkpoint={small}", "--format=mlx", f"--output={tmp_path}")
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine"]


def test_the_builder_of_onnx_runtime_finds_its_keys(small, tmp_path):
    """From a quantised checkpoint: an ordinary folder in 16 bits, without quantization_config."""
    assert run(f"--checkpoint={small}", "--format=hf", "--dtype=bfloat16", f"--output={tmp_path / 'hf'}") == 0
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16" and "quantization_config" not in config


def test_kinds_are_those_of_the_writers():
    assert export.GGUF_KINDS == gguf_write.KINDS and export.K_QUANTS == k_quants.KINDS
    with pytest.raises(UserError, match="Nearest: Q6_K"):
        run("--checkpoint=c", "--format=gguf", "--kind=Q6K", "--output=o")


@pytest.mark.slow
def test_a_real_model_through_transformers(tmp_path):
    """SmolLM2-135M in int4_g64, its embedding dense. Measured KL: 1.6e-4, all of it the embedding's bfloat16."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors")
    opened = open_checkpoint(real_model.find_or_skip())
    assigned = policy.assign(opened.model, policy.parse("int4_g64_head8"))
    native_quantize.write(opened, epath.Path(tmp_path / "small"), assigned, round_to_nearest, method="rtn")
    arguments = [f"--checkpoint={tmp_path / 'small'}", "--format=compressed_tensors", f"--output={tmp_path / 'out'}"]
    assert run(*arguments) == 0
    native_write.write(open_checkpoint(tmp_path / "small"), epath.Path(tmp_path / "wide"), dtype=np.dtype(np.float32))
    model = phijax.load(tmp_path / "wide", max_length=256)  # what the integers stand for, in float32
    tokens = opened.tokenizer().encode((pathlib.Path(__file__).parents[1] / "README.md").read_text())[:200]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        got = theirs(torch.tensor([tokens]), use_cache=False).logits[0].numpy()
    quality = report.summarise([report.compare(np.asarray(model.logits(tokens)), got, np.roll(tokens, -1))])
    assert quality.kl_mean < 1e-3
