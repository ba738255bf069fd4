"""The tokenizer of a checkpoint of ours: what is copied of another's, read here or not, and when it is known."""

import io
import json
import shutil

import pytest
import sentencepiece
from etils import epath
from gguf_case import GPT2, TEXT, opened

from phijax.checkpoint import manifest
from phijax.errors import UserError
from phijax.interchange.facts import Facts
from phijax.interchange.huggingface import export as huggingface_export
from phijax.interchange.huggingface import folder as huggingface_folder
from phijax.interchange.huggingface.families import FAMILIES
from phijax.interchange.native import quantize as native_quantize
from phijax.interchange.native import write as native_write
from phijax.interchange.open import open_checkpoint
from phijax.quantization import policy
from phijax.storage import staging

ASSIGNED = policy.assign(GPT2, policy.parse("int8"))
UNIGRAM = {
    "version": "1.0",
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": None,
    "post_processor": None,
    "decoder": None,
    "model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]], "byte_fallback": False},
}


def no_tokenizer():
    raise UserError("There is none.")


def write(source, output, say):
    native_write.write(source, output, dtype=None, say=say)


def quantize(source, output, say):
    native_quantize.write(source, output, ASSIGNED, method="rtn", say=say)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder of GPT-2's class, no tokenizer in it."""
    to = epath.Path(tmp_path_factory.mktemp("weights") / "gpt2")
    source = opened(GPT2, tokenizer=no_tokenizer, facts=Facts())
    huggingface_folder.write(source, to, huggingface_export.folder(source, FAMILIES["gpt2"], None))
    return to


@pytest.fixture
def folder(weights, tmp_path):
    return epath.Path(shutil.copytree(weights, tmp_path / "from"))


def two_files(folder, config):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator([TEXT] * 3, vocab_size=390, special_tokens=["<|stop|>"], show_progress=False)
    made.save_model(str(folder))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|stop|>"} | config))


@pytest.mark.parametrize("make", [write, quantize])
@pytest.mark.parametrize("spec", [UNIGRAM, None], ids=["unigram", "names alone"])
def test_a_tokenizer_that_is_not_read_here_is_copied(folder, tmp_path, make, spec):
    """Others read it. It is said before the first weight is written."""
    files = {"tokenizer_config.json": '{"eos_token": "</s>"}'}
    files |= {"tokenizer.json": json.dumps(spec)} if spec else {}
    for name, text in files.items():
        (folder / name).write_text(text)
    said, output = [], epath.Path(tmp_path / "to")
    make(open_checkpoint(folder), output, said.append)
    assert said[0].startswith("warning: ") and "tokenizer" in said[0]
    for name, text in files.items():
        assert (output / "tokenizer" / name).read_text() == text
    assert "tokenizer" not in manifest.read(output)["extra"]["weights_only"]
    again = open_checkpoint(output)
    assert again.model == GPT2
    with pytest.raises(UserError):
        again.tokenizer()


@pytest.mark.parametrize("make", [write, quantize])
@pytest.mark.parametrize("config", [{}, {"tokenizer_class": "GPT2Tokenizer"}], ids=["by config.json", "by its own"])
def test_gpt2s_two_files_become_a_tokenizer_of_ours(folder, tmp_path, make, config):
    """config.json, which says whose vocab.json and merges.txt are, does not come along."""
    two_files(folder, config)
    source, output = open_checkpoint(folder), epath.Path(tmp_path / "to")
    make(source, output, print)
    mine, copied = source.tokenizer(), open_checkpoint(output).tokenizer()
    assert copied.fingerprint == manifest.read(output)["extra"]["weights_only"]["tokenizer"] == mine.fingerprint
    assert copied.encode(TEXT) == mine.encode(TEXT) and copied.end_of_text == mine.end_of_text
    assert (output / "tokenizer" / "vocab.json").read_bytes() == (folder / "vocab.json").read_bytes()


def test_a_damaged_file_is_named_before_anything_is_quantised(folder, tmp_path):
    (folder / "tokenizer_config.json").write_text('{"eos_token": ')
    with pytest.raises(UserError, match=r"tokenizer_config.json is not JSON"):
        quantize(open_checkpoint(folder), epath.Path(tmp_path / "to"), print)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["from"]


def test_the_tokenizer_of_an_earlier_start_is_not_left_beside_the_new_one(folder, tmp_path):
    two_files(folder, {})
    output, model = epath.Path(tmp_path / "to"), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 3), model_writer=model, vocab_size=80, model_type="bpe", minloglevel=2
    )
    stale = staging.unfinished(output) / "tokenizer"
    stale.mkdir(parents=True)
    (stale / "tokenizer.model").write_bytes(model.getvalue())
    quantize(open_checkpoint(folder), output, print)
    assert not (output / "tokenizer" / "tokenizer.model").exists()
    assert open_checkpoint(output).tokenizer().encode(TEXT) == open_checkpoint(folder).tokenizer().encode(TEXT)
