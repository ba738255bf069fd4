"""Exported tokenizers give our ids in transformers, whatever files the source has; and the model card says so."""

import dataclasses
import json
import os
import shutil

import pytest
from etils import epath
from gguf_case import PHI3, TEXT, opened, tokenizer

from phijax.errors import UserError
from phijax.interchange import tokenizer_check
from phijax.interchange.facts import Facts
from phijax.interchange.gguf.write import write_card
from phijax.interchange.huggingface import export as huggingface_export
from phijax.interchange.huggingface import folder as huggingface_folder
from phijax.interchange.huggingface.families import FAMILIES
from phijax.interchange.open import open_checkpoint
from phijax.text.beginning import post_processor
from phijax.text.open import open_tokenizer
from phijax.text.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

TEXTS = (*tokenizer_check.TEXTS, *TEXT.split("\n")[:5], "<|user|>\n Hi  there<|end|>\n<|assistant|>\n\n", "5 t CO2e  a")


def export(source, output, layout="phi3", say=lambda line: None):
    folder = huggingface_export.folder(source, FAMILIES[layout], None)
    huggingface_folder.write(source, epath.Path(output), folder, say=say)
    return output


def no_tokenizer():
    raise UserError("There is none.")


def assert_same_ids(folder, mine):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert theirs(text, add_special_tokens=False)["input_ids"] == mine.encode_with_specials(text), repr(text)
    assert open_tokenizer(folder).encode("5 t CO2e  a") == mine.encode("5 t CO2e  a")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export(opened(PHI3), tmp_path_factory.mktemp("phi3") / "from")


@pytest.fixture
def llama(exported, tmp_path):
    """A model in Llama's layout, its tokenizer files those that transformers reads under a class of its own."""
    folder = shutil.copytree(exported, tmp_path / "from")
    without = dataclasses.replace(open_checkpoint(exported), tokenizer=no_tokenizer, facts=Facts())
    export(without, tmp_path / "weights", "llama")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tmp_path / "weights" / name, folder / name)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "from_slow": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    spec = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(spec | {"post_processor": post_processor(["<s>"], [1])}))
    return folder


@pytest.mark.parametrize("with_json", [True, False])
def test_a_llama_folder_whose_class_is_rebuilt(llama, tmp_path, with_json):
    """With the class as it is, or without tokenizer.json, transformers 5 gives other ids; what we write gives ours."""
    if not with_json:
        (llama / "tokenizer.json").unlink()
    source = open_checkpoint(llama)
    mine = source.tokenizer()
    theirs = transformers.AutoTokenizer.from_pretrained(llama)
    assert any(theirs(x, add_special_tokens=False)["input_ids"] != mine.encode_with_specials(x) for x in TEXTS)
    to = export(source, tmp_path / "to", "llama")
    assert_same_ids(to, mine)
    assert "were compared with those of transformers" in (to / "README.md").read_text()
    # What goes before a text is the source's own.
    assert transformers.AutoTokenizer.from_pretrained(to)("Hi")["input_ids"] == [1, *mine.encode("Hi")]
    assert open_checkpoint(to).begin == (1,)


def test_what_is_right_is_copied_byte_for_byte(exported, tmp_path):
    second = export(open_checkpoint(exported), tmp_path / "to")
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"):
        assert (exported / name).read_bytes() == (second / name).read_bytes()


def byte_level(folder, **changed):
    """A folder with a byte-level tokenizer.json and symbols, written by others."""
    from phijax.text.byte_level import byte_of_character
    from phijax.text.pre_tokenizers import pre_tokenizer

    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    letters = list(byte_of_character())
    vocab = {token: i for i, token in enumerate([*letters, "he", "ll", "hell"])}
    added = [("<|endoftext|>", True), ("CO2e", False), ("  ", False)]
    spec = {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": None,
        "added_tokens": [
            {"id": len(vocab) + n, "content": name, **plain, "special": s} for n, (name, s) in enumerate(added)
        ],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer("gpt-2"),
        "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": 0.5, "vocab": vocab, "merges": ["h e", "l l", "he ll"]} | changed,
    }
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    config = {"tokenizer_class": "GPT2TokenizerFast", "eos_token": "<|endoftext|>"}
    config |= {"auto_map": {"AutoTokenizer": ["x.Own", None]}, "split_special_tokens": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name in ("tokenizer.model", "added_tokens.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    return folder


def test_dropout_and_truncation_do_not_travel(exported, tmp_path):
    """They would give each reader of the export other ids than the model was trained on."""
    source = open_checkpoint(byte_level(shutil.copytree(exported, tmp_path / "from")))
    to = export(source, tmp_path / "to")
    written = json.loads((to / "tokenizer.json").read_text())
    assert not written["model"]["dropout"] and written["truncation"] is None
    assert written["post_processor"]["type"] == "ByteLevel"
    assert_same_ids(to, source.tokenizer())
    assert open_tokenizer(to).fingerprint == source.tokenizer().fingerprint


@pytest.mark.parametrize("dummy_space", ["each", "first"])
def test_symbols_of_ours_are_written(tmp_path, dummy_space):
    added = dict(tokenizer().added_tokens) | {"CO2e": 380, "  ": 381, "word": 382, "left": 383}
    settings = {"strips_left": ["left"], "whole_words": ["word"], "normalized": ["CO2e", "word"]}
    mine = Tokenizer(
        tokenizer()._model, added, symbols=["CO2e", "  ", "word", "left"], dummy_space=dummy_space, **settings
    )
    to = export(opened(PHI3, tokenizer=lambda: mine), tmp_path / "to")
    assert_same_ids(to, mine)
    assert open_tokenizer(to).fingerprint == mine.fingerprint
    decoder = json.loads((to / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert decoder["380"]["special"] is False and decoder["380"]["normalized"] is True
    assert decoder["379"]["special"] is True


class Wrong(Tokenizer):
    """Writes a tokenizer.json of other ids than its own."""

    def huggingface_json(self):
        spec = super().huggingface_json()
        spec["model"]["merges"] = spec["model"]["merges"][::-1]
        return spec


def test_a_difference_is_an_error_and_leaves_nothing(exported, tmp_path):
    wrong = dataclasses.replace(open_checkpoint(exported), tokenizer=lambda: Wrong(tokenizer()._model))
    with pytest.raises(UserError, match=r"would give other ids: transformers 5\S* reads \d+ of \d+ texts otherwise"):
        export(wrong, tmp_path / "to")
    assert list(tmp_path.iterdir()) == []


def test_where_the_files_can_only_be_copied_it_is_a_warning(exported, tmp_path):
    class Unigram(Tokenizer):
        def huggingface_json(self):
            return None

    model = dataclasses.replace(
        open_checkpoint(exported), tokenizer=lambda: Unigram(tokenizer()._model, strips_right=())
    )
    said = []
    to = export(model, tmp_path / "to", say=said.append)
    assert any(line.startswith("warning: transformers") for line in said)
    assert "Not equal: transformers" in (to / "README.md").read_text()


def test_without_transformers_the_card_says_so(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_check.importlib.util, "find_spec", lambda name: None)
    to = export(open_checkpoint(exported), tmp_path / "to")
    assert "Its ids were not compared with those of transformers." in (to / "README.md").read_text()


def test_what_transformers_cannot_read_is_said(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_check, "_CHILD", "raise SystemExit('no such class')")
    said = []
    to = export(open_checkpoint(exported), tmp_path / "to", say=said.append)
    assert any("not compared" in line and "no such class" in line for line in said)
    assert "not compared with those of transformers: transformers cannot read" in (to / "README.md").read_text()


def test_a_model_without_a_tokenizer_says_nothing_of_one(tmp_path):
    to = export(opened(PHI3, tokenizer=no_tokenizer), tmp_path / "to")
    assert "Tokenizer" not in (to / "README.md").read_text().replace("AutoTokenizer", "")
    assert not (to / "tokenizer.json").exists()


def test_a_tokenizer_that_is_not_read_here_is_copied_and_not_compared(exported, tmp_path):
    unread = dataclasses.replace(open_checkpoint(exported), tokenizer=no_tokenizer)
    to = export(unread, tmp_path / "to")
    assert (to / "tokenizer.json").read_bytes() == (exported / "tokenizer.json").read_bytes()
    assert "not compared: phijax does not read" in (to / "README.md").read_text()


def test_the_card_of_a_folder_whose_name_is_no_utf8(exported, tmp_path):
    """It comes last: all weights were written by then."""
    folder = os.fsdecode(bytes(tmp_path) + b"/hf\xff\x1b[2J")
    shutil.copytree(exported, folder)
    source = open_checkpoint(folder)
    to = export(source, tmp_path / "to")
    assert "# 'hf\\udcff\\x1b[2J'\n" in (to / "README.md").read_text()
    write_card(source, tmp_path)
    assert "# 'hf\\udcff\\x1b[2J'\n" in (tmp_path / "README.md").read_text()
