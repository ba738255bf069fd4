"""The tokens before a text, as a folder's files say: against what transformers puts there."""

import json
import shutil

import pytest
from etils import epath

from phijax.errors import UserError
from phijax.text.beginning import read_beginning, write_beginning
from phijax.text.train_tokenizer import train_tokenizer

transformers = pytest.importorskip("transformers")

TEXT = "one two"
BOS = 1  # <s>


def template(*names, ids=(), behind=()):
    def special(name):
        return {"SpecialToken": {"id": name, "type_id": 0}}

    single = [*map(special, names), {"Sequence": {"id": "A", "type_id": 0}}, *map(special, behind)]
    known = {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in ids}
    return {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": known}


END = ("<|endoftext|>", 300 - 11)
BEGINS = template("<s>", ids=[("<s>", 1)])
CASES = {
    "nothing said": ({}, None),
    "no, and a post-processor that would": ({"add_bos_token": False}, BEGINS),
    "yes, without a post-processor": ({"add_bos_token": True, "bos_token": "<s>"}, None),
    "yes, as an object": ({"add_bos_token": True, "bos_token": {"__type": "AddedToken", "content": "<s>"}}, None),
    "yes, but no bos": ({"add_bos_token": True}, None),
    "yes, but the class has none": ({"add_bos_token": True, "bos_token": None}, BEGINS),
    "only eos is spoken of": ({"add_eos_token": False, "bos_token": "<s>"}, BEGINS),
    "the post-processor alone": ({"bos_token": "<s>"}, BEGINS),
    "the post-processor names another": ({"bos_token": "<s>"}, template(END[0], ids=[END])),
    "two tokens": ({}, template("<s>", END[0], ids=[("<s>", 1), END])),
    "one before, one behind": ({}, template("<s>", ids=[("<s>", 1), END], behind=[END[0]])),
    "one behind": ({}, template(ids=[END], behind=[END[0]])),
    "a sequence": ({}, {"type": "Sequence", "processors": [
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}, BEGINS]}),
    "as BERT has it": ({}, {"type": "BertProcessing", "sep": [END[0], END[1]], "cls": ["<s>", 1]}),
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    train_tokenizer(["some words to train a tokenizer on, one two " * 3], 300).save_huggingface(folder)
    return folder


def edited(plain, folder, keys, processor):
    shutil.copytree(plain, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for name in ("add_bos_token", "add_eos_token", "bos_token"):
        config.pop(name, None)
    (folder / "special_tokens_map.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(config | keys))
    whole = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(whole | {"post_processor": processor}))
    return epath.Path(folder)


def theirs(folder):
    """What transformers puts before a text."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    bare = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    ids = tokenizer(TEXT)["input_ids"]
    where = next(i for i in range(len(ids)) if ids[i : i + len(bare)] == bare)
    return tuple(ids[:where])


@pytest.mark.parametrize("case", CASES)
def test_a_folder_begins_texts_as_transformers_does(case, plain, tmp_path):
    folder = edited(plain, tmp_path / "folder", *CASES[case])
    assert read_beginning(folder, None) == theirs(folder)


def test_the_cases_differ(plain, tmp_path):
    found = {theirs(edited(plain, tmp_path / str(i), *case)) for i, case in enumerate(CASES.values())}
    assert found == {(), (BOS,), (END[1],), (BOS, END[1])}


@pytest.mark.parametrize("begin", [(), (END[1],), (BOS,)])
@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_what_transformers_does(case, begin, plain, tmp_path):
    folder = edited(plain, tmp_path / "folder", *CASES[case])
    write_beginning(folder, begin)
    assert read_beginning(folder, None) == theirs(folder) == begin
    # By the file alone, as transformers 4 and other readers take it.
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    assert tuple(tokenizer("one")["input_ids"][: len(begin)]) == begin


def test_a_post_processor_that_is_none_is_refused(plain, tmp_path):
    for number, processor in enumerate(
        [
            {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "?"}}], "special_tokens": {}},
            {"type": "TemplateProcessing", "single": [3]},
            {"type": "BertProcessing", "cls": []},
            template("<s>", ids=[("<s>", "x")]),
            {"type": "Sequence", "processors": 7},
        ]
    ):
        folder = edited(plain, tmp_path / str(number), {}, processor)
        with pytest.raises(UserError, match="post_processor"):
            read_beginning(folder, None)


def test_a_token_that_is_not_there_cannot_begin_texts(plain, tmp_path):
    folder = edited(plain, tmp_path / "folder", {}, None)
    with pytest.raises(UserError, match="no token of id 777"):
        write_beginning(folder, (777,))
