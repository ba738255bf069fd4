"""GPT-2's two files: the ids of transformers, and no other tokenizer's files taken for them."""

import json
import shutil

import pytest
from etils import epath

from phijax.errors import UserError
from phijax.interchange.tokenizer_check import TEXTS
from phijax.storage import strict_json
from phijax.text.open import open_tokenizer
from phijax.text.pre_tokenizers import PRE_TOKENIZERS, cuts_of
from phijax.text.vocab_and_merges import spec_of_folder

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """As openai-community/gpt2 was before tokenizer.json, but trained on little text."""
    folder = tmp_path_factory.mktemp("gpt2")
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator([*TEXTS, "the quick brown fox"] * 3, vocab_size=400, special_tokens=["<|endoftext|>"])
    made.save_model(str(folder))
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    return folder


@pytest.fixture
def copied(gpt2, tmp_path):
    return shutil.copytree(gpt2, tmp_path / "copied")


def test_ids_are_those_of_transformers(gpt2):
    ours, theirs = open_tokenizer(gpt2), transformers.GPT2Tokenizer.from_pretrained(gpt2)
    for text in (*TEXTS, "a<|endoftext|>b"):
        assert ours.encode_with_specials(text) == theirs(text, add_special_tokens=False)["input_ids"], repr(text)
        assert ours.decode(ours.encode(text)) == text
    assert ours.end_of_text == theirs.eos_token_id
    assert ours.encode("<|endoftext|>") != [ours.end_of_text]  # in plain text its name is text


def test_a_document_ends_with_the_folders_eos(copied):
    vocab = json.loads((copied / "vocab.json").read_text())
    vocab = {name.replace("<|endoftext|>", "<|stop|>"): i for name, i in vocab.items()}
    (copied / "vocab.json").write_text(json.dumps(vocab))
    (copied / "tokenizer_config.json").write_text('{"eos_token": "<|stop|>"}')
    ours = open_tokenizer(copied)
    assert ours.end_of_text == vocab["<|stop|>"] == transformers.GPT2Tokenizer.from_pretrained(copied).eos_token_id


def test_settings_are_read_a_few_times_not_for_each_token(copied, monkeypatch):
    (copied / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    read, seen = strict_json.read, []
    monkeypatch.setattr(strict_json, "read", lambda path, *args, **more: seen.append(path) or read(path, *args, **more))
    spec_of_folder(epath.Path(copied))
    assert 0 < len(seen) < 20


def test_the_rule_of_cuts_is_gpt2s(gpt2):
    assert cuts_of(spec_of_folder(epath.Path(gpt2))["pre_tokenizer"]) == PRE_TOKENIZERS["gpt-2"]


def test_added_tokens_and_their_flags_are_the_folders(copied):
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "eos_token": "<|endoftext|>",
        "added_tokens_decoder": {
            "0": {"content": "<|endoftext|>", "special": True},
            "400": {"content": "<|pad|>", "special": True, "rstrip": True},
            "401": {"content": "ABC", "special": False},
        },
    }
    (copied / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = open_tokenizer(copied), transformers.GPT2Tokenizer.from_pretrained(copied)
    for text in ("a<|pad|>  b", "xABCy", "<|endoftext|>"):
        assert ours.encode_with_specials(text) == theirs(text, add_special_tokens=False)["input_ids"], text
    assert ours.symbols.ids == {"ABC": 401}


@pytest.mark.parametrize(
    "config, said",
    [
        ({"model_type": "qwen2"}, "model_type qwen2"),
        ({"model_type": "gpt2", "tokenizer_class": "Qwen2Tokenizer"}, "tokenizer_class Qwen2Tokenizer"),
        ({}, "nothing of their class"),
        ({"model_type": "gpt\u202e2"}, r"model_type 'gpt.u202e2'"),
        ({"tokenizer_class": "\x1b[2JGPT2"}, r"tokenizer_class '.x1b.2JGPT2'"),
    ],
)
def test_files_of_other_classes_are_refused_with_the_remedy(copied, config, said):
    (copied / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k == "model_type"}))
    (copied / "tokenizer_config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k == "tokenizer_class"})
    )
    with pytest.raises(UserError, match=rf"the folder says {said}.*\n  AutoTokenizer.from_pretrained\("):
        open_tokenizer(copied)


def test_lines_that_are_no_merge_are_named(copied):
    (copied / "merges.txt").write_text("#version: 0.2\nt h\nt h e\n")
    with pytest.raises(UserError, match=r"merges.txt: 't h e' must be two tokens"):
        open_tokenizer(copied)
    (copied / "vocab.json").write_text('{"a": -1}')
    with pytest.raises(UserError, match=r"vocab.json: a=-1 must be a whole number"):
        open_tokenizer(copied)


def test_two_tokens_of_one_id_are_named(copied):
    vocab = json.loads((copied / "vocab.json").read_text())
    (copied / "vocab.json").write_text(json.dumps(vocab | {"a": vocab["<|endoftext|>"]}))
    with pytest.raises(UserError, match=r"vocab.json: '<.endoftext.>' and 'a' have the same id 0"):
        open_tokenizer(copied)


@pytest.mark.parametrize("token", ["a\u202e", "\x1b[2J", "x" * 10_000])
def test_what_the_library_quotes_moves_no_cursor(copied, token):
    with (copied / "merges.txt").open("a") as file:
        file.write(f"{token} b\n")
    with pytest.raises(UserError, match="the package tokenizers can read: ") as refused:
        open_tokenizer(copied)
    assert all(character.isprintable() for character in str(refused.value)) and len(str(refused.value)) < 1000
